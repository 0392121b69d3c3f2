"""`hermesflow doctor`: what this machine can run, and for what it cannot, the reason."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import hermesflow
from hermesflow.kernels import registry
from hermesflow.kernels.checks import extension_missing
from hermesflow.kernels.extension import load_extension

_PACKAGES = ("torch", "numpy", "pyarrow", "transformers", "tokenizers", "safetensors", "triton")
_EXTRAS = {
    "flash_attn": "span_attention by FlashAttention",
    "xformers": "span_attention by xFormers",
}


def run_doctor() -> None:
    """Print versions, devices, the C++ extension, every op's backends and the optional packages."""
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
    console.print(_versions())
    console.print(_devices())
    console.print(_backends())
    console.print(_extras())


def _versions() -> Table:
    table = _table("Versions", "what", "version", "note")
    table.add_row("hermesflow", hermesflow.__version__, str(Path(hermesflow.__file__).parent))
    table.add_row("python", platform.python_version(), sys.executable)
    for package in _PACKAGES:
        table.add_row(package, _package_version(package) or "-", "" if _package_version(package) else "not installed")
    compiler = os.environ.get("CXX", "").split(" ")[0] or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    table.add_row("C++ compiler", *_tool_version(compiler or "c++", "apt install g++, or xcode-select --install"))
    table.add_row("nvcc", *_tool_version("nvcc", "the CUDA kernels need the CUDA toolkit; the CPU needs none"))
    missing = extension_missing()
    table.add_row("C++ extension", "-" if missing else "built", missing or _build_facts())
    return table


def _devices() -> Table:
    table = _table("Devices", "device", "name", "memory", "note")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    note = f"{cores} cores, {torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}"
    table.add_row("cpu", platform.machine(), f"{memory:.0f} GiB", note)
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        note = f"compute capability {facts.major}.{facts.minor}"
        table.add_row(f"cuda:{index}", facts.name, f"{facts.total_memory / 2**30:.0f} GiB", note)
    if not torch.cuda.is_available():
        reason = "torch is a CPU build" if torch.version.cuda is None else "torch sees no CUDA device; see nvidia-smi"
        table.add_row("cuda", "-", "-", reason)
    return table


def _backends() -> Table:
    table = _table("Ops, each with its backends in order of preference", "op", "backend", "runs here", "why not")
    chosen = os.environ.get(registry.ENVIRONMENT_VARIABLE)
    if chosen:
        table.caption = f"{registry.ENVIRONMENT_VARIABLE}={chosen}"
    for op, of_op in registry.backends().items():
        for number, (backend, reason) in enumerate(of_op.items()):
            table.add_row("" if number else op, backend, "no" if reason else "yes", reason or "")
        table.add_section()
    return table


def _extras() -> Table:
    table = _table("Optional packages", "package", "version", "for", "to install")
    for module, purpose in _EXTRAS.items():
        name = module.replace("_", "-")
        found = importlib.util.find_spec(module) is not None
        table.add_row(name, _package_version(name) or "-", purpose, "" if found else f"pip install {name}")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _package_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tool_version(tool: str, hint: str) -> tuple[str, str]:
    path = shutil.which(tool)
    if path is None:
        return "-", f"{tool} not found: {hint}"
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    lines = [line.strip() for line in (done.stdout or done.stderr).splitlines() if line.strip()]
    # nvcc prints its version in the fourth line, compilers in the first.
    return next((line for line in lines if "release" in line), lines[0] if lines else "unknown"), path


def _build_facts() -> str:
    facts = load_extension().build_facts()
    return ", ".join(f"{name} {value}" for name, value in facts.items())
