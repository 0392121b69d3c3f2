"""Builds hermesflow.kernels._C for a test into FOLDER/_C.so: python tests/csrc/build_extension.py KIND FOLDER

KIND emulated: the CUDA kernels alone, run on the CPU (tests/csrc/emulator); the backend "cuda" then takes CPU tensors.
KIND sanitized: the C++ kernels under AddressSanitizer and UBSan (`make sanitize` runs the tests on it).
HERMESFLOW_TEST_EXTENSION=FOLDER/_C.so makes the tests use it.
"""

import fcntl
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]


def build(kind: str, folder: Path) -> Path:
    """Compile where a source is newer than the library; returns the library's path."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits, and then finds the library
        return build_alone(kind, folder)


def build_alone(kind: str, folder: Path) -> Path:
    library = folder / "_C.so"
    used = [path for tree in ("csrc", "tests/csrc") for path in (ROOT / tree).rglob("*") if path.is_file()]
    if library.exists() and library.stat().st_mtime > max(path.stat().st_mtime for path in used):
        return library
    if kind == "emulated":
        entries = folder / "cuda_sources.h"
        cuda = sorted((ROOT / "csrc/cuda").glob("*.cu"))
        entries.write_text("".join(f'#include "{source}"\n' for source in cuda))
        sources = [ROOT / "tests/csrc/emulated_cuda.cpp"]
        options = ["-O1", "-g", f"-I{ROOT / 'tests/csrc/emulator'}", f'-DHERMESFLOW_CUDA_SOURCES="{entries}"']
    else:
        sources = [ROOT / "csrc/bindings.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
        options = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]
        options += ["-fno-omit-frame-pointer", "-fno-math-errno", "-fno-trapping-math"]
    includes = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    torch_libraries = Path(torch.__file__).parent / "lib"
    command = [
        "c++", "-std=c++20", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas", *options,
        *(f"-isystem{path}" for path in includes), "-DTORCH_EXTENSION_NAME=_C",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}", *map(str, sources), "-o", str(library),
        f"-L{torch_libraries}", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python", f"-Wl,-rpath,{torch_libraries}",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return library


if __name__ == "__main__":
    print(build(sys.argv[1], Path(sys.argv[2]).resolve()))
