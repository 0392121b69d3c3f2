"""Checkpoints of a training run: weights, optimizer, random numbers and position, written whole, the newest few kept.

A checkpoint is a folder: safetensors files (torch.distributed.checkpoint; no pickle), one a process, progress.json, and
manifest.json with every file's size and CRC-32. Tensors are stored by name and place, so that any number of processes
can load them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from hermesflow.runtime.distributed import gather, on_main, rank, shared_folder, world_size
from hermesflow.runtime.files import InputError, damaged, read_json, reason_of, write_problem

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
_LOGGER = logging.getLogger(__name__)
_MANIFEST, _PROGRESS, _RNG = "manifest.json", "progress.json", "rng."
_BLOCK_BYTES = 1 << 24
# Frozen weights do not change; the optimizer's state goes by the names of the weights, so that it can be sharded anew.
# The names are compared before anything is loaded, so not being strict, which frozen weights ask for, hides nothing.
_OPTIONS = StateDictOptions(ignore_frozen_params=True, flatten_optimizer_state_dict=True, strict=False)


def save_checkpoint(
    folder: Path, module: nn.Module, optimizer: Optimizers, progress: dict[str, Any], keep: int
) -> None:
    """Writes folder/step-NNNNNN, named by progress["step"], and removes all but the newest `keep` checkpoints.

    Args:
        folder: the training folder of a round.
        module: the policy.
        optimizer: its optimizer, or several.
        progress: what JSON can hold; "step" is the number of optimizer steps done.
        keep: at least 1.
    Raises: InputError if the folder cannot be written or the disk is full.
    """
    save_state(folder / f"step-{progress['step']:06d}", module, optimizer, progress)

    def remove_older() -> None:
        for older in checkpoints(folder)[:-keep]:
            older.unlink() if older.is_symlink() else shutil.rmtree(older)

    on_main(remove_older)


def load_checkpoint(folder: Path, module: nn.Module, optimizer: Optimizers) -> dict[str, Any]:
    """Restores the newest checkpoint of a folder that is whole, in place; a damaged one is named in a warning.

    Returns: its progress; empty where there is no checkpoint.
    Raises: InputError if there are checkpoints and none is whole, or the newest that is whole has other tensors than
        the module and its optimizer.
    """
    found = on_main(lambda: checkpoints(folder))
    reasons = []
    for path in reversed(found):
        reason = _damage(path)
        if reason is None:
            return _load(path, module, optimizer)
        reasons.append(f"{path.name}: {reason}")
        if path != found[0]:
            _LOGGER.warning("%s: damaged checkpoint (%s); trying the one before it", path, reason)
    if not found:
        return {}
    raise InputError(
        f"{folder}: no checkpoint can be used ({'; '.join(reasons)}); restore one from a copy, or delete {folder} and "
        "run the same command again to train anew"
    )


def save_state(path: Path, module: nn.Module, optimizer: Optimizers | None, progress: dict) -> None:
    """Writes one checkpoint folder whole; optimizer None leaves it out. All processes must call it."""
    tensors, _ = _state(module, optimizer)
    tensors |= _rng_states(module)
    with shared_folder(path) as temporary:
        with _storage_errors(path):
            writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, no_dist=world_size() == 1)
        on_main(lambda: (temporary / _PROGRESS).write_text(json.dumps(progress)))
        checksums = _checksums(temporary)
        on_main(lambda: (temporary / _MANIFEST).write_text(json.dumps(checksums, indent=2)))


def load_state(path: Path, module: nn.Module, optimizer: Optimizers | None) -> dict[str, Any]:
    """Restores one checkpoint folder in place; all processes must call it.

    Returns: its progress.
    Raises: InputError if it is damaged, or has other tensors than the module and its optimizer.
    """
    reason = _damage(path)
    if reason is not None:
        raise damaged(path, "checkpoint", ValueError(reason))
    return _load(path, module, optimizer)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a training folder, whole or not, oldest first."""
    # The user's own copies beside them are left alone: one that sorts last would have the newest checkpoint removed.
    found = [path for path in folder.glob("step-*") if path.is_dir() and re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _load(path: Path, module: nn.Module, optimizer: Optimizers | None) -> dict[str, Any]:
    """Restores a checkpoint whose files are whole."""
    tensors, rest = _state(module, optimizer)
    reader = HuggingFaceStorageReader(str(path))
    with _storage_errors(path):
        saved = {name: tuple(entry.size) for name, entry in reader.read_metadata().state_dict_metadata.items()}
    _check_fit(path, {name: tuple(value.shape) for name, value in tensors.items()}, saved)
    # A process that joined after the checkpoint keeps its own random numbers.
    states = {name: value for name, value in _rng_states(module).items() if name in saved}
    tensors |= states
    with _storage_errors(path):
        dcp.load(tensors, storage_reader=reader, no_dist=world_size() == 1)
    set_model_state_dict(module, _part(tensors, "model."), options=_OPTIONS)
    if optimizer is not None:
        set_optimizer_state_dict(module, optimizer, _part({**rest, **tensors}, "optimizer."), options=_OPTIONS)
    for name, value in states.items():
        if name.startswith(f"{_RNG}cuda"):
            torch.cuda.set_rng_state(value, _device(module))
        else:
            torch.set_rng_state(value)
    return read_json(path / _PROGRESS)


def _check_fit(path: Path, wanted: dict[str, tuple[int, ...]], saved: dict[str, tuple[int, ...]]) -> None:
    saved = {name: shape for name, shape in saved.items() if not name.startswith(_RNG)}
    problems = [f"it lacks {name}" for name in wanted.keys() - saved.keys()]
    problems += [f"it has {name}" for name in saved.keys() - wanted.keys()]
    problems += [
        f"{name} is {list(saved[name])}, expected {list(shape)}"
        for name, shape in wanted.items()
        if saved.get(name, shape) != shape
    ]
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise InputError(
            f"{path}: checkpoint of another model or of other train settings ({min(problems)}{more}); "
            f"set them back, or delete {path.parent} to train anew"
        )


def _state(module: nn.Module, optimizer: Optimizers | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and the optimizer's settings, which are the caller's and not saved."""
    # The model's state comes first: asking for it shards weights that a pass without a gradient left whole.
    found = get_model_state_dict(module, options=_OPTIONS)
    # Tied weights have two names there, and here the first of them.
    names = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    state = {f"model.{name}": value for name, value in found.items() if name in names}
    if optimizer is not None:
        found = get_optimizer_state_dict(module, optimizer, options=_OPTIONS)
        state |= {f"optimizer.{name}": value for name, value in found.items()}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in state.items() if name not in tensors}


def _rng_states(module: nn.Module) -> dict[str, Tensor]:
    """The states of this process's generators."""
    states = {f"{_RNG}cpu.{rank()}": torch.get_rng_state()}
    if _device(module).type == "cuda":
        states[f"{_RNG}cuda.{rank()}"] = torch.cuda.get_rng_state(_device(module))
    return states


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _part(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    """What torch.distributed.checkpoint meets in the block, as the errors of this library."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process may save by itself
        try:
            yield
        except CheckpointException as error:  # of any process, in all of them; not an Exception
            cause = next(iter(error.failures.values()))[0]
            raise write_problem(path, cause) or cause from error
        except (KeyError, ValueError) as error:
            raise damaged(path, "checkpoint", error) from error


def _damage(path: Path) -> str | None:
    """Why a checkpoint cannot be used, the same in all processes, each of which looks at its share of the files."""
    return next((reason for reason in gather(_damage_seen(path)) if reason is not None), None)


def _damage_seen(path: Path) -> str | None:
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        listed = {name for name, _, _ in manifest}
        strange = sorted(file.name for file in path.glob("*.safetensors") if file.name not in listed)
        if strange:
            return f"{strange[0]} is not in {_MANIFEST}"
        for name, size, checksum in manifest[rank() :: world_size()]:
            file = path / name
            if not file.exists():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes instead of {size}"
            if _checksum(file) != checksum:
                return f"{name} has another checksum than {_MANIFEST}"
    except FileNotFoundError:
        return f"{_MANIFEST} is missing"
    except (OSError, TypeError, ValueError) as error:
        return f"{_MANIFEST}: {reason_of(error)}"
    return None


def _checksums(folder: Path) -> list[tuple[str, int, int]]:
    """(name, bytes, CRC-32) of a folder's files; each process reads its share of them."""
    names = on_main(lambda: sorted(path.name for path in folder.iterdir()))
    mine = [(name, (folder / name).stat().st_size, _checksum(folder / name)) for name in names[rank() :: world_size()]]
    return sorted(entry for entries in gather(mine) for entry in entries)


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return value
