"""Folders of published files: on this machine, or fetched once from the Hugging Face hub and kept in its cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .files import InputError


def find_folder(name: str, files: Sequence[str], what: str, example: str = "showlab/show-o-512x512") -> Path:
    """The folder of that path, or the cached snapshot of the hub repository of that name.

    Args:
        name: a folder, or a hub id such as "showlab/show-o-512x512".
        files: patterns of the files that are needed from the hub; no code is among them.
        what: what it should be, for the message, such as "model".
        example: a hub id of one.
    Raises: InputError if there is no such folder and the hub does not give it either.
    """
    folder = Path(name)
    if name and folder.is_dir():
        return folder
    if not name or name.count("/") > 1 or name.startswith(("/", ".", "~")):
        raise InputError(f"no {what} {name!r}: give a folder, or a hub id such as {example}")
    from huggingface_hub import snapshot_download  # loaded only where it is needed: it takes a while

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # of huggingface_hub, its HTTP client and the file system
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(
            f"no {what} {name!r}: there is no such folder, and the hub does not give it ({reason}); check the name and "
            f"the network connection, or fetch it elsewhere (hf download {name}) and give the folder"
        ) from error
