"""Data at scale: a million records start soon, in flat memory; workers that keep dying make what one process makes."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from hermesflow.worlds import shapes

NUM_RECORDS, NUM_CURATED = 1_000_000, 100_000
START_SECONDS, MORE_MIB = 60, 200
KILL_SECONDS, LIMIT_SECONDS = 20, 3000
SETTINGS = (
    "model.device=cpu", "selfplay.num_rounds=1", "curation.num_images=2", "curation.num_steps=1",
    "curation.guidance_scale=0", "curation.caption_temperatures=[1]", "curation.caption_top_k=[0]",
    "curation.threshold=0", "curation.margin=0", "curation.keep=any", "run.name=t",
)  # fmt: skip


@pytest.fixture
def model_folder(tiny_model, tmp_path):
    """The smallest model, whose captions end early."""
    with torch.no_grad():
        tiny_model.transformer.norm.bias[0] = 1
        tiny_model.transformer.head.weight[tiny_model.layout.eot, 0] = 12
    tiny_model.save(tmp_path / "model")
    return tmp_path / "model"


def write_data(path: Path, count: int) -> None:
    """Scenes of the built-in world as JSON lines, each with codes and questions of its own record."""
    scenes, rng = shapes.sample_scenes("train", 2000, 0), np.random.default_rng(0)
    records = [shapes.make_record(scene, "", np.random.default_rng(scene.seed)) for scene in scenes]
    kept = [
        {"caption": record.caption, "category": record.category, "questions": [
            {"question": item.question, "choices": item.choices, "answer": item.answer,
             "element_type": item.element_type, "element": item.element} for item in record.questions]}
        for record in records
    ]  # fmt: skip
    with path.open("w") as file:
        for number, row in zip(range(count), itertools.cycle(kept), strict=False):
            row = {"id": f"rec-{number:07d}", "codes": rng.integers(0, 32, 16).tolist()} | row
            file.write(json.dumps(row) + "\n")


def start(model: Path, data: Path, folder: Path, *more: str) -> subprocess.Popen:
    settings = (*SETTINGS, f"model.name={model}", f"data.source={data}", f"run.folder={folder}", *more)
    arguments = [item for setting in settings if not setting.startswith("--") for item in ("--set", setting)]
    options = [setting for setting in settings if setting.startswith("--")]
    environment = os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "hermesflow", "curate", *arguments, *options], env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def seconds_until(path: Path, pattern: str, processes: list[subprocess.Popen]) -> tuple[float, float]:
    """(seconds until a file is there, the most MiB that one of the processes had)."""
    began, most = time.monotonic(), 0.0
    while not any(path.glob(pattern)):
        assert all(process.poll() is None for process in processes), processes[0].stderr.read()
        most = max(most, *(peak_mib(process.pid) for process in processes))
        time.sleep(0.1)
    return time.monotonic() - began, most


def peak_mib(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM")
def test_a_million_records_start_soon_and_in_flat_memory(model_folder, tmp_path):
    """Two workers go through the data until the first candidates are there; a later process starts at once."""
    write_data(tmp_path / "data.jsonl", NUM_RECORDS)
    found = {}
    for count in (NUM_RECORDS // 50, NUM_RECORDS):
        options = (f"data.num_records={count}", "curation.batch_records=100", f"run.name=of-{count}", "--worker")
        workers = [start(model_folder, tmp_path / "data.jsonl", tmp_path, *options) for _ in range(2)]
        first = seconds_until(tmp_path, f"of-{count}/round-1/candidates/part-*.parquet", workers)
        for worker in workers:
            kill(worker)
        made = len(list(tmp_path.glob(f"of-{count}/round-1/candidates/part-*.parquet")))
        late = start(model_folder, tmp_path / "data.jsonl", tmp_path, *options[:3])
        again = seconds_until(tmp_path, f"of-{count}/round-1/candidates/part-{made + 2:05d}.parquet", [late])
        kill(late)
        found[count] = first, again
        print(f"{count} records: first start {first[0]:.0f} s, at most {first[1]:.0f} MiB; "
              f"later {again[0]:.0f} s, {again[1]:.0f} MiB")  # fmt: skip
    (small_first, small_again), (first, again) = found.values()
    assert first[0] < START_SECONDS and again[0] < START_SECONDS / 3
    assert first[1] - small_first[1] < MORE_MIB and again[1] - small_again[1] < MORE_MIB


@pytest.mark.soak
def test_workers_that_keep_dying_make_what_one_process_makes(model_folder, tmp_path):
    """Three workers; every 20 seconds one is killed and another started, and the third joins late."""
    write_data(tmp_path / "data.jsonl", NUM_CURATED)
    options = (f"data.num_records={NUM_CURATED}", "curation.batch_records=250")
    one, many = (tmp_path / name for name in ("one", "many"))
    began = time.monotonic()
    alone = start(model_folder, tmp_path / "data.jsonl", one, *options)
    assert alone.wait(LIMIT_SECONDS) == 0, alone.stderr.read()
    seconds_alone, began, num_killed = time.monotonic() - began, time.monotonic(), 0

    def worker() -> subprocess.Popen:
        return start(model_folder, tmp_path / "data.jsonl", many, *options, "--worker")

    workers, killed_at = [worker(), worker()], began
    while all(each.poll() is None for each in workers):
        assert time.monotonic() - began < LIMIT_SECONDS
        if time.monotonic() - killed_at >= KILL_SECONDS:
            if len(workers) < 3:
                workers.append(worker())  # late
            kill(workers.pop(0))
            workers.append(worker())
            num_killed, killed_at = num_killed + 1, time.monotonic()
        time.sleep(0.2)
    for each in workers:
        assert each.wait(LIMIT_SECONDS) == 0, each.stderr.read()
    seconds = time.monotonic() - began
    join = start(model_folder, tmp_path / "data.jsonl", many, *options)
    assert join.wait(LIMIT_SECONDS) == 0, join.stderr.read()
    names = [path.relative_to(one) for path in sorted(one.rglob("*.parquet"))]
    assert names == [path.relative_to(many) for path in sorted(many.rglob("*.parquet"))]
    assert len(names) == NUM_CURATED // 250 + 4
    assert not [name for name in names if (one / name).read_bytes() != (many / name).read_bytes()]
    print(
        f"{NUM_CURATED} records: one process {seconds_alone:.0f} s; three workers {seconds:.0f} s, {num_killed} kills"
    )
    assert num_killed
