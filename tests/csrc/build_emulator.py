"""Builds tests/csrc/emulated_cuda.cpp into FOLDER/_C.so: python tests/csrc/build_emulator.py FOLDER

HERMESFLOW_EXTENSION=FOLDER/_C.so then makes it hermesflow.kernels._C, whose backend "cuda" takes CPU tensors.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]


def build(folder: Path) -> Path:
    """Compile when a source is newer than the library; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    library, all_kernels = folder / "_C.so", folder / "cuda_sources.h"
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    all_kernels.write_text("".join(f'#include "{source}"\n' for source in sources))
    used = [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "tests/csrc").rglob("*.*")]
    if library.exists() and library.stat().st_mtime > max(path.stat().st_mtime for path in used):
        return library
    includes = [ROOT / "tests/csrc/emulator", *cpp_extension.include_paths(), sysconfig.get_path("include")]
    libraries = Path(torch.__file__).parent / "lib"
    command = [
        "c++", "-std=c++20", "-O1", "-g", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas",
        *(f"-I{path}" if index == 0 else f"-isystem{path}" for index, path in enumerate(map(str, includes))),
        f'-DHERMESFLOW_CUDA_SOURCES="{all_kernels}"', "-DTORCH_EXTENSION_NAME=_C",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        str(ROOT / "tests/csrc/emulated_cuda.cpp"), "-o", str(library),
        f"-L{libraries}", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python", f"-Wl,-rpath,{libraries}",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return library


if __name__ == "__main__":
    print(build(Path(sys.argv[1]).resolve()))
