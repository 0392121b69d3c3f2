"""Weights on disk: safetensors in and out, with one error that lists everything that does not fit."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def save_weights(module: nn.Module, path: Path, dtype: torch.dtype | None = None) -> None:
    """Writes a module's state dict as safetensors; dtype converts floating-point tensors (None keeps theirs)."""
    save_file({name: _converted(tensor, dtype) for name, tensor in module.state_dict().items()}, path)


def load_weights(module: nn.Module, path: Path) -> None:
    """Fills a module from a safetensors file, converting to the module's dtypes.

    Raises:
        ValueError: the file is missing or damaged, or keys are missing, unexpected or misshapen (all are listed),
            or a tensor holds NaN or infinity in the module's dtype.
    """
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); restore it from its source") from error
    own = module.state_dict()
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in own]
    problems += [
        f"{name}: expected {tuple(own[name].shape)}, got {tuple(tensor.shape)}"
        for name, tensor in state.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if problems:
        raise ValueError(f"{path} does not fit the configuration: " + "; ".join(problems))
    for name, tensor in state.items():
        if not tensor.to(own[name].dtype).isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinity; restore it from its source")
    module.load_state_dict(state)


def _converted(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach().cpu()
    return (tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor).contiguous()
