"""Folders of published files: on this machine, or fetched once from the Hugging Face hub and kept in its cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hermesflow.runtime.files import InputError, reason_of, shown


def find_folder(name: str, files: Sequence[str], what: str, example: str = "showlab/show-o-512x512") -> Path:
    """The folder of that path, or the cached snapshot of the hub repository of that name.

    Args:
        name: a folder, or a hub id such as "showlab/show-o-512x512".
        files: patterns of the files that are needed from the hub; no code is among them.
        what: what it should be, for the message, such as "model".
        example: a hub id of one.
    Raises: InputError if there is no such folder and the hub does not give it either.
    """
    if name and os.path.isdir(name):  # unlike Path.is_dir it raises nothing on a name that is too long
        return Path(name)
    local = name.startswith(("/", ".", "~")) or ("/" in name and os.path.isdir(name.partition("/")[0]))
    if not name or name.count("/") > 1 or local:
        raise InputError(f"no {what} {shown(name)}: give a folder, or a hub id such as {example}")
    try:
        return _snapshot(name, allow_patterns=list(files))
    except Exception as error:  # of huggingface_hub, its HTTP client and the file system
        raise InputError(
            f"no {what} {shown(name)}: there is no such folder, and the hub does not give it ({reason_of(error)}); "
            f"check the name and the network connection, or fetch it elsewhere (hf download {name}) and give the folder"
        ) from error


def find_dataset(name: str, files: Sequence[str]) -> Path:
    """The folder of a data set's files on the hub; what was fetched before, and has not changed, is not fetched again.

    Args:
        name: the hub's id of the data set.
        files: patterns of those that are needed.
    Raises: InputError if the hub does not give them.
    """
    try:
        return _snapshot(name, repo_type="dataset", allow_patterns=list(files))
    except Exception as error:  # of huggingface_hub, its HTTP client and the file system
        raise InputError(
            f"no data {shown(name)}: there is no such file or folder, and the hub does not give it "
            f"({reason_of(error)}); check the name and the network connection, or fetch it elsewhere "
            f"(hf download --repo-type dataset {name}) and give the folder"
        ) from error


def _snapshot(name: str, **options: Any) -> Path:
    from huggingface_hub import snapshot_download  # loaded only where it is needed: it takes a while

    return Path(snapshot_download(name, **options))
