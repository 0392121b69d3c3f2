"""The benchmark of the ops at tiny shapes: its lines, its gates, its tables and its picture."""

import json
import re
import subprocess
import sys

import pytest
import torch

from hermesflow import cli
from hermesflow.benchmarks import case, lines, measuring, op_cases, ops, peers, roofline
from hermesflow.kernels import registry
from hermesflow.runtime.files import InputError

PARTS = ("images", "questions", "answers", "pairs")
CASES = {*op_cases.BUILDERS, *(f"span_attention/{part}" for part in PARTS)}
LINE = {
    "bench": "ops", "case": "mask_topk", "shape": "B 64, N 1024", "dtype": "float32", "backend": "cpu",
    "baseline": "naive", "ms_p20": 0.9, "ms_p50": 1.0, "ms_p80": 1.2, "baseline_ms_p50": 4.0, "speedup": 4.0,
    "peak_mib": 0.0625, "baseline_peak_mib": 2.0, "gb_s": 0.393, "tflop_s": 0.000524, "roof_fraction": 0.0393,
    "device": "a CPU", "torch": "2.11.0", "triton": None, "commit": "0123456789", "date": "2025-01-01T00:00:00+00:00",
}  # fmt: skip


def bench(*arguments):
    return cli.main(["bench", "ops", "--shape", "tiny", "--no-test", *map(str, arguments)])


def test_every_op_on_every_backend_that_can_run(tmp_path, capsys):
    out = tmp_path / "lines.jsonl"
    assert bench("--baseline", "naive", "--out", out) == 0
    written = lines.read_lines(out)
    assert {line["case"] for line in written} == CASES
    for op, of_op in registry.backends().items():
        measured = {line["backend"] for line in written if line["case"].partition("/")[0] == op}
        here = {name for name, reason in of_op.items() if reason is None}
        # The others refuse tensors on the CPU.
        assert here & {"cpu", "torch"} <= measured <= here
    for line in written:
        assert tuple(line) == lines.FIELDS
        assert line["baseline"] == "naive"
        assert 0 < line["ms_p20"] <= line["ms_p50"] <= line["ms_p80"]
        assert line["speedup"] == pytest.approx(line["baseline_ms_p50"] / line["ms_p50"])
        assert line["peak_mib"] > 0 and line["baseline_peak_mib"] > 0
        assert line["gb_s"] > 0 and line["tflop_s"] > 0 and line["roof_fraction"] > 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in CASES)
    if not torch.cuda.is_available():
        assert "not measured: cuda: torch sees no CUDA device" in printed


def test_torch_compile_and_peers_are_baselines(monkeypatch, tmp_path, capsys):
    """torch.compile itself takes half a minute here; that what it returns is called is what can go wrong."""
    compiled = []

    def compile_nothing(function):
        return lambda *arguments, **options: compiled.append(function.__name__) or function(*arguments, **options)

    monkeypatch.setattr(torch, "compile", compile_nothing)
    out = tmp_path / "lines.jsonl"
    assert bench("--op", "token_logprob", "--backend", "torch", "--out", out) == 0
    assert [line["baseline"] for line in lines.read_lines(out)][:2] == ["naive", "compile"]
    assert set(compiled) == {"token_logprob"}
    if not torch.cuda.is_available():
        assert "not measured: liger: " in capsys.readouterr().out


def test_a_wrong_result_gives_no_number(monkeypatch, tmp_path, capsys):
    def shifted(*arguments, **options):
        token, logprob = op_cases.guided_sample_reference(
            *arguments, **{name: value for name, value in options.items() if name != "backend"}
        )
        return token.roll(1), logprob

    monkeypatch.setattr(op_cases, "guided_sample", shifted)
    out = tmp_path / "lines.jsonl"
    assert (
        bench("--op", "guided_sample", "--op", "mask_topk", "--backend", "torch", "--baseline", "naive", "--out", out)
        == 1
    )
    wrong, right = lines.read_lines(out)
    assert "tokens differ from the reference's" in wrong.pop("failed")
    assert tuple(wrong) == lines.FIELDS and all(wrong[name] is None for name in lines.MEASURED)
    assert right["case"] == "mask_topk" and right["ms_p50"] > 0
    assert "failed: " in capsys.readouterr().out


def test_a_kernel_that_raises_gives_no_number(monkeypatch, tmp_path):
    def broken(*arguments, **options):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(op_cases, "mask_topk", broken)
    out = tmp_path / "lines.jsonl"
    assert bench("--op", "mask_topk", "--backend", "torch", "--out", out) == 1
    assert lines.read_lines(out)[0]["failed"] == "RuntimeError: illegal memory access"


@pytest.mark.parametrize(("test", "code"), [("assert True", 0), ("assert False", 1)], ids=["pass", "fail"])
def test_the_ops_tests_come_first(test, code, monkeypatch, tmp_path):
    tests = tmp_path / "tests" / "kernels"
    tests.mkdir(parents=True)
    (tests / "test_mask_topk.py").write_text(f"def test_it():\n    {test}\n")
    monkeypatch.setattr(ops, "ROOT", tmp_path)
    settings = ops.Settings(
        shape="tiny", ops=["mask_topk"], backends=["torch"], baselines=["naive"], out=tmp_path / "lines.jsonl"
    )
    assert ops.run_ops(settings) == code
    (line,) = lines.read_lines(settings.out)
    assert line.get("failed") == (None if code == 0 else "test_mask_topk.py fails")
    assert (line["ms_p50"] is None) == bool(code)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "softmax"], "--op: expected .*, got 'softmax'"),
        (["--backend", "fpga"], "--backend: expected .*, got 'fpga'"),
        (["--baseline", "apex"], "--baseline: expected .*, got 'apex'"),
        (["--op", "mask_topk", "--out", "/dev/null/lines.jsonl"], "/dev/null"),
    ],
    ids=["op", "backend", "baseline", "out"],
)
def test_bad_arguments(arguments, message, capsys):
    assert bench(*arguments) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda(capsys):
    assert bench("--device", "cuda") == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
    assert bench("--op", "guided_sample", "--backend", "cuda") == 2
    assert "nothing could be measured (cuda: torch sees no CUDA device" in capsys.readouterr().err


def test_peak_memory_counts_temporaries_inside_an_op():
    x = torch.randn(64, 4096)
    peak = measuring.peak_bytes(lambda: torch.logsumexp(x, 1), torch.device("cpu"))
    assert x.nbytes <= peak < 3 * x.nbytes
    assert measuring.peak_bytes(lambda: x.mul_(1.0), torch.device("cpu")) < 1000


def test_wrong_values():
    truth = torch.linspace(-1, 1, 100, dtype=torch.float64)
    eager = truth.float()
    assert case.wrong_values("value", (eager,), (truth,), (eager,)) is None
    for wrong in (eager + 1e-5, torch.full_like(eager, float("nan"))):
        assert "above the budget" in case.wrong_values("value", (wrong,), (truth,), (eager,))


def test_wrong_draws():
    rows, token, logprob = torch.arange(8), torch.arange(8), torch.zeros(8)
    assert case.wrong_draws((token, logprob), (token, logprob), rows) is None
    assert "2 of 8" in case.wrong_draws((token.where(rows > 1, 99), logprob), (token, logprob), rows)
    for off in (0.1, float("nan")):
        assert "off by" in case.wrong_draws((token, logprob + off), (token, logprob), rows)


def test_flex_needs_cuda():
    with pytest.raises(peers.Unavailable, match="CUDA"):
        peers.flex_tree(torch.zeros(1), torch.zeros(1), torch.zeros(1), None)


def test_markdown_table(tmp_path, capsys):
    path = tmp_path / "lines.jsonl"
    failed = LINE | dict.fromkeys(lines.MEASURED) | {"backend": "torch", "baseline": None, "failed": "3 of 64 rows"}
    compiled = LINE | {"baseline": "compile", "baseline_ms_p50": 2.5, "speedup": 2.5}
    lines.write_lines(path, [LINE | {"ms_p50": 7.0}, LINE, compiled, failed])
    assert cli.main(["bench", "table", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "a CPU, torch 2.11.0, commit 0123456789, 2025-01-01",
        "",
        "| case | shape | backend | ms | of the roof | rate | peak MiB | naive | compile |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| mask_topk | B 64, N 1024, float32 | cpu | 1 | 3.9% | 0.393 GB/s | 0.0625 "
        "| 4x (4 ms, 2 MiB) | 2.5x (2.5 ms, 2 MiB) |",
        "| mask_topk | B 64, N 1024, float32 | torch | failed: 3 of 64 rows |  |  |  |  |  |",
    ]
    assert cli.main(["bench", "table", str(path), "--backend", "torch"]) == 0
    rows = capsys.readouterr().out.splitlines()[4:]
    assert len(rows) == 1 and "| torch |" in rows[0]


@pytest.mark.parametrize("text", ["{", "[1]", '{"bench": "ops"}'], ids=["damaged", "no_object", "no_benchmark"])
def test_damaged_lines(text, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps(LINE) + "\n" + text)
    with pytest.raises(InputError, match="line 2 is not"):
        lines.read_lines(path)


def test_roofline(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "roofline.png"
    bound = LINE | {"case": "linear_sample", "gb_s": 1.0, "tflop_s": 0.05, "roof_fraction": 0.5}
    roofline.plot_roofline([LINE, bound, LINE | dict.fromkeys(lines.MEASURED)], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="nothing was measured"):
        roofline.plot_roofline([], path)


def test_roofline_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setattr(roofline.importlib.util, "find_spec", lambda name: None)
    assert bench("--op", "mask_topk", "--plot", "roofline.png") == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_the_command_line_loads_no_benchmark_for_its_help():
    code = "import sys; from hermesflow import cli; cli.make_parser(); sys.exit('hermesflow.benchmarks' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_a_profile_of_each_case_and_backend(tmp_path, capsys):
    assert bench("--op", "span_attention", "--backend", "torch", "--baseline", "naive", "--profile", tmp_path) == 0
    names = {f"span_attention-{case}-torch" for case in ("images", "questions", "answers", "pairs")}
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}{end}" for name in names for end in (".txt", ".json.gz")
    }
    assert re.search(r"% +[0-9]+ x +aten::", (tmp_path / "span_attention-images-torch.txt").read_text())
    assert "span_attention-pairs-torch: " in capsys.readouterr().out
