"""Where data lies: the files that a source names, here, at an address or on the hub; and paths inside its root."""

from __future__ import annotations

import contextlib
import glob
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hermesflow.models.hub import find_dataset
from hermesflow.runtime.files import InputError, StrPath, is_url, reason_of, shown

KINDS = ("*.parquet", "*.jsonl", "*.jsonl.gz", "*.json", "*.json.gz", "*.tar", "*.tar.gz")
"""What a folder is searched for: the files of the first that it has."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def files_of(path: StrPath) -> list[Path | str]:
    """The files that a source names, by name.

    Args:
        path: a file; a folder, whose own files of the first of KINDS count, or where it has none those below it; a
            pattern such as "train-*.parquet"; each of them here or at an address that fsspec opens (s3://, hf://); or
            the hub's id of a data set, "OWNER/NAME" or "OWNER/NAME/PATTERN", which is fetched once.
    Returns: paths here, or addresses.
    Raises: InputError if there are none, or the hub does not give them.
    """
    if is_url(path):
        return _files_at(str(path))
    given = Path(path).expanduser()
    if not _can_be_looked_at(given):
        return [given]  # its reader says why
    if given.is_dir():
        return _in_folder(path, lambda pattern: sorted(given.glob(pattern)))
    if given.exists():
        return [given]
    if hub := _hub_id(str(path)):
        repo, pattern = hub
        return files_of(find_dataset(repo, [pattern] if pattern else KINDS) / pattern)
    if not glob.has_magic(str(path)):
        return [given]
    return _fitting(path, sorted(Path(name) for name in glob.glob(str(given), recursive=True) if os.path.isfile(name)))


def folder_of(file: Path | str) -> Path | str:
    """The folder of a file of files_of."""
    return posixpath.dirname(file) if isinstance(file, str) else file.parent


def checksum(url: str) -> str:
    """What tells a file at an address from another one of that name. Raises: InputError if it cannot be looked at."""
    import fsspec  # loaded only where it is needed

    with _looking_at(url):
        system, path = fsspec.core.url_to_fs(url)
        return str(system.checksum(path))


def _files_at(url: str) -> list[Path | str]:
    import fsspec  # loaded only where it is needed

    with _looking_at(url):
        system, path = fsspec.core.url_to_fs(url)
        if glob.has_magic(path):
            return _fitting(url, [system.unstrip_protocol(name) for name in sorted(system.glob(path))])
        if not system.isdir(path):
            return [url]
        return _in_folder(
            url, lambda kind: [system.unstrip_protocol(name) for name in sorted(system.glob(f"{path}/{kind}"))]
        )


@contextlib.contextmanager
def _looking_at(url: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of each file system its own, and of a package of it that is not installed
        raise InputError(
            f"{url}: cannot be looked at ({reason_of(error)}); check the address and what its file system needs"
        ) from error


def _in_folder(path: StrPath, find: Callable[[str], Sequence[Path | str]]) -> list[Path | str]:
    patterns = (*KINDS, *(f"**/{kind}" for kind in KINDS))
    found = next((files for pattern in patterns if (files := find(pattern))), [])
    if not found:
        raise InputError(f"{path}: holds none of {', '.join(KINDS)}; give the file, or the folder that has them")
    return list(found)


def _fitting(path: StrPath, found: list[Path | str]) -> list[Path | str]:
    if not found:
        raise InputError(f"{path}: no file fits this pattern; check it")
    return found


def _hub_id(name: str) -> tuple[str, str] | None:
    """(the hub's id, what is wanted of it) of a name that may be one: no file is there, nor its first folder."""
    owner, _, rest = name.partition("/")
    repo, _, pattern = rest.partition("/")
    whole = f"{owner}/{repo}"
    is_file = not pattern and any(rest.endswith(kind[1:]) for kind in KINDS)
    if is_file or not _HUB_ID.fullmatch(whole) or os.path.isdir(owner) or ".." in pattern.split("/"):
        return None
    return whole, pattern


def path_inside(root: Path | str, name: str, start: Path | str | None = None) -> Path | str:
    """The file that a path from a data set means.

    Args:
        root: the folder that it may not leave. Files of a hub cache may be links to its blobs.
            At an address nothing is looked for before it is read.
        name: the path.
        start: where it starts if there is no such file in root; must lie in root to be of use.
    Returns: the file, symbolic links followed.
    Raises: ValueError if it lies outside the root or is no file.
    """
    if isinstance(root, str):
        return _address_inside(root, name)
    if isinstance(start, str):  # the data lies at an address, and its images here
        start = None
    try:
        start = root if start is None or os.path.lexists(root / name) else start
        path = (start / name).resolve()
        inside = any(path.is_relative_to(each.resolve()) for each in (root, *_blobs_of(start)))
        there, plain = path.is_file(), Path(os.path.abspath(start / name))
    except (OSError, RuntimeError, ValueError) as error:  # too long, a circle of links, a null byte
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"missing image: {shown(name)} is no path ({why})") from error
    if not inside and plain.is_relative_to(os.path.abspath(root)):
        raise ValueError(
            f"path leaves its root: {shown(name)} leads by a link to {path}, outside {root}; give a data.root that "
            "holds both"
        )
    if not inside:
        raise ValueError(f"path leaves its root: {shown(name)} is outside {root}")
    if not there:
        raise ValueError(f"missing image: there is no file {shown(name)} in {root}")
    return path


def _blobs_of(folder: Path) -> list[Path]:
    """REPO/blobs of the hub's cache, where a folder lies in REPO/snapshots/REV, whose files are links."""
    whole = Path(os.path.abspath(folder))
    snapshots = [each for each in (whole, *whole.parents) if each.parent.name == "snapshots"]
    return [each.parent.parent / "blobs" for each in snapshots if (each.parent.parent / "blobs").is_dir()]


def _address_inside(root: str, name: str) -> str:
    path = posixpath.normpath(name)
    if path.startswith(("/", "..")) or "://" in name or "::" in name or "\0" in name:
        raise ValueError(f"path leaves its root: {shown(name)} is outside {root}")
    return f"{root.rstrip('/')}/{path}"


def _can_be_looked_at(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except (OSError, ValueError):  # too long, a circle of links, a null byte
        return False
    return True
