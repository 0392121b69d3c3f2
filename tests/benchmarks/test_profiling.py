"""Profiles: the engine's phases in them, and reports of Nsight Compute."""

import re

import pytest
import torch

from hermesflow.benchmarks import profiling
from hermesflow.engine import phases
from hermesflow.runtime.files import InputError

# Of the layout that `ncu --csv --page raw` prints: what the program and ncu print, names, units, a row a launch.
NCU = """==PROF== Connected to process 1234 (/usr/bin/python3.12)
copy 4.3 TB/s
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed","gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",\
"gpu__time_duration.sum","launch__registers_per_thread","sm__throughput.avg.pct_of_peak_sustained_elapsed",\
"sm__warps_active.avg.pct_of_peak_sustained_active"
"","","","","","","","","","","","%","%","us","register/thread","%","%"
"0","1234","python3.12","127.0.0.1","guided_sample_kernel","1","7","(256, 1, 1)","(16384, 1, 1)","0","9.0",\
"91.25","90.50","1,205.44","64","55.10","48.20"
"1","1234","python3.12","127.0.0.1","_forward_kernel","1","7","(256, 1, 1)","(144, 32, 1)","0","9.0",\
"35.00","10.00","310.00","127","71.50","24.10"
"2","1234","python3.12","127.0.0.1","mask_topk_kernel","1","7","(512, 1, 1)","(64, 1, 1)","0","9.0",\
"3.00","n/a","4.10","40","2.50",""
""".replace("\\\n", "")


def test_reports_of_nsight_compute(tmp_path):
    path = tmp_path / "ops.csv"
    path.write_text(NCU)
    sampler, attention, mask = profiling.read_ncu(path)
    assert sampler == profiling.KernelReport(
        kernel="guided_sample_kernel", seconds=pytest.approx(1205.44e-6), memory=91.25, dram=90.5, compute=55.1,
        occupancy=48.2, registers=64,
    )  # fmt: skip
    assert [one.limiter for one in (sampler, attention, mask)] == ["memory", "compute", "latency"]
    assert mask.dram is None and mask.occupancy is None
    rows = profiling.ncu_table([sampler, attention, mask]).splitlines()
    assert rows[1].split() == ["1205.4", "91.2", "90.5", "55.1", "memory", "64", "48.2", "guided_sample_kernel"]
    assert rows[3].split() == ["4.1", "3.0", "-", "2.5", "latency", "40", "-", "mask_topk_kernel"]


@pytest.mark.parametrize("text", ["", "no kernels were profiled\n"], ids=["empty", "no_table"])
def test_what_is_no_report(text, tmp_path):
    path = tmp_path / "ops.csv"
    path.write_text(text)
    with pytest.raises(InputError, match="no table of Nsight Compute; make one: ncu --csv"):
        profiling.read_ncu(path)


def test_a_report_without_ncu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="ncu is not found"):
        profiling.read_ncu(tmp_path / "ops.ncu-rep")


def test_phases_are_ranges_while_something_records(tmp_path):
    def work():
        for name in ("prefill", "step", "step", "head"):
            with phases.phase(name):
                torch.ones(64, 64) @ torch.ones(64, 64)

    table = profiling.write_profile("work", work, torch.device("cpu"), tmp_path)
    own, _, of_phases = table.partition("phases\n")
    assert re.findall(r"%  ([a-z]+)$", of_phases, re.M) == ["prefill", "step", "head", "elsewhere"]
    assert "aten::" in own and "step" not in own
    assert phases.phase("step") is phases.phase("head")  # nothing records: nothing is made
    with pytest.raises(AssertionError):
        phases.phase("sleep")


def test_phases_under_nsight(monkeypatch):
    names = []
    monkeypatch.setattr(phases, "_is_under_nsight", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range", names.append)
    phases.phase("judge")
    assert names == ["judge"]
