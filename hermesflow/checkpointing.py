"""Checkpoints of a training run: weights, optimizer and position, written whole, the newest few kept."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from .files import atomic_folder, damaged


def save_checkpoint(folder: Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, keep: int) -> None:
    """Writes folder/step-NNNNNN and removes all but the newest `keep` checkpoints.

    Args:
        folder: the training folder of a round.
        step: number of optimizer steps done. Batches are pure functions of seed and step, so that this number is the
            whole data position and no random state is left to save.
        module: the policy.
        optimizer: its optimizer.
        keep: at least 1.
    Raises: InputError if the folder cannot be written or the disk is full.
    """
    with atomic_folder(folder / f"step-{step:06d}") as temporary:
        write_state(temporary / "state.pt", step, module, [optimizer])
    for older in checkpoints(folder)[:-keep]:
        shutil.rmtree(older)


def load_checkpoint(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restores the newest checkpoint of a folder in place.

    Returns: the number of optimizer steps done; 0 where there is no checkpoint.
    Raises: InputError if the newest checkpoint is damaged; the message names it.
    """
    found = checkpoints(folder)
    if not found:
        return 0
    return read_state(found[-1] / "state.pt", found[-1], module, [optimizer])


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
    """The checkpoints of a training folder that hold a state, oldest first."""
    return sorted(path.parent for path in folder.glob("step-*/state.pt"))
