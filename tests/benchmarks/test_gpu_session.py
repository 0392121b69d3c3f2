"""benchmarks/gpu_session.sh with a stand-in of Python: what fails, hangs or has no time leaves the rest alone."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from hermesflow import cli
from hermesflow.benchmarks.ops import ops_of

ROOT = Path(__file__).parents[2]
LINE = '{"case": "a case"}'
# Writes its arguments, and a line where --out says; the check of mask_topk crashes, plain images hang.
STAND_IN = f"""#!/bin/bash
printf '%q ' "$@" >>"$CALLS"; echo >>"$CALLS"
previous=
for argument in "$@"; do
    [ "$previous" != --out ] || echo '{LINE}' >"$argument"
    previous=$argument
done
case "$*" in
*every_op*mask_topk*) echo "illegal memory access"; exit 134 ;;
*images*--plain*) sleep 60 ;;
esac
"""


@pytest.fixture
def session(tmp_path):
    """Runs parts of the session: its exit code, its summary by step, the calls of Python, and its folder."""
    python, calls, out = tmp_path / "python", tmp_path / "calls", tmp_path / "out"
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def run(*parts, **environment):
        environment |= {"PYTHON": str(python), "CALLS": str(calls), "OUT": str(out), "DEVICE": "cpu"}
        command = [str(ROOT / "benchmarks/gpu_session.sh"), *parts]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
        rows = [line.split(maxsplit=5) for line in done.stdout.splitlines() if line[:5].strip().isdigit()]
        summary = {row[2]: row[5] for row in rows if row[1:2] == ["s"] and len(row) == 6}
        return done.returncode, summary, [shlex.split(line) for line in calls.read_text().splitlines()], out

    return run


def test_all_parts(session):
    code, summary, _, out = session(LIMIT="12")
    assert code == 1
    assert {f"check-{op}" for op in ops_of("tiny")} <= set(summary)
    assert summary["check-mask_topk"] == "failed, exit code 134" and summary["check-pair_dpo"] == "ok"
    assert summary["images-fused"] == "ok" and summary["images-plain"].startswith("cut after ")
    later = ("decoding", "attention-blocks", "ops-guided_sample", "loss", "train", "tests-mask_topk")
    assert {summary[name] for name in later} == {"left out: no time"}
    # A step that is cut keeps what it has measured.
    assert (out / "lines.jsonl").read_text().splitlines() == [LINE] * 3
    assert "illegal memory access" in (out / "session.log").read_text()


def test_parts_by_name(session):
    code, summary, calls, _ = session("check", "attention", "ops", "loss", "train", "suspects", "e2e", "drop-in")
    assert code == 1
    assert [name for name in summary if name.startswith("tests-")] == ["tests-mask_topk"]
    assert {result for name, result in summary.items() if name != "check-mask_topk"} == {"ok"}
    benches = [call[call.index("hermesflow") + 1 :] for call in calls if "bench" in call and "table" not in call]
    assert {bench[1] for bench in benches} == {"ops", "train", "e2e", "drop-in"}
    for bench in benches:
        cli.make_parser().parse_args(bench)


def test_an_unknown_part(session, tmp_path):
    (tmp_path / "calls").write_text("")
    code, summary, calls, _ = session("everything")
    assert code == 2 and not summary and not calls
