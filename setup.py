"""Folders to packages, and the C++ extension hermesflow.kernels._C (metadata is in pyproject.toml).

The extension is built against the torch that is installed: pip install --no-build-isolation -e .
Without a compiler the install succeeds without it; the reason is kept beside the package for `hermesflow doctor`.
"""

from __future__ import annotations

import glob
import os
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
COMPILE_ARGS = ["-O3", "-fno-math-errno", "-fno-trapping-math"]


def packages() -> list[str]:
    inside = [f"hermesflow.{name}" for name in find_packages("hermesflow")]
    return [*FOLDERS, *inside]


def extension() -> cpp_extension.CppExtension:
    cuda_sources = sorted(glob.glob("csrc/cuda/*.cu"))
    with_cuda = bool(cuda_sources and torch.version.cuda and cpp_extension.CUDA_HOME)
    kind = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    return kind(
        "hermesflow.kernels._C",
        ["csrc/bindings.cpp", *sorted(glob.glob("csrc/cpu/*.cpp")), *(cuda_sources if with_cuda else [])],
        depends=sorted(glob.glob("csrc/**/*.h", recursive=True) + glob.glob("csrc/**/*.cuh", recursive=True)),
        define_macros=[("HERMESFLOW_CUDA", None)] if with_cuda else [],
        extra_compile_args={"cxx": COMPILE_ARGS, "nvcc": ["-O3"]},
        optional=True,
    )


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
    package_data={"hermesflow": ["assets/**/*"]},
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
)
