"""What setup.py would build, asked without building."""

import runpy
from pathlib import Path

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup_module(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture
def cuda_toolkit(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "CUDAExtension", setuptools.Extension)  # torch's looks for CUDA's libraries


def cuda_sources(extension):
    return [source for source in extension.sources if source.endswith(".cu")]


def test_no_cuda_part_for_a_torch_without_cuda(setup_module, cuda_toolkit, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    extension = setup_module["extension"]()
    assert not cuda_sources(extension) and extension.sources[0] == "csrc/bindings.cpp"
    assert not any("HERMESFLOW_CUDA" in flag for flag in extension.extra_compile_args["cxx"])


def test_no_cuda_part_without_nvcc(setup_module, cuda_toolkit, tmp_path):
    (tmp_path / "bin" / "nvcc").unlink()
    assert not cuda_sources(setup_module["extension"]())


@pytest.mark.parametrize(
    ("version", "chosen", "shown"),
    [
        ("13.0", None, "sm_80 sm_90a sm_100"),
        ("12.6", None, "sm_80 sm_90a"),
        ("13.0", "", "sm_80 sm_90a sm_100"),
        ("13.0", "9.0a;10.0+PTX", "sm_90a sm_100+PTX"),
        ("13.0", "Hopper", "Hopper"),
    ],
    ids=["default", "before_blackwell", "empty", "chosen", "named"],
)
def test_cuda_targets(setup_module, cuda_toolkit, monkeypatch, version, chosen, shown):
    monkeypatch.setattr(torch.version, "cuda", version)
    if chosen is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", chosen)
    extension = setup_module["extension"]()
    assert cuda_sources(extension)
    assert f'-DHERMESFLOW_CUDA="{shown}"' in extension.extra_compile_args["cxx"]
    assert "-Werror" in extension.extra_compile_args["nvcc"]


def test_every_package_has_its_folder(setup_module):
    for package in set(setup_module["packages"]()) - {"hermesflow.csrc"}:  # sources alone
        root = max((name for name in setup_module["FOLDERS"] if f"{package}.".startswith(f"{name}.")), key=len)
        inner = package.removeprefix(root).strip(".").split(".")
        assert Path(ROOT, setup_module["FOLDERS"][root], *filter(None, inner), "__init__.py").exists()
