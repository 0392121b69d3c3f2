"""The C++ extension: as the install built it, or compiled at its first use.

Where the install had no torch, no compiler or another version of torch, the CPU kernels are compiled at their first
use; where it had no nvcc and there is a GPU now, the CUDA kernels are. torch.utils.cpp_extension compiles them with
ninja, once for each version of torch, into TORCH_EXTENSIONS_DIR (~/.cache/torch_extensions). HERMESFLOW_COMPILE=0
forbids it.

setup.py takes flags and targets from here, so that both ways build the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib
import importlib.util
import logging
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

# -fopenmp without its library: the symbols are those of the one that torch has loaded, whose threads then serve both.
COMPILE_ARGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]
NVCC_ARGS = ["-std=c++20", "-O3", "-ftz=true", "-lineinfo", "-Werror", "all-warnings"]
NAME = "hermesflow.kernels._C"
SWITCH = "HERMESFLOW_COMPILE"
_BUILD_ERROR = Path(__file__).with_name("_C_build_error.txt")
_SOURCES = Path(__file__).parents[1] / "csrc"
_logger = logging.getLogger(__name__)


@functools.cache
def load_extension() -> ModuleType:
    """The module with the schemas of the ops and the CPU kernels. Raises: ImportError with the reason."""
    try:
        return importlib.import_module(NAME)
    except ModuleNotFoundError:
        at_install = _BUILD_ERROR.read_text().strip() if _BUILD_ERROR.exists() else ""
    except ImportError as error:  # such as one for another torch
        at_install = str(error)
    sources = [_SOURCES / "bindings.cpp", *sorted((_SOURCES / "cpu").glob("*.cpp"))]
    try:
        library = _compiled("cpu", sources)
    except ImportError as error:
        raise ImportError(f"{error}{f'; at install: {at_install}' if at_install else ''}") from None
    spec = importlib.util.spec_from_file_location(library.stem, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    return module


@functools.cache
def load_cuda_kernels() -> str:
    """Compiles the CUDA kernels for this machine's GPU, beside an extension that has none, and registers them.

    Returns: the target that they were compiled for, such as "sm_90a". Raises: ImportError with the reason.
    """
    import torch

    if cuda_compiler() is None:
        raise ImportError("nvcc is not found; install the CUDA toolkit, or set CUDA_HOME")
    major, minor = torch.cuda.get_device_capability()
    target = f"{major}.{minor}{'a' if (major, minor) == (9, 0) else ''}"
    library = _compiled("cuda", sorted((_SOURCES / "cuda").glob("*.cu")), target)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(f"{library} does not load ({error}); remove its folder") from error
    return shown_targets(target)


def cuda_compiler() -> Path | None:
    """nvcc, where the installed torch has CUDA."""
    import torch
    from torch.utils import cpp_extension

    if torch.version.cuda is None or cpp_extension.CUDA_HOME is None:
        return None
    nvcc = Path(cpp_extension.CUDA_HOME, "bin", "nvcc")
    return nvcc if nvcc.exists() else None


def default_targets() -> str:
    """Ampere, Hopper and, as CUDA 12.8 came with it, Blackwell."""
    import torch

    version = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
    return "8.0 9.0a 10.0" if version >= (12, 8) else "8.0 9.0a"


def shown_targets(targets: str) -> str:
    """The targets "8.0 9.0a;10.0+PTX" as "sm_80 sm_90a sm_100+PTX"; names such as Hopper as they are."""
    return re.sub(r"(\d+)\.(\d+\w*)", r"sm_\1\2", targets.replace(";", " "))


def missing_tool() -> str | None:
    """What the machine lacks to compile the extension, with the fix, or None."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not shutil.which(compiler):
        return f"no C++ compiler ({compiler} not found); install one (Debian, Ubuntu: apt install g++)"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        return f"no {header}; install Python's headers (Debian, Ubuntu: apt install python3-dev)"
    return None


def _compiled(kind: str, sources: list[Path], target: str = "") -> Path:
    """The library of these sources, compiled if it is not there yet. Raises: ImportError with the reason."""
    import torch

    name = f"hermesflow_{kind}_{_digest(torch.__version__, target)}"
    cache = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions")
    folder = Path(cache, name)
    library, failed = folder / f"{name}.so", folder / "failed.txt"
    if library.exists():
        return library
    if os.environ.get(SWITCH) == "0":
        raise ImportError(f"{SWITCH}=0 forbids compiling it; unset it")
    if reason := missing_tool() or _missing_ninja():
        raise ImportError(reason)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".hermesflow").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits, and then finds what the first has made
            if not library.exists():
                if failed.exists():
                    reason = failed.read_text().partition("\n")[0]
                    raise ImportError(f"{reason}; remove {folder} to try again")
                _compile(name, sources, folder, target)
    except OSError as error:
        raise ImportError(f"{folder} cannot be written ({error.strerror}); set TORCH_EXTENSIONS_DIR") from error
    return library


def _compile(name: str, sources: list[Path], folder: Path, target: str) -> None:
    from torch.utils import cpp_extension

    build = folder / "build"
    build.mkdir(exist_ok=True)
    (build / "lock").unlink(missing_ok=True)  # torch waits for ever for a process that was killed
    kind = "CUDA" if target else "C++"
    _logger.warning("the %s kernels are compiled, once for this version of torch: a minute or two (%s)", kind, folder)
    try:
        flags = {"extra_cflags": COMPILE_ARGS, "extra_cuda_cflags": NVCC_ARGS, "with_cuda": bool(target)}
        options = flags | {"build_directory": str(build), "is_python_module": False}
        with _environment(**{"TORCH_CUDA_ARCH_LIST": target} if target else {}):
            cpp_extension.load(name, [str(source) for source in sources], **options)
        os.replace(build / f"{name}.so", folder / f"{name}.so")  # whole, or not there
    except OSError:  # a full disk and the like: the next process tries again
        raise
    except Exception as error:  # of the compiler, of ninja and of what they need
        first_line = str(error).partition("\n")[0]
        reason = f"the {kind} kernels do not compile ({type(error).__name__}: {first_line})"
        failed = folder / "failed.txt"
        failed.with_suffix(".tmp").write_text(f"{reason}\n\n{error}\n")
        os.replace(failed.with_suffix(".tmp"), failed)
        raise ImportError(f"{reason}; {failed} has the compiler's message") from error


def _missing_ninja() -> str | None:
    from torch.utils import cpp_extension

    with _environment():
        return None if cpp_extension.is_ninja_available() else "ninja is not found; run: pip install ninja"


@contextlib.contextmanager
def _environment(**more: str) -> Iterator[None]:
    """Variables for a while; ninja of this Python's packages is found though its environment is not activated."""
    before = dict(os.environ)
    if importlib.util.find_spec("ninja"):
        more["PATH"] = os.pathsep.join([importlib.import_module("ninja").BIN_DIR, os.environ.get("PATH", "")])
    os.environ.update(more)
    try:
        yield
    finally:
        for name in more:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


def _digest(*more: str) -> str:
    """A fingerprint of all sources, flags and versions."""
    digest = hashlib.blake2b(
        repr((COMPILE_ARGS, NVCC_ARGS, sysconfig.get_config_var("EXT_SUFFIX"), *more)).encode(), digest_size=8
    )
    for path in sorted(_SOURCES.rglob("*")):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
