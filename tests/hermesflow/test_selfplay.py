"""Whole runs on a random model: the files of a run, SIGKILL at its worst moments, and refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from hermesflow.config import PretrainConfig, load_config
from hermesflow.files import InputError
from hermesflow.selfplay import _SCENE_SEEDS, Run, run_curation, run_selfplay, run_training
from hermesflow.worlds import shapes

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
        "config.toml", "records.parquet", "summary.json", "report/index.html", "round-0/evaluation.json",
        "round-1/candidates/part-00000.parquet", "round-1/pairs.parquet", "round-1/rejected.parquet",
        "round-1/train/metrics.jsonl", "round-1/model/model.safetensors", "round-2/evaluation.json",
    }  # fmt: skip
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
    for metrics in summary["rounds"]:
        assert set(metrics["change"]) >= {"understanding", "generation", "generation_strict", "gap"}
        assert {"pairs", "training", "agreement"} <= set(metrics)


MOMENTS = {
    "evaluation": "round-0/evaluation.json",
    "curation": "round-1/candidates/part-00001.parquet",
    "training": "round-1/train/step-000004",
    "second round": "round-2/pairs.parquet",
}


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS.keys())
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
        run_curation(config, number)
        run_training(config, number)
    run_selfplay(config)
    assert comparable(tmp_path) == comparable(whole)


def test_the_same_records_in_every_round(settings, tmp_path):
    summary = run_selfplay(config_for(settings, tmp_path, "selfplay.fresh_prompts=false"))
    assert len(summary["rounds"]) == 2


def test_other_settings_in_the_same_folder_are_refused(settings, whole):
    with pytest.raises(InputError, match=r"other settings \(train.lr\); choose another run.name"):
        run_selfplay(config_for(settings, whole, "train.lr=0.5"))


def test_training_before_curation_names_the_missing_file(settings, tmp_path):
    with pytest.raises(InputError, match="pairs.parquet: no such file"):
        run_training(config_for(settings, tmp_path), 1)


def test_a_round_without_pairs_says_what_to_lower(settings, tmp_path):
    with pytest.raises(InputError, match="round 1 kept no pair; lower curation.threshold"):
        run_selfplay(config_for(settings, tmp_path, "curation.threshold=1", "curation.keep=both"))


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
        ("round-2/train/step-000010/state.pt", "round-2/model", "step-000010: damaged checkpoint"),
    ],
    ids=["pairs", "evaluation", "config", "candidates", "model", "checkpoint"],
)
def test_a_damaged_file_is_named_and_nothing_is_lost(settings, whole, tmp_path, damage, redo, message):
    shutil.copytree(whole / "t", tmp_path / "t")
    missing = tmp_path / "t" / redo
    shutil.rmtree(missing) if missing.is_dir() else missing.unlink()
    (tmp_path / "t" / damage).write_bytes(b"garbage")
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
    with pytest.raises(InputError, match="round 3: the run has 2 rounds"):
        run_curation(config_for(settings, whole), 3)


def test_self_play_draws_other_scenes_than_pretraining(whole):
    seen = {(scene.background, scene.objects) for scene in shapes.sample_scenes("train", 5000, PretrainConfig().seed)}
    mine = shapes.sample_scenes("train", 100, _SCENE_SEEDS)
    assert not [scene for scene in mine if (scene.background, scene.objects) in seen]
