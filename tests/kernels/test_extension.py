"""When the extension is compiled at its first use, and what is said where it cannot be; .ci/check-install does it."""

import importlib.machinery
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from hermesflow.kernels import checks, extension


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A stand-in that writes an empty library, or fails; the calls that it got."""

    def load(name, sources, *, build_directory, **options):
        assert not Path(build_directory, "lock").exists()  # torch would wait for it for ever
        load.calls.append({"name": name, "sources": [Path(source).name for source in sources], **options})
        if load.fails:
            raise RuntimeError("Error building extension\nundeclared identifier")
        Path(build_directory, f"{name}.so").touch()

    load.calls, load.fails = [], False
    monkeypatch.setattr(cpp_extension, "load", load)
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv(extension.SWITCH, raising=False)
    monkeypatch.setattr(extension, "missing_tool", lambda: None)
    return load


def sources():
    return sorted((Path(extension.__file__).parents[1] / "csrc/cpu").glob("*.cpp"))


def test_it_is_compiled_once(compiler, caplog):
    library = extension._compiled("cpu", sources())
    assert library.exists() and library.stem == compiler.calls[0]["name"] == library.parent.name
    assert compiler.calls[0]["sources"] == [path.name for path in sources()] and not compiler.calls[0]["with_cuda"]
    assert compiler.calls[0]["extra_cflags"] == extension.COMPILE_ARGS
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert extension._compiled("cpu", sources()) == library and len(compiler.calls) == 1


def test_another_torch_compiles_its_own(compiler, monkeypatch):
    one = extension._compiled("cpu", sources())
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert extension._compiled("cpu", sources()) != one and len(compiler.calls) == 2


def test_a_compilation_that_was_killed_is_begun_anew(compiler):
    folder = extension._compiled("cpu", sources()).parent
    (folder / f"{folder.name}.so").unlink()
    (folder / "build" / "lock").touch()
    assert extension._compiled("cpu", sources()).exists() and len(compiler.calls) == 2


def test_a_failure_is_told_and_not_tried_again(compiler):
    compiler.fails = True
    with pytest.raises(ImportError, match="C.. kernels do not compile .RuntimeError: Error building extension.; .*txt"):
        extension._compiled("cpu", sources())
    with pytest.raises(ImportError, match="do not compile .*; remove .* to try again"):
        extension._compiled("cpu", sources())
    assert len(compiler.calls) == 1


def test_the_cuda_kernels_are_compiled_for_the_gpu_that_is_there(compiler, monkeypatch, tmp_path):
    targets = []
    monkeypatch.setattr(extension, "cuda_compiler", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: targets.append(Path(path).exists()))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert extension.load_cuda_kernels.__wrapped__() == "sm_90a" and targets == [True]
    assert compiler.calls[0]["with_cuda"] and all(name.endswith(".cu") for name in compiler.calls[0]["sources"])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (extension.SWITCH, "0", "no C.. extension: HERMESFLOW_COMPILE=0 forbids compiling it; unset it"),
        ("CXX", "none", "no C.. extension: no C.. compiler .none not found.; install one"),
    ],
    ids=["switched off", "no compiler"],
)
def test_why_there_is_none(name, value, message, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv(extension.SWITCH, raising=False)
    monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, extension.NAME, None)
    monkeypatch.setattr(extension, "_BUILD_ERROR", tmp_path / "error.txt")
    extension.load_extension.cache_clear()
    try:
        found = checks.extension_missing.__wrapped__()
        assert re.match(message, found)
        (tmp_path / "error.txt").write_text("the disk was full\n")
        assert checks.extension_missing.__wrapped__().endswith("; at install: the disk was full")
    finally:
        extension.load_extension.cache_clear()


def test_ninja_of_the_packages_is_found(monkeypatch, tmp_path):
    stand_in = type(sys)("ninja")
    stand_in.BIN_DIR, stand_in.__spec__ = str(tmp_path), importlib.machinery.ModuleSpec("ninja", None)
    monkeypatch.setitem(sys.modules, "ninja", stand_in)
    (tmp_path / "ninja").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "ninja").chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    assert extension._missing_ninja() is None
    (tmp_path / "ninja").unlink()
    assert extension._missing_ninja() == "ninja is not found; run: pip install ninja"


@pytest.mark.skipif(checks.extension_missing() is not None, reason=str(checks.extension_missing()))
def test_the_cpu_kernels_run_on_the_threads_of_torch():
    """A kernel alone starts them: what fills its inputs is numpy."""
    program = """
import os, numpy as np, torch
from hermesflow.kernels.token_logprob import token_logprob
logits, target = torch.from_numpy(np.ones((64, 20_000), np.float32)), torch.from_numpy(np.zeros(64, np.int64))
token_logprob(logits[:1, :10], target[:1], backend="cpu")
before = len(os.listdir("/proc/self/task"))
token_logprob(logits, target, backend="cpu")
print(len(os.listdir("/proc/self/task")) - before)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0
