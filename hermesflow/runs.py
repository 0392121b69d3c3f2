"""What a folder of results was begun with: settings, weights and pairs, which all who go on in it must bring again."""

from __future__ import annotations

import fcntl
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import torch

from hermesflow.config import Config, load_config, to_toml
from hermesflow.models.family import load_model
from hermesflow.models.model import Model
from hermesflow.runtime.files import (
    InputError,
    atomic_folder,
    make_folder,
    read_json,
    remove_leftovers,
    write_json,
    write_problem,
    write_text,
)

_RESULTS = ("round-*", "records.parquet", "train", "study.jsonl")
"""Files that fix the settings as soon as one of them is there."""


def claim_folder(folder: Path, config: Config, elsewhere: str) -> TextIO:
    """Makes a folder this process's own, writes config.toml into it, and removes what a killed process left.

    Args:
        folder: made if need be.
        config: the settings.
        elsewhere: what the user changes to work in another folder, for messages.
    Returns: the open lock file; the system frees it when it is closed or this process ends, however it ends.
    Raises: InputError if another process is at work in it, or it holds results of other settings.
    """
    lock = _lock(make_folder(folder) / ".lock", elsewhere)
    settings = folder / "config.toml"
    if settings.exists() and any(path for pattern in _RESULTS for path in folder.glob(pattern)):
        _check_settings(settings, config, elsewhere)
    else:
        write_text(settings, to_toml(config))
    remove_leftovers(folder)
    return lock


def _lock(path: Path, elsewhere: str) -> TextIO:
    try:
        lock = path.open("w")
    except OSError as error:
        raise write_problem(path, error) or error from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise InputError(
            f"{path.parent}: another process is at work on this run; wait for it or choose another {elsewhere}"
        ) from error
    return lock


def _check_settings(path: Path, config: Config, elsewhere: str) -> None:
    saved, now = asdict(load_config(path)), asdict(config)
    changed = [
        f"{section}.{key}"
        for section in now
        for key in now[section]
        if section not in ("pretrain", "study")
        and now[section][key] != saved[section][key]
        and (section, key) not in (("run", "folder"), ("model", "device"))
    ]
    if changed:
        raise InputError(
            f"{path}: the run has other settings ({', '.join(changed)}); choose another {elsewhere}, "
            f"or delete {path.parent} to start over"
        )


def check_origin(folder: Path, origin: dict[str, str], told: dict[str, str], elsewhere: str) -> None:
    """Writes origin.json, what a run began with, or holds a run that goes on to it.

    Args:
        folder: of the run.
        origin: what it would begin with now.
        told: for each key that must be as it was, in words what another value means.
        elsewhere: as in claim_folder.
    Raises: InputError if a value is another one.
    """
    path = folder / "origin.json"
    if not path.exists():
        write_json(path, origin)
    began = read_json(path)
    for key, words in told.items():
        if began.get(key) != origin[key]:
            raise InputError(
                f"{path}: the run began with {words}; choose another {elsewhere}, or delete {folder} to start over"
            )


def check_views_codes(model: Model, name: str) -> None:
    """Raise InputError if the model sees images as features: captions are trained on image codes."""
    if not model.views_codes:
        raise InputError(
            f"{name}: sees images through a vision encoder, and self-play trains captions of "
            "image codes; choose a checkpoint without it, such as showlab/show-o-512x512"
        )


def export_model(source: str, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes a model in its family's published layout, all at once.

    Args:
        source: a run's folder, whose last trained round is taken, or what load_model opens.
        folder: where to; a new or an empty one.
        dtype: of the weights; None keeps theirs.
    Raises: InputError if there is no such model, its family has no published layout, or the folder holds anything.
    """
    rounds = sorted(Path(source).glob("round-*/model"), key=lambda path: int(path.parent.name.removeprefix("round-")))
    if not rounds and (Path(source) / "config.toml").is_file():
        raise InputError(f"{source}: no round of this run is trained yet; run it first, or give a model")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: there is something already; choose another folder, or remove it")
    model = load_model(str(rounds[-1]) if rounds else source)
    if not model.is_published:
        raise InputError(f"{source}: its family has no published layout; its folder is what load_model opens")
    with atomic_folder(folder) as temporary:
        model.save(temporary, dtype)
