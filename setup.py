"""Folders to packages, and the C++ extension hermesflow.kernels._C (metadata is in pyproject.toml).

The extension is built against the torch that is installed: pip install --no-build-isolation -e .
Without a compiler the install succeeds without it; the reason is kept beside the package for `hermesflow doctor`.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        f"hermesflow is built against the torch that is installed, and none could be imported ({error}).\n"
        'Run: pip install "torch>=2.11,<2.14" setuptools wheel && pip install --no-build-isolation -e .'
    ) from error

# package -> folder
FOLDERS = {
    "hermesflow": "hermesflow",
    "hermesflow.benchmarks": "benchmarks",
    "hermesflow.engine": "engine",
    "hermesflow.kernels": "kernels",
}
COMPILE_ARGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math"]
NVCC_ARGS = ["-std=c++20", "-O3", "-lineinfo", "-Werror", "all-warnings"]


def packages() -> list[str]:
    inside = [f"{package}.{name}" for package, folder in FOLDERS.items() for name in find_packages(folder)]
    return [*FOLDERS, *inside]


def extension() -> cpp_extension.CppExtension:
    cuda_sources = sorted(glob.glob("csrc/cuda/*.cu")) if cuda_compiler() else []
    kind, cxx_args = cpp_extension.CppExtension, COMPILE_ARGS
    if cuda_sources:
        # Where torch's build reads the targets; if it finds none, it builds for the cards of this machine alone.
        targets = os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or default_targets()
        kind, cxx_args = cpp_extension.CUDAExtension, [*COMPILE_ARGS, f'-DHERMESFLOW_CUDA="{shown_targets(targets)}"']
    return kind(
        "hermesflow.kernels._C",
        ["csrc/bindings.cpp", *sorted(glob.glob("csrc/cpu/*.cpp")), *cuda_sources],
        depends=sorted(glob.glob("csrc/**/*.h", recursive=True) + glob.glob("csrc/**/*.cuh", recursive=True)),
        extra_compile_args={"cxx": cxx_args, "nvcc": NVCC_ARGS},
        optional=True,
    )


def cuda_compiler() -> Path | None:
    """nvcc, where the installed torch has CUDA."""
    if torch.version.cuda is None or cpp_extension.CUDA_HOME is None:
        return None
    nvcc = Path(cpp_extension.CUDA_HOME, "bin", "nvcc")
    return nvcc if nvcc.exists() else None


def default_targets() -> str:
    """Ampere, Hopper and, as CUDA 12.8 came with it, Blackwell."""
    version = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
    return "8.0 9.0a 10.0" if version >= (12, 8) else "8.0 9.0a"


def shown_targets(targets: str) -> str:
    """The targets "8.0 9.0a;10.0+PTX" as "sm_80 sm_90a sm_100+PTX"; names such as Hopper as they are."""
    return re.sub(r"(\d+)\.(\d+\w*)", r"sm_\1\2", targets.replace(";", " "))


def missing_tool() -> str | None:
    """What the machine lacks to build the extension, with the fix, or None."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not shutil.which(compiler):
        return (
            f"no C++ compiler ({compiler} not found); install one (Debian, Ubuntu: apt install g++) and install again"
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        return f"no {header}; install Python's headers (Debian, Ubuntu: apt install python3-dev) and install again"
    return None


class BuildExtension(cpp_extension.BuildExtension):
    """A build that leaves the reason beside the module's place when it fails, and no module of an earlier build."""

    def build_extensions(self) -> None:
        for ext in self.extensions:
            self._forget_earlier_builds(ext)
        reason = missing_tool()
        if reason is None:
            try:
                super().build_extensions()
                return
            except Exception as error:  # the compiler's own message is in the build's output, the install goes on
                first_line = str(error).partition("\n")[0]
                reason = f"{type(error).__name__}: {first_line} (pip install -v shows the compiler's message)"
        for ext in self.extensions:
            for place in self._places(ext):
                place.parent.mkdir(parents=True, exist_ok=True)
                self._reason_file(place).write_text(reason + "\n")
        print(f"hermesflow: building without the C++ extension: {reason}")

    def _places(self, ext) -> list[Path]:
        """Where the module is built and, in an editable install, where it is copied to."""
        places = [Path(self.build_lib, self.get_ext_filename(ext.name)), Path(self.get_ext_fullpath(ext.name))]
        if self.inplace or getattr(self, "editable_mode", False):
            places.append(Path("kernels", places[0].name))
        return list(dict.fromkeys(places))

    def _forget_earlier_builds(self, ext) -> None:
        for place in self._places(ext):
            place.unlink(missing_ok=True)
            self._reason_file(place).unlink(missing_ok=True)

    @staticmethod
    def _reason_file(place: Path) -> Path:
        return place.with_name("_C_build_error.txt")


setup(
    packages=packages(),
    package_dir=FOLDERS,
    package_data={"hermesflow": ["assets/**/*", "py.typed"], "hermesflow.benchmarks.study": ["*.toml"]},
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
)
