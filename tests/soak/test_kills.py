"""A hundred SIGKILLs at random moments of self-play runs: each ends with the undisturbed run's files, bit for bit."""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from hermesflow.models import load_model
from hermesflow.runtime.metric_log import TIMINGS

NUM_KILLS, LIMIT_SECONDS, SEED = 100, 3000, 0
SETTINGS = (
    "selfplay.num_rounds=2", "data.num_records=16", "curation.num_images=4", "curation.num_steps=3",
    "curation.threshold=0", "curation.margin=0", "curation.keep=any", "curation.batch_records=2",
    "curation.caption_top_k=[4]", "train.num_steps=12", "train.pairs_per_step=4", "train.checkpoint_every=4",
    "train.holdout_pairs=2", "train.holdout_every=6", "train.condition_dropout=0.1", "eval.num_prompts=16",
    "eval.num_understanding=16", "eval.num_steps=3", "run.name=t",
)  # fmt: skip
# Each run's first kill comes soon after one of these appears, since random moments miss what is short: the reference,
# checkpoints, the saving of the model, evaluation. All others come at a uniform moment of what a third of the run takes
# behind its start: later ones would mostly find that a restart, which has less to do than a whole run, is done.
AIMS = ("round-1/rejected.parquet", "round-1/training.json", "round-2/train/step-000004", "round-1/model",
        "config.toml", "round-2/training.json")  # fmt: skip
AIMED_SECONDS = 0.3


@pytest.mark.soak
def test_runs_that_are_killed_end_like_the_undisturbed_one(tmp_path, untrained_model):
    draw, began = random.Random(SEED), time.monotonic()
    settings = [*SETTINGS, f"model.name={untrained_model}"]
    whole = start(settings, tmp_path / "whole")
    while not (tmp_path / "whole/t/config.toml").exists() and whole.poll() is None:
        time.sleep(0.01)
    startup = time.monotonic() - began
    assert whole.wait(LIMIT_SECONDS) == 0
    duration = time.monotonic() - began
    expected = contents(tmp_path / "whole/t")
    killed, num_finished = Counter(), 0
    while killed.total() < NUM_KILLS:
        folder, code = tmp_path / f"run-{num_finished}", None
        aim = folder / "t" / AIMS[num_finished % len(AIMS)]
        while code is None:
            check_time(began, killed, num_finished)
            process = start(settings, folder)
            if killed.total() == NUM_KILLS:
                code = process.wait(LIMIT_SECONDS)
            elif aim is not None:
                while not aim.exists() and process.poll() is None:
                    time.sleep(0.002)
                code, aim = kill_after(process, draw.uniform(0, AIMED_SECONDS)), None
            else:
                code = kill_after(process, draw.uniform(startup, startup + (duration - startup) / 3))
            if code is None:
                killed[phase(folder / "t")] += 1
        assert code == 0, f"a restart after {killed.total()} kills ended with exit code {code}: {folder / 'log'}"
        found = contents(folder / "t")
        assert found.keys() == expected.keys()
        assert not [name for name in expected if found[name] != expected[name]]
        num_finished += 1
    check_time(began, killed, num_finished)
    message = ", ".join(f"{count} in {name}" for name, count in sorted(killed.items()))
    print(
        f"undisturbed run {duration:.0f} s; {killed.total()} kills ({message}); {num_finished} runs finished; "
        f"{time.monotonic() - began:.0f} s in all"
    )


@pytest.fixture
def untrained_model(tmp_path):
    """The built-in model with its head's weights halved: it draws and answers with more errors."""
    model = load_model("tiny")
    model.transformer.head.weight.data.mul_(0.5)
    model.save(tmp_path / "model")
    return tmp_path / "model"


def start(settings: list[str], folder: Path) -> subprocess.Popen:
    arguments = [item for setting in (*settings, f"run.folder={folder}") for item in ("--set", setting)]
    command = [sys.executable, "-m", "hermesflow", "selfplay", *arguments]
    folder.mkdir(exist_ok=True)
    with (folder / "log").open("a") as log:
        return subprocess.Popen(command, env=os.environ | {"PYTHONSAFEPATH": "1"}, stdout=log, stderr=log)


def kill_after(process: subprocess.Popen, seconds: float) -> int | None:
    """Kills a process unless it ends before; returns its exit code if it did."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def check_time(began: float, killed: Counter, num_finished: int) -> None:
    seconds = time.monotonic() - began
    assert seconds < LIMIT_SECONDS, (
        f"{killed.total()} of {NUM_KILLS} kills and {num_finished} runs took {seconds:.0f} s, more than "
        f"{LIMIT_SECONDS}; make SETTINGS smaller, or run it on an idle machine"
    )


def phase(run: Path) -> str:
    """What the run was at when it was killed."""
    if (run / "summary.json").exists():
        return "report"
    if not (run / "round-0/evaluation.json").exists():
        return "first evaluation"
    for number in (1, 2):
        folder = run / f"round-{number}"
        if not (folder / "rejected.parquet").exists():
            return "curation"
        if not (folder / "training.json").exists():
            return "training" if (folder / "train/metrics.jsonl").exists() else "reference"
        if not (folder / "model").exists():
            return "saving"
        if not (folder / "evaluation.json").exists():
            return "evaluation"
    return "report"


def contents(run: Path) -> dict[str, object]:
    """What must be alike, by file; of files with timings in them only that they are there."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_dir() or name == ".lock" or path.name == "seconds.json":
            continue
        if path.suffix == ".html":
            found[name] = "a page"
        elif name == "summary.json":
            found[name] = json.loads(path.read_text())
            del found[name]["settings"]["run"]["folder"]
            for metrics in (found[name]["before"], *found[name]["rounds"]):
                del metrics["seconds"]
        elif path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{key: line[key] for key in line if key not in TIMINGS} for line in lines]
        elif path.suffix == ".parquet":
            table = pq.read_table(path)
            found[name] = (table.schema, table.schema.metadata, table.to_pylist())
        elif path.suffix == ".safetensors":
            found[name] = {key: (str(a.dtype), a.shape, a.tobytes()) for key, a in load_file(path).items()}
        elif path.name == "manifest.json":  # safetensors writes its metadata in any order, which its CRC shows
            found[name] = [(file, size) for file, size, _ in json.loads(path.read_text())]
        elif name == "config.toml":
            found[name] = [line for line in path.read_text().splitlines() if not line.startswith("folder = ")]
        else:
            found[name] = path.read_bytes()
    return found
