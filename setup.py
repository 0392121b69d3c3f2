"""Folders to packages, and the C++ extension hermesflow.kernels._C (metadata is in pyproject.toml).

With --no-build-isolation the extension is built against the torch that is installed. Without torch or a compiler the
install succeeds without it, and the kernels are compiled at their first use (kernels/extension.py); the reason is kept
beside the package for `hermesflow doctor`.
"""

from __future__ import annotations

import glob
import os
import runpy
from pathlib import Path
from types import SimpleNamespace

from setuptools import find_packages, setup

try:
    from torch.utils import cpp_extension
except ImportError:  # pip's build isolation: what is built there must not depend on some torch
    cpp_extension = None

RULES = SimpleNamespace(**runpy.run_path("kernels/extension.py"))
# package -> folder
FOLDERS = {
    "hermesflow": "hermesflow",
    "hermesflow.benchmarks": "benchmarks",
    "hermesflow.csrc": "csrc",
    "hermesflow.engine": "engine",
    "hermesflow.kernels": "kernels",
}


def packages() -> list[str]:
    inside = [f"{package}.{name}" for package, folder in FOLDERS.items() for name in find_packages(folder)]
    return [*FOLDERS, *inside]


def extension() -> cpp_extension.CppExtension:
    cuda_sources = sorted(glob.glob("csrc/cuda/*.cu")) if RULES.cuda_compiler() else []
    kind, cxx_args = cpp_extension.CppExtension, RULES.COMPILE_ARGS
    if cuda_sources:
        # Where torch's build reads the targets; if it finds none, it builds for the cards of this machine alone.
        targets = os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or RULES.default_targets()
        kind, shown = cpp_extension.CUDAExtension, RULES.shown_targets(targets)
        cxx_args = [*RULES.COMPILE_ARGS, f'-DHERMESFLOW_CUDA="{shown}"']
    return kind(
        RULES.NAME,
        ["csrc/bindings.cpp", *sorted(glob.glob("csrc/cpu/*.cpp")), *cuda_sources],
        depends=sorted(glob.glob("csrc/**/*.h", recursive=True) + glob.glob("csrc/**/*.cuh", recursive=True)),
        extra_compile_args={"cxx": cxx_args, "nvcc": RULES.NVCC_ARGS},
        optional=True,
    )


class BuildExtension(cpp_extension.BuildExtension if cpp_extension else object):
    """A build that leaves the reason beside the module's place when it fails, and no module of an earlier build."""

    def build_extensions(self) -> None:
        for ext in self.extensions:
            self._forget_earlier_builds(ext)
        reason = RULES.missing_tool()
        if reason is None:
            try:
                super().build_extensions()
                return
            except Exception as error:  # the compiler's own message is in the build's output; the install continues
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
    package_data={
        "hermesflow": ["assets/**/*", "py.typed"],
        "hermesflow.benchmarks.study": ["*.toml"],
        "hermesflow.csrc": ["**/*"],
    },
    **({"ext_modules": [extension()], "cmdclass": {"build_ext": BuildExtension}} if cpp_extension else {}),
)
