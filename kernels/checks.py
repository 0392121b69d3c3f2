"""Checks that the ops share: of arguments (ValueError) and of the machine (the reason why something cannot run)."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hermesflow.kernels.extension import load_cuda_kernels, load_extension

if TYPE_CHECKING:
    from hermesflow.kernels.philox import RandomKey

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is made of these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def describe(tensor: Tensor) -> str:
    """A tensor's dtype, shape and device for an error message: "float32 [8, 64] on cpu"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    shape: str,
    sizes: tuple[int | None, ...],
    *,
    dtypes: tuple[torch.dtype, ...] | None = None,
    device: torch.device | None = None,
) -> None:
    """Raise ValueError unless the tensor has these sizes (None is any size), one of these dtypes and this device.

    Args:
        shape: the sizes in words for the message, "[R, V]".
    """
    fits = tensor.dim() == len(sizes)
    fits = fits and all(size is None or size == got for size, got in zip(sizes, tensor.shape, strict=True))
    if fits and (dtypes is None or tensor.dtype in dtypes) and (device is None or tensor.device == device):
        return
    expected = [shape if None in sizes or not sizes else f"{shape} = {list(sizes)}"]
    if dtypes is not None:
        expected.insert(0, " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes))
    if device is not None:
        expected.append(f"on {device}")
    raise ValueError(f"{op}: expected {name} {' '.join(expected)}, got {describe(tensor)}")


def check_key(op: str, key: RandomKey, num_rows: int, device: torch.device) -> None:
    """Raise ValueError unless key holds int64 seed [R], step [R] or 0-dim and position [R] on the device."""
    int64 = (torch.int64,)
    check_tensor(op, "key.seed", key.seed, "[R]", (num_rows,), dtypes=int64, device=device)
    step_sizes = (num_rows,) if key.step.dim() else ()
    check_tensor(op, "key.step", key.step, "[R] or 0-dim", step_sizes, dtypes=int64, device=device)
    check_tensor(op, "key.position", key.position, "[R]", (num_rows,), dtypes=int64, device=device)


def check_temperature(op: str, value: float) -> None:
    """Raise ValueError unless value is 0 or a number whose inverse fp32 holds: 0 * -inf would be NaN."""
    check_number(op, "temperature", value, minimum=0)
    if value > 1e30:
        raise ValueError(f"{op}: expected temperature to be at most 1e30, got {value}")


def check_number(op: str, name: str, value: float, minimum: float | None = None) -> None:
    """Raise ValueError unless value is finite and at least minimum."""
    if not (float("-inf") < value < float("inf")) or (minimum is not None and value < minimum):
        bound = "a finite number" if minimum is None else f"a finite number of at least {minimum}"
        raise ValueError(f"{op}: expected {name} to be {bound}, got {value}")


def not_on(device_type: str, *tensors: Tensor | None) -> str | None:
    """The can_run reason of a backend that needs all its tensors on one kind of device ("cpu", "cuda")."""
    for tensor in tensors:
        if tensor is not None and tensor.device.type != device_type:
            return f"a tensor is on {tensor.device}, needs {device_type}"
    return None


def not_on_triton_device(*tensors: Tensor | None, with_dot: bool = False) -> str | None:
    """The can_run reason of a Triton backend: CUDA tensors, or CPU tensors under Triton's interpreter.

    Args:
        with_dot: whether the kernel multiplies matrices, which the interpreter does wrongly in bf16, without a message.
    """
    interprets = triton_interprets()
    if with_dot and interprets and tensors[0].dtype == torch.bfloat16:
        return "Triton's interpreter is not trusted with bf16; use fp32 or fp16"
    return not_on("cpu" if interprets else "cuda", *tensors)


def not_on_cuda_device(*tensors: Tensor | None) -> str | None:
    """The can_run reason of a CUDA backend: CUDA tensors, or CPU tensors where the tests emulate CUDA."""
    return not_on("cpu" if cuda_emulated() else "cuda", *tensors)


def can_read_values(device: torch.device) -> bool:
    """Whether a check may look at values: without waiting for a device, and not while torch.compile traces."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


@torch.compiler.assume_constant_result
def triton_interprets() -> bool:
    """Whether Triton kernels run in Triton's interpreter; read before the first kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def extension_missing() -> str | None:
    """Why the C++ extension hermesflow.kernels._C cannot be used, or None; compiles it if need be."""
    try:
        load_extension()
    except ImportError as error:
        return f"no C++ extension: {error}"
    return None


@torch.compiler.assume_constant_result
def cuda_emulated() -> bool:
    """Whether the extension is the tests' own, whose CUDA kernels run on the CPU (tests/csrc)."""
    return extension_missing() is None and load_extension().build_facts()["cuda"] == "emulated"


def cpu_missing() -> str | None:
    """Why the extension's CPU kernels cannot be used, or None."""
    return extension_missing() or ("the extension holds emulated CUDA kernels only" if cuda_emulated() else None)


@functools.cache
def cuda_missing() -> str | None:
    """Why the extension's CUDA kernels cannot be used, or None."""
    if cuda_emulated():
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    missing = extension_missing()
    if missing is not None:
        return missing
    targets = load_extension().build_facts()["cuda"]
    if targets == "none":
        try:
            targets = load_cuda_kernels()
        except ImportError as error:
            return f"the extension was built without CUDA: {error}"
    capability = torch.cuda.get_device_capability()
    if not has_code_for(capability, targets):
        card = "{}.{}".format(*capability)
        return f"the extension holds {targets}, this GPU is {card}; {install_hint()} with TORCH_CUDA_ARCH_LIST={card}"
    return None


def install_hint() -> str:
    """How this copy is installed anew, in words: a checkout, or what pip put away from its sources."""
    root = Path(__file__).parents[1]
    if (root / "setup.py").exists():
        return f"run pip install --no-build-isolation -e {root}"
    return "in the checkout run pip install --no-build-isolation --force-reinstall --no-deps ."


def has_code_for(capability: tuple[int, int], targets: str) -> bool:
    """Whether one of the targets, as "sm_80 sm_90a sm_100+PTX", runs on a GPU of this capability.

    Machine code runs on its own major version from its minor version on, with an "a" on exactly its version; PTX on
    every later one.
    """
    for target in targets.split():
        found = re.fullmatch(r"sm_(\d+)(\d)([af]?)(\+PTX)?", target)
        if not found:
            return True  # a name such as Hopper: torch's own list of what it stands for decides
        version = int(found[1]), int(found[2])
        same_major = capability[0] == version[0] and capability >= version
        if capability == version or (not found[3] and (same_major or (found[4] and capability > version))):
            return True
    return False


def triton_missing() -> str | None:
    """Why Triton kernels cannot run on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; run: pip install triton"
    if not torch.cuda.is_available() and not triton_interprets():
        return "torch sees no CUDA device (TRITON_INTERPRET=1 runs Triton's slow interpreter)"
    return None


def flash_attn_missing() -> str | None:
    """Why FlashAttention cannot run on this machine, or None."""
    return _cuda_package_missing("flash_attn", "flash-attn")


def xformers_missing() -> str | None:
    """Why xFormers cannot run on this machine, or None."""
    return _cuda_package_missing("xformers", "xformers")


def _cuda_package_missing(module: str, package: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed; run: pip install {package}"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"
