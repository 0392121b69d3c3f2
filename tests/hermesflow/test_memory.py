"""Host memory over a long curation: `make soak` takes 100,000 records, the usual tests 1,500."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hermesflow.runtime.files import read_parquet

BATCH = 100
SETTINGS = (
    f"curation.batch_records={BATCH}", "curation.num_images=2", "curation.num_steps=1", "curation.guidance_scale=0",
    "curation.caption_temperatures=[1]", "curation.caption_top_k=[0]", "curation.threshold=0", "curation.margin=0",
    "curation.keep=any", "selfplay.num_rounds=1", "run.name=t",
)  # fmt: skip
# oneDNN keeps the code of the last 1,024 shapes that it met, which hides what a record leaves behind until it is full:
# both tests do without it. The usual test also asks one question of one length.
# malloc keeps free blocks among those in use; with these settings it gives them back, so that what is left is in use.
IN_USE = {
    "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072", "MKL_DISABLE_FAST_MM": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "OMP_NUM_THREADS": "1",
}  # fmt: skip
CHILD = """
import sys
from hermesflow import cli
{}
sys.exit(cli.main(sys.argv[1:]))
"""
WITHOUT_ONEDNN = """
from hermesflow.kernels import matmul
matmul._takes_onednn = lambda a: False
"""
FEW_SHAPES = """
from hermesflow.worlds import shapes
shapes.record_questions = lambda scene, text: (shapes._about_background(scene),)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmRSS")
@pytest.mark.parametrize(
    ("num_records", "setup"),
    [(1_500, WITHOUT_ONEDNN + FEW_SHAPES), pytest.param(100_000, WITHOUT_ONEDNN, marks=pytest.mark.soak)],
    ids=["usual", "soak"],
)
def test_host_memory_stays_flat(tiny_model, tmp_path, num_records, setup):
    with torch.no_grad():  # captions end early
        tiny_model.transformer.norm.bias[0] = 1
        tiny_model.transformer.head.weight[tiny_model.layout.eot, 0] = 12
    tiny_model.save(tmp_path / "model")
    more = (f"model.name={tmp_path / 'model'}", f"run.folder={tmp_path}", f"data.num_records={num_records}")
    arguments = [item for setting in (*SETTINGS, *more) for item in ("--set", setting)]
    command = [sys.executable, "-P", "-c", CHILD.format(setup), "curate", *arguments]
    process = subprocess.Popen(command, env=os.environ | IN_USE)
    began, samples = time.monotonic(), []
    round_folder = tmp_path / "t/round-1"
    while process.poll() is None:
        num_parts = sum(1 for _ in round_folder.glob("candidates/part-*.parquet"))
        samples.append((num_parts * BATCH / num_records, resident_mib(process.pid), time.monotonic() - began))
        time.sleep(0.02 if num_records < 10_000 else 2)
    assert process.returncode == 0
    assert len(read_parquet(round_folder / "pairs.parquet", ["record_id"])) > num_records / 10
    # The least of each: within a batch memory rises and falls by as much as may stay behind.
    third, end = (min(mib for done, mib, _ in samples if low <= done < high) for low, high in ((0.33, 0.5), (0.9, 1)))
    print(f"{num_records} records: {third:.1f} MiB after a third, {end:.1f} MiB at the end, {samples[-1][2]:.0f} s")
    # A record and its candidates are some 10 KB of Python objects: one in ten that stayed would show.
    assert end - third < 8


def resident_mib(pid: int) -> float:
    """VmRSS of a process; 0 when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found[1]) / 1024 if found else 0.0
