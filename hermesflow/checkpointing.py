"""Checkpoints of a training run: weights, optimizer and position, written whole, the newest few kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

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
        state = {"step": step, "model": module.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, temporary / "state.pt")
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
    state = read_state(found[-1] / "state.pt", found[-1])
    try:
        module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise damaged(found[-1], "checkpoint", error) from error


def read_state(path: Path, named: Path) -> dict[str, Any]:
    """What torch.save wrote to path, tensors and plain values only.

    Raises: InputError that calls `named` (the file or its folder) damaged if torch cannot read it.
    """
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:  # torch.load raises many kinds, and advises to trust the file
        raise damaged(named, "checkpoint", ValueError("torch cannot read it")) from error


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a training folder that hold a state, oldest first."""
    return sorted(path.parent for path in folder.glob("step-*/state.pt"))
