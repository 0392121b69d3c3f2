"""Whole runs on a random model: the files of a run, SIGKILL at its worst moments, and refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image

from hermesflow.config import PretrainConfig, load_config
from hermesflow.evaluation.metrics import measure
from hermesflow.runs import Run
from hermesflow.runtime.files import InputError, read_parquet
from hermesflow.selfplay import curate_round, evaluate_round, run_selfplay, train_round
from hermesflow.worlds import shapes
from hermesflow.worlds.shapes import _SCENE_SEEDS

SETTINGS = (
    "data.num_records=8", "curation.num_images=3", "curation.num_steps=3", "curation.threshold=0", "curation.margin=0",
    "curation.keep=any", "curation.batch_records=2", "curation.caption_top_k=[4]", "train.num_steps=12",
    "train.pairs_per_step=4", "train.checkpoint_every=2", "eval.num_prompts=6", "eval.num_understanding=6",
    "eval.num_steps=3", "selfplay.num_rounds=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def settings(shared_tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    shared_tiny_model.save(folder)
    return [*SETTINGS, f"model.name={folder}"]


def config_for(settings, folder, *more):
    return load_config(None, [*settings, f"run.folder={folder}", "run.name=t", *more])


def comparable(folder):
    """summary.json without what may differ: timings, and where the run lies."""
    summary = json.loads((folder / "t/summary.json").read_text())
    for metrics in (summary["before"], *summary["rounds"]):
        del metrics["seconds"]
    del summary["settings"]["run"]["folder"]
    return summary


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run_selfplay(config_for(settings, folder))
    return folder


def test_a_run_leaves_its_files(whole):
    files = {str(path.relative_to(whole / "t")) for path in (whole / "t").rglob("*")}
    assert files >= {
        "config.toml",
        "records.parquet",
        "summary.json",
        "report/index.html",
        "round-0/evaluation.json",
        "round-1/candidates/part-00000.parquet",
        "round-1/pairs.parquet",
        "round-1/rejected.parquet",
        "round-1/train/metrics.jsonl",
        "round-1/model/model.safetensors",
        "round-2/evaluation.json",
    }
    assert not [name for name in files if ".tmp" in name]


def test_the_summary_has_what_it_promises(whole):
    summary = json.loads((whole / "t/summary.json").read_text())
    assert len(summary["rounds"]) == 2 and summary["seed"] == 0
    for metrics in (summary["before"], *summary["rounds"]):
        for name in ("understanding", "generation", "generation_strict", "gap"):
            low, high = metrics[f"{name}_ci95"]
            assert low <= metrics[name] <= high
        assert metrics["gap"] == pytest.approx(metrics["understanding"] - metrics["generation"])
        assert metrics["by_category"] and metrics["seconds"]
    assert summary["data"] == {"records": 16, "rejected": {}, "yes_share": 0.5}
    for metrics in (summary["before"], *summary["rounds"]):
        assert {"yes", "no", "color", "count", "place", "relation", "size"} <= metrics["understanding_by_kind"].keys()
        low, high = metrics["understanding_record_questions_ci95"]
        assert low <= metrics["understanding_record_questions"] <= high
        assert metrics["judge"].keys() == {"spearman", "auc"}
        for sampler in ("4/1", "4/0.7", "8/0.7"):
            for name in ("generation", "generation_strict", "best_of_4_strict"):
                low, high = metrics["samplers"][sampler][f"{name}_ci95"]
                assert low <= metrics["samplers"][sampler][name] <= high
    for metrics in summary["rounds"]:
        assert metrics["change"]["samplers"]["4/0.7"]["generation_strict"].keys() == {"change", "ci95", "significant"}
        assert metrics["change"]["understanding_by_kind"]["no"]["ci95"]
        assert metrics["agreement"]["caption_win_truer"] + metrics["agreement"]["caption_win_less_true"] <= 1
        assert set(metrics["change"]) >= {"understanding", "generation", "generation_strict", "gap"}
        assert {"pairs", "training", "agreement"} <= set(metrics)
        assert metrics["training"]["replay/kl"] > 0  # the records' balanced questions


# In the midst of a phase; between phases, and at random in all of them, are the soak tests' kills.
MOMENTS = [
    pytest.param("round-0/evaluation.json", id="evaluation", marks=pytest.mark.soak),
    pytest.param("round-1/candidates/part-00001.parquet", id="curation"),
    pytest.param("round-1/train/step-000004", id="training"),
    pytest.param("round-2/pairs.parquet", id="second round", marks=pytest.mark.soak),
]


@pytest.mark.parametrize("moment", MOMENTS)
def test_sigkill_and_the_same_command_again_end_alike(settings, whole, tmp_path, moment):
    arguments = [item for setting in (*settings, f"run.folder={tmp_path}", "run.name=t") for item in ("--set", setting)]
    command = [sys.executable, "-m", "hermesflow", "selfplay", *arguments]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "t" / moment).exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "t/summary.json").exists()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert comparable(tmp_path) == comparable(whole)


def test_the_phases_alone_end_like_the_whole(settings, whole, tmp_path):
    config = config_for(settings, tmp_path)
    for number in (1, 2):
        curate_round(Run(config), number)
        train_round(Run(config), number)
    run_selfplay(config)
    assert comparable(tmp_path) == comparable(whole)


def test_the_same_records_in_every_round(settings, tmp_path):
    summary = run_selfplay(config_for(settings, tmp_path, "selfplay.fresh_prompts=false"))
    assert len(summary["rounds"]) == 2


def test_a_round_with_settings_of_its_own(settings, whole, tmp_path):
    of_round = ("selfplay.algorithm=grpo", "data.num_records=4", "train.num_steps=2")
    more = ("grpo.prompts_per_step=2", "grpo.num_images=2", *(f"round.2.{setting}" for setting in of_round))
    summary = run_selfplay(config_for(settings, tmp_path, *more))
    first, second = summary["rounds"]
    assert summary["data"]["records"] == 12 and "pairs" in first and "pairs" not in second
    assert "reward" in second["training"] and "reward" not in first["training"]
    weights = "t/round-1/model/model.safetensors"  # nothing of round 2 reaches round 1
    assert (tmp_path / weights).read_bytes() == (whole / weights).read_bytes()
    run = Run(config_for(settings, tmp_path, *more))
    ids = [[record.id for record in run.round_records(number)] for number in (1, 2)]
    assert list(map(len, ids)) == [8, 4] and not {*ids[0]} & {*ids[1]}
    del run
    with pytest.raises(InputError, match=r"other settings \(round.2.train.lr\)"):
        run_selfplay(config_for(settings, tmp_path, *more, "round.2.train.lr=1e-6"))


def test_pairs_meet_those_of_the_last_round_that_had_some(settings, tmp_path):
    more = ("selfplay.fresh_prompts=false", "selfplay.num_rounds=3", "grpo.prompts_per_step=2", "grpo.num_images=2")
    more += ("round.2.selfplay.algorithm=grpo", "round.2.train.num_steps=2", "eval.samplers=[]")
    run_selfplay(config_for(settings, tmp_path, *more))
    assert Run(config_for(settings, tmp_path, *more)).previous(3)._rows.path == tmp_path / "t/round-1/pairs.parquet"


def test_other_settings_in_the_same_folder_are_refused(settings, whole):
    words = r"other settings \(train.lr\); train on its pairs by `hermesflow train --pairs .*, choose another run.name"
    with pytest.raises(InputError, match=words):
        run_selfplay(config_for(settings, whole, "train.lr=0.5"))


def test_settings_of_what_is_not_made_yet_may_change(settings, whole, tmp_path):
    """Curated with other settings of training and one round; what comes out is as if they had been right at once."""
    curate_round(Run(config_for(settings, tmp_path, "train.lr=1", "train.num_steps=3", "selfplay.num_rounds=1")), 1)
    run_selfplay(config_for(settings, tmp_path))
    assert comparable(tmp_path) == comparable(whole)
    assert load_config(tmp_path / "t/config.toml") == config_for(settings, tmp_path)


def test_training_before_curation_names_the_missing_file(settings, tmp_path):
    with pytest.raises(InputError, match="round 1 has no pairs yet; curate or import them first"):
        train_round(Run(config_for(settings, tmp_path)), 1)


def test_a_round_without_pairs_says_what_to_lower(settings, tmp_path):
    words = "round 1 kept no pair, most often for 'generation: best image .*; lower curation.threshold"
    with pytest.raises(InputError, match=words):
        run_selfplay(config_for(settings, tmp_path, "curation.threshold=1", "curation.keep=both"))


def test_the_checkpoint_before_a_damaged_one_is_used(settings, whole, tmp_path, caplog):
    shutil.copytree(whole / "t", tmp_path / "t")
    for name in ("round-2/model", "round-2/evaluation.json", "summary.json"):
        path = tmp_path / "t" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tmp_path / "t/round-2/train/step-000010/progress.json").write_bytes(b"garbage")
    run_selfplay(config_for(settings, tmp_path))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    (warning,) = [text for text in warnings if "checkpoint" in text]
    assert "step-000010: damaged checkpoint (progress.json has 7 bytes instead of " in warning
    assert comparable(tmp_path) == comparable(whole)


@pytest.mark.parametrize(
    ("damage", "redo", "message"),
    [
        ("round-1/pairs.parquet", "summary.json", "pairs.parquet: damaged Parquet"),
        ("round-0/evaluation.json", "summary.json", "evaluation.json: damaged JSON"),
        ("config.toml", "summary.json", "config.toml: not a TOML file"),
        ("round-2/candidates/part-00001.parquet", "round-2/pairs.parquet", "part-00001.parquet: damaged Parquet"),
        (
            "round-1/model/model.safetensors",
            "round-2/pairs.parquet",
            "or delete .*round-1/model and run the same command",
        ),
        ("round-2/train/step-*/progress.json", "round-2/model", "train: no checkpoint can be used .step-000010: prog"),
    ],
    ids=["pairs", "evaluation", "config", "candidates", "model", "checkpoint"],
)
def test_a_damaged_file_is_named_and_nothing_is_lost(settings, whole, tmp_path, damage, redo, message):
    shutil.copytree(whole / "t", tmp_path / "t")
    missing = tmp_path / "t" / redo
    shutil.rmtree(missing) if missing.is_dir() else missing.unlink()
    for path in (tmp_path / "t").glob(damage):
        path.write_bytes(b"garbage")
    files = sorted((tmp_path / "t").rglob("*"))
    with pytest.raises(InputError, match=message):
        run_selfplay(config_for(settings, tmp_path))
    assert sorted((tmp_path / "t").rglob("*")) == files


@pytest.mark.parametrize("lost", ["round-0/seconds.json", "round-1/training.json", "round-2/rejected.parquet"])
def test_a_phase_whose_file_is_lost_is_done_again(settings, whole, tmp_path, lost):
    shutil.copytree(whole / "t", tmp_path / "t")
    (tmp_path / "t" / lost).unlink()
    (tmp_path / "t/summary.json").unlink()
    run_selfplay(config_for(settings, tmp_path))
    assert comparable(tmp_path) == comparable(whole)


def test_lost_candidates_are_made_again_before_they_are_judged(settings, whole, tmp_path):
    shutil.copytree(whole / "t", tmp_path / "t")
    for lost in ("round-1/candidates/part-00002.parquet", "round-1/evaluation.json", "summary.json"):
        (tmp_path / "t" / lost).unlink()
    run_selfplay(config_for(settings, tmp_path))
    assert comparable(tmp_path) == comparable(whole)


def test_a_run_that_was_measured_by_record_questions_is_not_gone_on_with(settings, whole, tmp_path):
    """Its rounds could not be compared; the report still shows it."""
    shutil.copytree(whole / "t", tmp_path / "t")
    path = tmp_path / "t/round-0/evaluation.json"
    evaluation = json.loads(path.read_text())
    for row in evaluation["records"]:
        for name in ("balanced", "kinds", "samplers"):
            del row[name]
    path.write_text(json.dumps(evaluation | {"metrics": measure(evaluation["records"])}))
    (tmp_path / "t/summary.json").unlink()
    with pytest.raises(
        InputError,
        match="evaluation.json: was measured by record questions, as an older version did; "
        "`hermesflow report .*/t` shows the run, and another run.name begins one",
    ):
        run_selfplay(config_for(settings, tmp_path))


def test_other_weights_under_the_same_name_are_refused(settings, whole, tmp_path):
    shutil.copytree(whole / "t", tmp_path / "t")
    (tmp_path / "t/origin.json").write_text('{"model": "another"}')
    (tmp_path / "t/round-0/evaluation.json").unlink()
    with pytest.raises(InputError, match="the run began with other weights"):
        run_selfplay(config_for(settings, tmp_path))


def test_a_second_process_is_refused(settings, whole):
    run = Run(config_for(settings, whole))
    with pytest.raises(InputError, match="another process is at work on this run"):
        run_selfplay(config_for(settings, whole))
    assert run.summary()["seed"] == 0


def test_a_round_beyond_the_run_is_refused(settings, whole):
    with pytest.raises(InputError, match="round 3: the run has rounds 1 to 2"):
        curate_round(Run(config_for(settings, whole)), 3)


def test_self_play_draws_other_scenes_than_pretraining(whole):
    seen = {(scene.background, scene.objects) for scene in shapes.sample_scenes("train", 5000, PretrainConfig().seed)}
    mine = shapes.sample_scenes("train", 100, _SCENE_SEEDS)
    assert not [scene for scene in mine if (scene.background, scene.objects) in seen]


@pytest.fixture
def data(tmp_path):
    """Records of the world of shapes as a user would have them, and four that cannot be used."""
    rng = np.random.default_rng(0)
    scenes = shapes.sample_scenes("train", 10, 3)
    records = [shapes.make_record(scene, f"r{index}", rng) for index, scene in enumerate(scenes)]
    rows = []
    for record in records:
        Image.fromarray(record.image).save(tmp_path / f"{record.id}.png")
        questions = [asdict(question) for question in record.questions]
        rows.append({"id": record.id, "caption": record.caption, "image": f"{record.id}.png", "questions": questions})
    (tmp_path / "r8.png").write_bytes((tmp_path / "r8.png").read_bytes()[:100])
    rows.insert(0, rows[0] | {"id": "x", "caption": "a <b>unicorn</b>"})
    rows.insert(0, rows[1] | {"id": "y", "image": "../r0.png"})
    rows.insert(0, rows[0] | {"id": "z", "image": "../r0.png"})
    rows.insert(9, rows.pop())  # r9 comes before the damaged r8
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


OWN = ("data.num_records=8", "selfplay.num_rounds=1", "eval.num_prompts=3", "eval.num_understanding=3")


def test_a_run_on_records_of_a_users_own(settings, data, tmp_path, capsys, caplog):
    run_selfplay(config_for(settings, tmp_path, f"data.source={data}", *OWN))
    ids = read_parquet(tmp_path / "t/records.parquet")["id"].to_pylist()
    assert len(ids) == 8 and set(ids) <= {f"r{number}" for number in range(10)} - {"r8"}
    rejected = {row["record_id"]: row["reason"] for row in read_parquet(tmp_path / "t/rejected.parquet").to_pylist()}
    assert rejected["y"].startswith("path leaves its root: ") and rejected["x"].startswith("unknown word: ")
    summary = json.loads((tmp_path / "t/summary.json").read_text())
    share = summary["data"].pop("yes_share")
    assert summary["data"] == {"records": 8, "rejected": {"path leaves its root": 2, "unknown word": 1}} and share > 0.6
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "data: 3 records could not be used: 2 path leaves its root, 1 unknown word",
        f"data: {100 * share:.1f} % of the yes-or-no questions about its images are answered yes",
    ):
        assert words in said
        assert words in (tmp_path / "t/report/index.html").read_text()
    assert f"{data}: {100 * share:.1f} % of the yes-or-no questions" in caplog.text
    assert read_parquet(tmp_path / "t/round-1/candidates/part-00000.parquet")["record_id"].to_pylist()[0] in ids


def test_data_that_changed_since_the_run_began(settings, data, tmp_path, caplog):
    own = (*OWN, f"data.source={data}", f"eval.data={data}", "data.num_records=4")
    text, warning = data.read_text(), f"{data}: changed since the run made {tmp_path / 't/records.parquet'} of it"
    run = Run(config_for(settings, tmp_path, *own))
    curate_round(run, 1)
    evaluate_round(run, 0)
    del run
    data.write_text(text)  # touched
    curate_round(Run(config_for(settings, tmp_path, *own)), 1)
    assert "changed since" not in caplog.text
    data.write_text(text.replace("small", "large").replace("red", "blue"))
    run = Run(config_for(settings, tmp_path, *own))
    assert warning in caplog.text
    train_round(run, 1)
    with pytest.raises(InputError, match="mine.jsonl: changed since the run began, and more is to be made of it"):
        evaluate_round(run, 1)
    del run
    with pytest.raises(InputError, match="mine.jsonl: changed since the run began, and more is to be made of it"):
        curate_round(Run(config_for(settings, tmp_path, *own, "selfplay.num_rounds=2")), 2)


def test_captions_that_are_cut_are_counted(settings, data, tmp_path, caplog, monkeypatch):
    run = Run(config_for(settings, tmp_path, f"data.source={data}", *OWN))
    monkeypatch.setattr(run.model(0), "prompts", replace(run.model(0).prompts, max_prompt_tokens=3))
    assert len(run.records) == 8
    assert "mine.jsonl: 8 of 8 captions are cut to the model's 3 tokens of a prompt" in caplog.text


def test_too_few_usable_records_say_why(settings, data, tmp_path):
    config = config_for(settings, tmp_path, f"data.source={data}", *OWN, "data.num_records=10")
    message = (
        r"mine.jsonl: has 9 usable records, 10 are needed; lower data.num_records; rejected were 2 path leaves its "
        r"root, 1 damaged image, 1 unknown word; the first is record z: path leaves its root"
    )
    with pytest.raises(InputError, match=message):
        curate_round(Run(config), 1)
    assert not (tmp_path / "t/records.parquet").exists()


def test_a_lost_list_of_rejected_records_is_made_again(settings, data, tmp_path):
    config = config_for(settings, tmp_path, f"data.source={data}", *OWN)
    curate_round(Run(config), 1)
    before = (tmp_path / "t/rejected.parquet").read_bytes()
    (tmp_path / "t/rejected.parquet").unlink()
    assert Run(config).round_records(1)[0].id == "r0"
    assert (tmp_path / "t/rejected.parquet").read_bytes() == before


def test_a_mistake_in_the_data_shows_first_and_may_be_mended(settings, tmp_path):
    """Nothing was made by the run that failed, so the same name takes other settings."""
    with pytest.raises(InputError, match="none.jsonl: no such file"):
        run_selfplay(config_for(settings, tmp_path, "data.source=none.jsonl"))
    assert not list(tmp_path.rglob("evaluation.json"))
    assert run_selfplay(config_for(settings, tmp_path))["rounds"]
