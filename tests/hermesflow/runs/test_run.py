"""Training on a file of pairs without a run: its files, resuming after a kill, and what is refused."""

import json

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from hermesflow import cli, read_pairs, train_pairs, training
from hermesflow.config import TrainConfig, load_config
from hermesflow.data.pairs import PAIRS_SCHEMA
from hermesflow.data.published_pairs import write_published_pairs
from hermesflow.models import load_model
from hermesflow.runs import claim_folder, train_on_pairs
from hermesflow.runs import run as runs
from hermesflow.runtime.files import InputError, write_parquet
from hermesflow.runtime.metric_log import TIMINGS

STEPS = 6


@pytest.fixture(scope="module")
def place(shared_tiny_model, random_pairs, tmp_path_factory):
    """A folder with model/ and pairs.parquet."""
    folder = tmp_path_factory.mktemp("place")
    shared_tiny_model.save(folder / "model")
    write_parquet(folder / "pairs.parquet", random_pairs(shared_tiny_model))
    return folder


def config_for(place, *more):
    settings = (f"model.name={place / 'model'}", f"train.num_steps={STEPS}", "train.pairs_per_step=2",
                "train.checkpoint_every=2", "train.lr=1e-3", *more)  # fmt: skip
    return load_config(None, settings)


def weights(folder):
    return load_file(folder / "model/model.safetensors")


def metrics(folder):
    lines = (folder / "train/metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMINGS} for line in lines]


@pytest.fixture(scope="module")
def trained(place):
    train_on_pairs(config_for(place), place / "pairs.parquet", place / "trained")
    return place / "trained"


def test_a_file_of_pairs_is_trained_on(place, trained):
    for name in ("config.toml", "training.json", "model/config.json", "train/reference.parquet", "train/metrics.jsonl"):
        assert (trained / name).is_file()
    assert load_config(trained / "config.toml") == config_for(place)
    assert len(metrics(trained)) == STEPS and json.loads((trained / "training.json").read_text())["loss"] > 0
    before, after = load_model(str(place / "model")), load_model(str(trained / "model"))
    assert not torch.equal(before.transformer.head.weight, after.transformer.head.weight)


def test_the_library_call_does_the_same(place, trained, tmp_path):
    model, config = load_model(str(place / "model")), config_for(place).train
    assert isinstance(config, TrainConfig)
    train_pairs(model, read_pairs(place / "pairs.parquet"), config, seed=0, folder=tmp_path)
    for name, value in model.transformer.state_dict().items():
        assert torch.equal(value, weights(trained)[name]), name


def test_a_finished_folder_is_left_alone(place, trained):
    before = {path: path.stat().st_mtime_ns for path in (trained / "train").rglob("*")}
    assert train_on_pairs(config_for(place), place / "pairs.parquet", trained) == trained / "model"
    assert {path: path.stat().st_mtime_ns for path in (trained / "train").rglob("*")} == before


def test_training_that_was_stopped_goes_on_to_the_same_weights(place, trained, tmp_path, monkeypatch):
    save = training.save_checkpoint

    def save_and_stop(*args):
        save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "save_checkpoint", save_and_stop)
        train_on_pairs(config_for(place), place / "pairs.parquet", tmp_path)
    assert not (tmp_path / "model").exists() and len(metrics(tmp_path)) == 2
    train_on_pairs(config_for(place), place / "pairs.parquet", tmp_path)
    assert metrics(tmp_path) == metrics(trained)
    assert all(torch.equal(value, weights(trained)[name]) for name, value in weights(tmp_path).items())


COMMAND = ("train", "--set", "train.num_steps=1")


def test_the_command_prints_where_the_model_is(place, tmp_path, capsys):
    file = tmp_path / "settings.toml"
    file.write_text(f"[run]\nfolder = '{tmp_path}'\nname = 'mine'\n[train]\nbeta = 0.1\nnum_steps = 9\n")
    more = ("--pairs", str(place / "pairs.parquet"), "--model", str(place / "model"), "--config", str(file))
    assert cli.main([*COMMAND, *more]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'mine/model'}\n"
    config = load_config(tmp_path / "mine/config.toml")
    assert (config.train.beta, config.train.num_steps) == (0.1, 1)
    assert cli.main([*COMMAND, *more, "-o", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/model").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--pairs", "p.parquet", "--round", "1"], "--round: belongs to a run; with --pairs FILE there is none"),
        (["-o", "out"], "--output: belongs to --pairs FILE; a round's training goes into its run"),
        (["--root", "."], "--root: belongs to --pairs FILE"),
    ],
    ids=["round", "output", "root"],
)
def test_options_of_a_run_and_of_a_file_are_not_mixed(capsys, more, message):
    assert cli.main([*COMMAND, *more]) == 2
    assert message in capsys.readouterr().err


def test_published_pairs_are_trained_on(place, shared_tiny_model, tmp_path, caplog):
    rows = read_pairs(place / "pairs.parquet").to_pylist()
    for number, row in enumerate(rows):
        for role, score in (("win", 0.9 if number else 0.1), ("lose", 0.2)):
            row[f"{role}_caption"] = shared_tiny_model.decode_text(row[f"{role}_caption_ids"])
            row |= {f"{role}_image_score": score, f"{role}_caption_score": score}
    path = write_published_pairs(shared_tiny_model, pa.Table.from_pylist(rows, PAIRS_SCHEMA), tmp_path / "a/b")
    path = path.rename(tmp_path / "pair_dpo_data.json")
    with caplog.at_level("INFO", "hermesflow"):
        train_on_pairs(config_for(place, "train.num_steps=1"), path, tmp_path / "out", root=tmp_path / "a/b")
    assert "left out 1 win not above lose; the first is record r0" in caplog.text
    assert load_model(str(tmp_path / "out/model"))


def test_adapters_are_saved_beside_the_checkpoints(place, tmp_path):
    config = config_for(place, "train.num_steps=2", "train.lora_rank=2")
    train_on_pairs(config, place / "pairs.parquet", tmp_path / "out")
    assert list((tmp_path / "out/train/adapter").iterdir()) and (tmp_path / "out/model/config.json").exists()


def test_pairs_of_another_model_are_refused_by_record(place, tmp_path):
    rows = read_pairs(place / "pairs.parquet").to_pylist()
    rows[3]["lose_codes"] = [0] * 4
    write_parquet(tmp_path / "pairs.parquet", pa.Table.from_pylist(rows, PAIRS_SCHEMA))
    with pytest.raises(
        InputError,
        match="pairs.parquet: record r3: lose_codes has 4 tokens, the model's image 16 at model.image_size 64",
    ):
        train_on_pairs(config_for(place), tmp_path / "pairs.parquet", tmp_path / "out")
    # Nothing binds the folder to the pairs that were refused.
    assert not (tmp_path / "out/train").exists() and not (tmp_path / "out/origin.json").exists()


def test_a_side_that_a_pair_lacks_is_not_asked_for(place, shared_tiny_model, random_pairs, tmp_path):
    pairs = random_pairs(shared_tiny_model, 2, sides=("generation", "understanding"))
    write_parquet(tmp_path / "pairs.parquet", pairs)
    assert train_on_pairs(config_for(place, "train.num_steps=1"), tmp_path / "pairs.parquet", tmp_path / "out").exists()


def test_a_missing_file_is_named_before_anything_is_made(place, tmp_path):
    with pytest.raises(InputError, match="none.parquet: no such file; give pairs.parquet of a run or a published"):
        train_on_pairs(config_for(place), tmp_path / "none.parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_made(place, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="train.tracker trackio: it is not installed; run: pip install trackio"):
        train_on_pairs(config_for(place, "train.tracker=trackio"), place / "pairs.parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_vision_encoder_is_refused(place, tmp_path, monkeypatch, tiny_model):
    monkeypatch.setattr(type(tiny_model), "is_saved_whole", False)
    monkeypatch.setattr(runs, "open_model", lambda config: tiny_model)
    with pytest.raises(InputError, match="sees images through a vision encoder"):
        train_on_pairs(config_for(place), place / "pairs.parquet", tmp_path / "out")


def test_other_settings_in_the_same_folder_are_refused(place, trained):
    with pytest.raises(
        InputError,
        match=r"other settings \(train.beta\); choose another output folder \(-o\), take its own by --config",
    ):
        train_on_pairs(config_for(place, "train.beta=0.5"), place / "pairs.parquet", trained)


def test_settings_that_training_does_not_read_may_change(place, trained):
    made = (trained / "model/model.safetensors").read_bytes()
    other = config_for(place, "eval.num_prompts=7", "curation.margin=0.2", "data.num_records=3")
    assert train_on_pairs(other, place / "pairs.parquet", trained) == trained / "model"
    assert (trained / "model/model.safetensors").read_bytes() == made
    assert train_on_pairs(config_for(place), place / "pairs.parquet", trained) == trained / "model"


def test_a_run_of_self_play_is_not_overwritten(place, tmp_path):
    (tmp_path / "round-0").mkdir()
    with pytest.raises(InputError, match=r"holds a run of self-play; choose another output folder \(-o\)"):
        train_on_pairs(config_for(place), place / "pairs.parquet", tmp_path)
    assert not (tmp_path / "config.toml").exists()


def test_a_second_process_is_refused(place, trained):
    lock = claim_folder(trained, config_for(place), "folder")
    with pytest.raises(InputError, match=r"another process is at work on this run; wait for it or choose another out"):
        train_on_pairs(config_for(place), place / "pairs.parquet", trained)
    lock.close()


def test_other_pairs_in_the_same_folder_are_refused(place, trained, shared_tiny_model, random_pairs, tmp_path):
    write_parquet(tmp_path / "p.parquet", random_pairs(shared_tiny_model, 5))
    with pytest.raises(InputError, match=r"the run began with other pairs than .*p.parquet holds now; choose another"):
        train_on_pairs(config_for(place), tmp_path / "p.parquet", trained)


def test_other_weights_of_the_same_name_are_refused(place, trained, tiny_model, monkeypatch):
    tiny_model.transformer.head.weight.data[0, 0] += 1
    monkeypatch.setattr(runs, "open_model", lambda config: tiny_model)
    with pytest.raises(InputError, match="the run began with other weights than .* holds now; choose another output"):
        train_on_pairs(config_for(place), place / "pairs.parquet", trained)
