import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from hermesflow import kernels
from hermesflow.kernels import checks, registry
from hermesflow.kernels.philox import RandomKey


def refuse_negative(value):
    return "value is negative" if value < 0 else None


@pytest.fixture
def op(monkeypatch):
    """guided_sample with two backends of our own: "fast" refuses negative values, "plain" those above 9."""
    monkeypatch.setattr(registry, "_registered", {})
    registry.register("guided_sample", "fast", "math:sqrt", refuse_negative)
    registry.register("guided_sample", "plain", "builtins:abs", lambda value: "value is large" if value > 9 else None)
    return "guided_sample"


def test_first_that_can_run(op):
    assert registry.dispatch(op, None, 4) == 2
    assert registry.dispatch(op, None, -4) == 4


def test_named_backend_runs_or_raises(op):
    assert registry.dispatch(op, "plain", 4) == 4
    with pytest.raises(registry.BackendError, match="guided_sample cannot run on backend 'fast'.*value is negative"):
        registry.dispatch(op, "fast", -4)
    with pytest.raises(registry.BackendError, match="backend 'cudnn'.*has the backends fast, plain"):
        registry.dispatch(op, "cudnn", 4)


def test_nothing_can_run(op):
    registry.register(op, "fast", "math:sqrt", lambda value: "never")
    with pytest.raises(registry.BackendError, match="no backend of guided_sample .*fast: never; plain: value is large"):
        registry.dispatch(op, None, 10)


def test_explain(op):
    assert registry.explain(op, -1) == [("fast", "value is negative"), ("plain", None)]


@pytest.mark.parametrize("value", ["plain", "guided_sample=plain", "mask_topk=cpu, guided_sample=plain"])
def test_environment_names_the_backend(op, monkeypatch, value):
    monkeypatch.setenv("HERMESFLOW_BACKEND", value)
    assert registry.dispatch(op, None, 4) == 4
    assert registry.dispatch(op, "fast", 4) == 2


@pytest.mark.parametrize("value", ["", "mask_topk=cpu"])
def test_environment_speaks_of_other_ops(op, monkeypatch, value):
    monkeypatch.setenv("HERMESFLOW_BACKEND", value)
    assert registry.dispatch(op, None, 4) == 2


def test_environment_names_a_backend_that_cannot_run(op, monkeypatch):
    monkeypatch.setenv("HERMESFLOW_BACKEND", "fast")
    with pytest.raises(registry.BackendError, match="value is negative"):
        registry.dispatch(op, None, -4)
    monkeypatch.setenv("HERMESFLOW_BACKEND", "cuda")
    with pytest.raises(registry.BackendError, match="has the backends fast, plain"):
        registry.dispatch(op, None, 4)


@pytest.mark.parametrize("value", ["guided_smaple=plain", "guided_sample=plain,fast", "guided_sample="])
def test_environment_that_is_no_choice(op, monkeypatch, value):
    monkeypatch.setenv("HERMESFLOW_BACKEND", value)
    with pytest.raises(registry.BackendError, match="HERMESFLOW_BACKEND: expected"):
        registry.dispatch(op, None, 4)


def test_environment_refusal_comes_before_the_arguments(op, monkeypatch):
    monkeypatch.setitem(registry.ENVIRONMENT_CHECKS, "fast", lambda: "no such machine")
    assert registry.explain(op, -1)[0] == ("fast", "no such machine")
    assert registry.dispatch(op, None, 4) == 4


def test_every_op_has_a_reference_that_runs_everywhere():
    found = registry.backends()
    assert list(found) == list(kernels.OPS)
    for op, backends in found.items():
        assert backends["torch"] is None, op
    assert {"cpu", "triton"} <= found["guided_sample"].keys() and "cpu" in found["mask_topk"]


def test_registered_targets_exist():
    registry.backends()
    for backends in registry._registered.values():
        for backend in backends.values():
            module, function = backend.target.split(":")
            source = importlib.util.find_spec(module).origin
            assert f"def {function}(" in Path(source).read_text()


def test_public_import_does_not_load_the_backends():
    code = (
        "import sys, hermesflow.kernels.guided_sample;"
        "print([name for name in sys.modules if name.endswith(('_triton', 'extension_ops')) and 'hermesflow' in name])"
    )
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_extension_is_built_where_it_can_be():
    """A quiet fall to the torch backends would hide a broken build."""
    if not shutil.which("c++") or not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("no C++ compiler or no Python headers here")
    assert checks.extension_missing() is None


def test_top_level_import_is_refused():
    spec = importlib.util.spec_from_file_location("kernels", kernels.__file__)
    with pytest.raises(ImportError, match="import hermesflow.kernels instead"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_check_tensor_messages():
    tensor = torch.zeros(2, 3)
    checks.check_tensor("op", "x", tensor, "[R, V]", (None, 3), dtypes=(torch.float32,), device=tensor.device)
    with pytest.raises(ValueError, match=r"^op: expected x \[R\], got float32 \[2, 3\] on cpu$"):
        checks.check_tensor("op", "x", tensor, "[R]", (None,))
    with pytest.raises(ValueError, match=r"expected x \[R, V\] = \[2, 4\], got"):
        checks.check_tensor("op", "x", tensor, "[R, V]", (2, 4))
    with pytest.raises(ValueError, match="expected x int64 or bool "):
        checks.check_tensor("op", "x", tensor, "[R, V]", (2, 3), dtypes=(torch.int64, torch.bool))
    with pytest.raises(ValueError, match="on meta, got float32 .* on cpu"):
        checks.check_tensor("op", "x", tensor, "[R, V]", (2, 3), device=torch.device("meta"))


def test_check_key_messages():
    rows = torch.zeros(3, dtype=torch.int64)
    for step in (rows, rows[0]):
        checks.check_key("op", RandomKey(rows, step, rows), 3, rows.device)
    with pytest.raises(ValueError, match=r"key.seed int64 \[R\] = \[2\]"):
        checks.check_key("op", RandomKey(rows, rows, rows), 2, rows.device)
    with pytest.raises(ValueError, match="key.step int64"):
        checks.check_key("op", RandomKey(rows, rows.float(), rows), 3, rows.device)
    with pytest.raises(ValueError, match="key.position int64"):
        checks.check_key("op", RandomKey(rows, rows, rows[:2]), 3, rows.device)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5])
def test_check_number_messages(value):
    checks.check_number("op", "temperature", 0.0, minimum=0)
    with pytest.raises(ValueError, match="op: expected temperature to be a finite number of at least 0, got"):
        checks.check_number("op", "temperature", value, minimum=0)


@pytest.mark.parametrize(
    ("capability", "targets", "expected"),
    [
        ((8, 0), "sm_80 sm_90a", True),
        ((8, 9), "sm_80 sm_90a", True),
        ((9, 0), "sm_80 sm_90a", True),
        ((9, 0), "sm_80", False),
        ((10, 0), "sm_80 sm_90a", False),
        ((10, 3), "sm_100", True),
        ((12, 0), "sm_80 sm_90a sm_100", False),
        ((12, 0), "sm_100+PTX", True),
        ((7, 5), "sm_80+PTX", False),
        ((9, 0), "Hopper", True),
    ],
)
def test_code_for_a_gpu(capability, targets, expected):
    assert checks.has_code_for(capability, targets) == expected
