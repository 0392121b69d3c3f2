"""Which settings of a run may still change, by what its folder holds, and whether files of records changed."""

import json
import os
import re

import pytest

from hermesflow.config import load_config
from hermesflow.runs import settings as run_settings
from hermesflow.runs.settings import changed_settings, describe_way_out

RECORDS = ("records.parquet",)
DRAWN = (*RECORDS, "round-1/candidates/part-00000.parquet")
CURATED = (*DRAWN, "round-1/pairs.parquet")
BEGUN = (*CURATED, "round-1/train/reference.parquet", "round-1/train/metrics.jsonl")
STOPPED = (*BEGUN, "round-1/train/step-000002/state")
TRAINED = (*CURATED, "round-1/training.json", "round-1/model/config.json")
MEASURED = (*RECORDS, "round-0/evaluation.json")

FREE = {
    "training after curation": (CURATED, ["train.lr=1", "train.num_steps=1", "grpo.num_images=2"]),
    "training without a checkpoint": (BEGUN, ["train.tokens_per_pass=64"]),
    "the tracker": (TRAINED, ["train.tracker=tensorboard", "model.device=cpu", "run.folder=elsewhere"]),
    "more rounds": (TRAINED, ["selfplay.num_rounds=9"]),
    "fewer rounds": (TRAINED, ["selfplay.num_rounds=1"]),
    "a round to come": (
        TRAINED,
        ["round.2.train.lr=1", "round.2.selfplay.algorithm=grpo", "round.2.data.num_records=3"],
    ),
    "what chooses among candidates": (DRAWN, ["curation.threshold=0.1", "curation.margin=0", "curation.keep=any"]),
    "evaluation before one": (CURATED, ["eval.num_prompts=3"]),
    "candidates after an evaluation": (MEASURED, ["curation.num_images=2", "train.lr=1", "data.num_records=4"]),
    "the same for each round": (TRAINED, ["round.1.train.lr=7e-5"]),
    "what no run reads": (TRAINED, ["pretrain.seed=3", "study.workers=2"]),
}
FIXED = {
    "the records": (
        RECORDS,
        ["data.source=a.jsonl", "run.seed=1", "model.name=tiny-ar", "selfplay.fresh_prompts=false"],
    ),
    "candidates": (DRAWN, ["curation.num_images=2", "drawing.num_steps=2", "selfplay.algorithm=grpo"]),
    "a round's records": (DRAWN, ["data.num_records=3"]),
    "pairs": (CURATED, ["curation.threshold=0.1"]),
    "a stopped training": (STOPPED, ["train.lr=1", "grpo.num_images=2"]),
    "a finished training": (TRAINED, ["train.lr=1", "own_drawings.num_images=3"]),
    "a round of its own": (TRAINED, ["round.1.train.lr=1"]),
    "a measurement": (MEASURED, ["eval.num_prompts=3", "drawing.temperature=0.5"]),
}


def fill(folder, files):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize(("files", "settings"), FREE.values(), ids=FREE)
def test_what_nothing_was_made_with_may_change(tmp_path, files, settings):
    fill(tmp_path, files)
    assert changed_settings(tmp_path, load_config(), load_config(None, settings)) == []


@pytest.mark.parametrize(("files", "settings"), FIXED.values(), ids=FIXED)
def test_what_results_were_made_with_may_not(tmp_path, files, settings):
    fill(tmp_path, files)
    names = changed_settings(tmp_path, load_config(), load_config(None, settings))
    assert sorted(names) == sorted(setting.partition("=")[0] for setting in settings)


def test_rounds_that_were_begun_stay(tmp_path):
    fill(tmp_path, [*TRAINED, "round-2/pairs.parquet"])
    fewer = load_config(None, ["selfplay.num_rounds=1"])
    assert changed_settings(tmp_path, load_config(), fewer) == ["selfplay.num_rounds"]


@pytest.mark.parametrize(
    ("files", "changed", "way"),
    [
        (TRAINED, ["train.lr"], "train on its pairs by `hermesflow train --pairs .*round-1/pairs.parquet -o FOLDER`, "
         "set it for a later round, as round.2.train.lr, choose another run.name, take its own by --config .*, or del"),
        (TRAINED, ["round.1.train.lr"], "train on its pairs by .*, choose another run.name, take its own"),
        (CURATED, ["curation.margin"], "^set it for a later round, as round.2.curation.margin, choose another run"),
        (RECORDS, ["data.source"], "^choose another run.name, take its own by"),
    ],
    ids=["training", "a round's training", "curation", "data"],
)  # fmt: skip
def test_the_way_out_comes_before_deletion(tmp_path, files, changed, way):
    fill(tmp_path, files)
    assert re.search(way, describe_way_out(tmp_path, changed, "run.name"))


@pytest.fixture
def noted(tmp_path):
    """A folder of a run that began with a file of records, one of questions and one to measure on."""
    for name in ("d.jsonl", "q.json", "e.jsonl"):
        (tmp_path / name).write_text(json.dumps({"id": name}))
    (tmp_path / "run").mkdir()
    for section in ("data", "eval"):
        run_settings.note_files(tmp_path / "run", config_for(tmp_path), section)
    fill(tmp_path / "run", [*CURATED, "round-0/evaluation.json"])
    return tmp_path


def config_for(folder):
    files = {"data.source": "d.jsonl", "data.questions": "q.json", "eval.data": "e.jsonl"}
    return load_config(None, [f"{key}={folder / name}" for key, name in files.items()])


def changed_of(folder):
    config = config_for(folder)
    return [
        path for section in ("data", "eval") for path in run_settings.changed_files(folder / "run", config, section)
    ]


@pytest.mark.parametrize("name", ["d.jsonl", "q.json", "e.jsonl"])
def test_a_file_that_changed_is_named(noted, name):
    assert changed_of(noted) == []
    os.utime(noted / name, (1, 1))
    assert changed_of(noted) == []
    text = (noted / name).read_text()
    (noted / name).write_text(text.replace("id", "ID"))  # as long
    os.utime(noted / name, (1, 1))
    assert changed_of(noted) == [str(noted / name)]
    (noted / name).write_text(text)
    assert changed_of(noted) == []
    (noted / name).unlink()
    assert changed_of(noted) == []


def test_files_may_move(noted):
    was = config_for(noted)
    moved = noted / "moved"
    moved.mkdir()
    for name in ("d.jsonl", "q.json", "e.jsonl"):
        (noted / name).rename(moved / name)
    assert changed_settings(noted / "run", was, config_for(moved)) == []
    (moved / "q.json").write_text("[]")
    assert changed_settings(noted / "run", was, config_for(moved)) == ["data.questions"]


def test_a_folder_of_files_is_all_of_them(tmp_path):
    (tmp_path / "d").mkdir()
    for number in range(2):
        (tmp_path / f"d/train-{number}.jsonl").write_text(f'{{"id": {number}}}')
    config = load_config(None, [f"data.source={tmp_path / 'd'}"])
    run_settings.note_files(tmp_path, config, "data")
    assert run_settings.changed_files(tmp_path, config, "data") == []
    (tmp_path / "d/train-2.jsonl").write_text('{"id": 2}')
    assert run_settings.changed_files(tmp_path, config, "data") == [str(tmp_path / "d")]
