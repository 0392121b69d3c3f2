"""Every Triton kernel by Triton's interpreter and every CUDA kernel by the emulator, each in a process of its own:
Triton must know before its first import, and the emulated library takes the extension's place.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hermesflow.kernels import OPS, checks, registry

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
IN_A_CHILD = checks.triton_interprets() or checks.cuda_emulated()
pytestmark = pytest.mark.skipif(IN_A_CHILD or torch.cuda.is_available(), reason="the kernels run in this process")
registry.backends()  # registers all


def run_cases(op, **environment):
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider"]
    command += ["--no-header", str(HERE / f"test_{op}.py")]
    environment = os.environ | {"PYTHONSAFEPATH": "1"} | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    passed = done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout
    assert passed, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize("op", [op for op in OPS if "triton" in registry._registered[op]])
def test_triton_by_its_interpreter(op):
    pytest.importorskip("triton")
    run_cases(op, TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def can_emulate():
    if platform.machine() != "x86_64" or not shutil.which("c++"):
        pytest.skip("the emulator of CUDA needs x86-64 and a C++ compiler")


@pytest.fixture(scope="module")
def emulator(can_emulate):
    """The library of emulated CUDA kernels."""
    builder = [sys.executable, str(ROOT / "tests/csrc/build_extension.py"), "emulated", str(ROOT / "build/emulator")]
    done = subprocess.run(builder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


@pytest.mark.parametrize("op", [op for op in OPS if "cuda" in registry._registered[op]])
def test_cuda_by_the_emulator(op, emulator):
    run_cases(op, HERMESFLOW_TEST_EXTENSION=emulator)


def test_the_program_of_compute_sanitizer(can_emulate, tmp_path):
    """Here AddressSanitizer takes the place of memcheck."""
    program = tmp_path / "sanitize"
    command = ["c++", "-std=c++20", "-O1", "-g", "-fsanitize=address", f"-I{ROOT / 'tests/csrc/emulator'}", "-x", "c++"]
    subprocess.run([*command, str(ROOT / "tests/csrc/sanitize_main.cu"), "-o", str(program)], check=True)
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([str(program)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith("every kernel was launched\n")
