"""The benchmark of the published class's methods before and after: its gate, its lines, its options."""

import re
import shutil
import sys

import pytest
import torch

from hermesflow import cli
from hermesflow.benchmarks import accelerated, lines
from hermesflow.benchmarks.measuring import Effort
from hermesflow.drop_in.published import AcceleratedMethod
from hermesflow.drop_in.showo import SHOWO

EXTRA = {"mfu", "items_per_s"}


@pytest.fixture(autouse=True)
def no_checkout(monkeypatch):
    for name in ("models", *accelerated.MODULES.values()):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture(autouse=True)
def one_round(monkeypatch):
    monkeypatch.setattr(accelerated, "EFFORT", Effort(seconds=0.0, min_rounds=1))


def bench(*arguments):
    return cli.main(["bench", "drop-in", "--shape", "tiny", *map(str, arguments)])


@pytest.mark.parametrize("family, cases", [("showo", accelerated.CASES), ("mmada", accelerated.CASES[:2])])
def test_every_case(tmp_path, capsys, family, cases):
    out = tmp_path / "lines.jsonl"
    assert bench("--family", family, "--out", out) == 0
    written = lines.read_lines(out)
    assert [line["case"] for line in written] == list(cases)
    for line in written:
        assert set(line) == {*lines.FIELDS, *EXTRA} and line["baseline"] == "stand-in"
        assert line["speedup"] > 0 and line["tflop_s"] > 0 and 0 < line["roof_fraction"] < 1
    shown = capsys.readouterr().out
    assert all(case in shown for case in cases)


def test_both_sides_run_what_they_say():
    showo = accelerated.load_class(accelerated.STAND_INS["showo"])
    calls = accelerated.Calls(showo, "tiny", torch.device("cpu"), torch.float32)
    calls._side = "accelerated"
    assert isinstance(calls._method(calls.policy, "t2i_generate"), AcceleratedMethod)
    calls._side = "original"
    assert calls._method(calls.policy, "t2i_generate").__func__ is showo.t2i_generate


@pytest.mark.parametrize("case", accelerated.CASES)
def test_a_wrong_result_is_not_measured(case, monkeypatch, capsys, tmp_path):
    name = "loss_for_unidpo" if case == "pair_dpo_step" else case
    right = SHOWO.fast[name]

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        if name == "t2i_generate":
            return result * 0
        return [token * 0 for token in result] if name == "mmu_generate" else tuple(value * 1.01 for value in result)

    monkeypatch.setitem(SHOWO.fast, name, wrong)
    out = tmp_path / "lines.jsonl"
    assert bench("--case", case, "--out", out) == 1
    assert f"not measured: {case}: " in capsys.readouterr().out and lines.read_lines(out) == []


def test_the_class_of_a_checkout(tmp_path):
    shutil.copytree(accelerated.STAND_INS["showo"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "models" / "__init__.py").write_text("raise ImportError('a package that is not installed')\n")
    out = tmp_path / "lines.jsonl"
    assert bench("--code", tmp_path, "--case", "mmu_generate", "--out", out) == 0
    assert lines.read_lines(out)[0]["baseline"] == "published"


def test_an_installed_package_asks_for_a_checkout(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(accelerated.STAND_INS, "showo", tmp_path / "showo_stand_in")
    assert bench() == 2
    assert "drop-in: the stand-in of the published class is not installed; give --code" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--code", "nowhere"], "nowhere: no models.modeling_showo.Showo can be imported"),
        (["--case", "images"], "--case: expected mmu_generate, pair_dpo_step, t2i_generate, got 'images'"),
    ],
)
def test_bad_options_are_named(arguments, message, capsys):
    assert bench(*arguments) == 2
    assert re.search(re.escape(message), capsys.readouterr().err)
