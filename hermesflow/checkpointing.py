"""Checkpoints of a training run: weights, optimizer and position, written whole, the newest few kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from .files import atomic_folder, damaged

# Frozen weights do not change; the optimizer's state goes by the names of the weights, so that it can be sharded anew.
_OPTIONS = StateDictOptions(ignore_frozen_params=True, flatten_optimizer_state_dict=True, strict=False)


def save_checkpoint(
    folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any], keep: int
) -> None:
    """Writes folder/step-NNNNNN, named by progress["step"], and removes all but the newest `keep` checkpoints.

    Args:
        folder: the training folder of a round.
        module: the policy.
        optimizer: its optimizer.
        progress: what JSON can hold; "step" is the number of optimizer steps done.
        keep: at least 1.
    Raises: InputError if the folder cannot be written or the disk is full.
    """
    save_state(folder / f"step-{progress['step']:06d}", module, optimizer, progress)
    for older in checkpoints(folder)[:-keep]:
        shutil.rmtree(older)


def load_checkpoint(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restores the newest checkpoint of a folder in place.

    Returns: its progress; empty where there is no checkpoint.
    """
    found = checkpoints(folder)
    return load_state(found[-1], module, optimizer) if found else {}


def save_state(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer | None, progress: dict) -> None:
    """Writes one checkpoint folder whole; optimizer None leaves it out."""
    tensors, _ = _state(module, optimizer)
    with atomic_folder(path) as temporary:
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True))
        (temporary / "progress.json").write_text(json.dumps(progress))


def load_state(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Restores one checkpoint folder in place; returns its progress."""
    tensors, rest = _state(module, optimizer)
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)))
    set_model_state_dict(module, _part(tensors, "model."), options=_OPTIONS)
    if optimizer is not None:
        set_optimizer_state_dict(module, optimizer, _part({**rest, **tensors}, "optimizer."), options=_OPTIONS)
    return json.loads((path / "progress.json").read_text())


def _state(module: nn.Module, optimizer: torch.optim.Optimizer | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and the optimizer's settings, which are the caller's and not saved."""
    state = {f"model.{name}": value for name, value in get_model_state_dict(module, options=_OPTIONS).items()}
    if optimizer is not None:
        found = get_optimizer_state_dict(module, optimizer, options=_OPTIONS)
        state |= {f"optimizer.{name}": value for name, value in found.items()}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in state.items() if name not in tensors}


def _part(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def write_state(path: Path, step: int, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Writes the number of steps done, the weights and the optimizers' states to one file; not atomic by itself."""
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"step": step, "model": module.state_dict(), "optimizers": states}, path)


def read_state(path: Path, named: Path, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Restores in place what write_state wrote.

    Returns: the number of steps done.
    Raises: InputError that calls `named` (the file or its folder) damaged if it cannot be read or does not fit.
    """
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch.load raises many kinds, and advises to trust the file
        raise damaged(named, "checkpoint", ValueError("torch cannot read it")) from error
    try:
        module.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return int(state["step"])
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise damaged(named, "checkpoint", error) from error


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a training folder, oldest first."""
    return sorted(path.parent for path in folder.glob("step-*/progress.json"))
