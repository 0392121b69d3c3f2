"""Which settings of a run are fixed: those that something in its folder was made with; and whether its files changed.

What was made of a round fixes that round's settings alone, so that later rounds may have others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from hermesflow.config import Config
from hermesflow.data.locations import checksum, files_of
from hermesflow.runtime.files import InputError, damaged, read_json, write_json
from hermesflow.runtime.registry import SOURCES

FILES = {"data": ("source", "questions"), "eval": ("data", "questions")}
"""Settings that name files of records, by section."""
_FREE = (("run", "folder"), ("model", "device"), ("train", "tracker"))
"""Settings that no result depends on."""
_CHOOSES = ("threshold", "margin", "keep", "lose_caption")
"""Of curation: what makes pairs of candidates, and no candidates."""
_BLOCK_BYTES = 2**20


def changed_settings(folder: Path, saved: Config, now: Config) -> list[str]:
    """Names of the settings that differ though something in the run's folder was made with them.

    Args:
        folder: of the run.
        saved: its settings so far.
        now: those of this call.
    Returns: "section.key" each, or "round.K.section.key" where a round has its own.
    """
    moved, names = _moved_files(folder, saved, now), {}
    last = max(_rounds(folder), default=0)
    if now.selfplay.num_rounds < last:
        names["selfplay.num_rounds"] = None
    for number, section, key in _in_use(folder, saved, last):
        was, value = (getattr(getattr(config.of_round(number), section), key) for config in (saved, now))
        if was != value and (section, key) not in (*_FREE, *moved):
            own = any(key in config.round.get(number, {}).get(section, {}) for config in (saved, now))
            names[f"round.{number}.{section}.{key}" if own else f"{section}.{key}"] = None
    return list(names)


def all_changed_settings(saved: Config, now: Config) -> list[str]:
    """Names of all settings that differ, but for those that no result depends on."""
    before, after = asdict(saved), asdict(now)
    return [
        f"{section}.{key}"
        for section in after
        for key in after[section] | before[section]
        if section not in ("pretrain", "study") and before[section].get(key) != after[section].get(key)
        if (section, key) not in _FREE
    ]


def is_measured(folder: Path) -> bool:
    """Whether something in the run's folder was measured, if only a part."""
    return any(
        path for name in ("evaluation.json", "evaluation/part-*.json") for path in folder.glob(f"round-*/{name}")
    )


def changed_training_settings(saved: Config, now: Config) -> list[str]:
    """Names of the settings that differ and that a training on a file of pairs reads."""
    read = ("model", "train", "run.seed", "selfplay.algorithm", "curation.threshold")
    return [name for name in all_changed_settings(saved, now) if name in read or name.split(".")[0] in read]


def note_files(folder: Path, config: Config, section: str) -> None:
    """Notes in files.json what a section's files of records hold, before something is made of them. What cannot be
    read is left to its reader to refuse."""
    noted = _noted_files(folder) | described_files(config, section)
    if noted:
        write_json(folder / "files.json", noted)


def described_files(config: Config, section: str) -> dict[str, dict[str, str]]:
    """{"section.key": {"digest": of what a section's files of records hold, "seen": their sizes and times}}."""
    return {
        f"{section}.{key}": {"digest": digest, "seen": _seen(path)}
        for key, path in _named_files(config, section)
        if (digest := _files_digest(path))
    }


def changed_files(folder: Path, config: Config, section: str) -> list[str]:
    """Those of a section's files of records that hold something else than when they were noted; one that is no more
    there did not change. Files of the sizes and times that were noted are not read again."""
    noted, changed = _noted_files(folder), []
    for key, path in _named_files(config, section):
        was = noted.get(f"{section}.{key}")
        if was is None or was["seen"] and was["seen"] == _seen(path):
            continue
        digest = _files_digest(path)
        if digest is not None and was["digest"] != digest:
            changed.append(path)
    return changed


def _files_digest(path: str) -> str | None:
    """A fingerprint of what a file of records, or each of a folder's, holds; None if it cannot be read. At an address
    what its file system says of the file stands in."""
    seen = _seen(path)
    return _digest_as_seen(path, seen) if seen else _digest_as_seen.__wrapped__(path, seen)


@lru_cache(16)
def _digest_as_seen(path: str, seen: str) -> str | None:
    digest = hashlib.blake2b(digest_size=16)
    try:
        for file in files_of(path):
            if isinstance(file, str):
                digest.update(checksum(file).encode())
                continue
            if not file.is_file():  # a pipe would wait
                return None
            digest.update(f"{file.stat().st_size};".encode())
            with file.open("rb") as stream:
                while block := stream.read(_BLOCK_BYTES):
                    digest.update(block)
    except (InputError, OSError):
        return None
    return digest.hexdigest()


def _seen(path: str) -> str:
    """Sizes and times of files here; empty if they cannot be looked at."""
    try:
        stats = [file.stat() for file in files_of(path) if isinstance(file, Path)]
    except (InputError, OSError):
        return ""
    return ";".join(f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}" for stat in stats)


def _named_files(config: Config, section: str) -> Iterator[tuple[str, str]]:
    """(key, path) of a section's files of records."""
    for key in FILES[section]:
        path = getattr(getattr(config, section), key)
        if path and not (section == "data" and path in SOURCES):
            yield key, path


def _noted_files(folder: Path) -> dict[str, dict[str, str]]:
    path = folder / "files.json"
    noted = read_json(path) if path.exists() else {}
    if not isinstance(noted, dict):
        raise damaged(path, "list of files", ValueError("it is no object"))
    # An older file has the digest alone.
    return {key: was if isinstance(was, dict) else {"digest": was, "seen": ""} for key, was in noted.items()}


def _moved_files(folder: Path, saved: Config, now: Config) -> list[tuple[str, str]]:
    """Settings whose path is another one, where the file there holds what the run began with."""
    noted = _noted_files(folder)
    return [
        (section, key)
        for section in FILES
        for key, path in _named_files(now, section)
        if path != getattr(getattr(saved, section), key) and f"{section}.{key}" in noted
        if _files_digest(path) == noted[f"{section}.{key}"]["digest"]
    ]


def _rounds(folder: Path) -> list[int]:
    """The rounds that something was made of, but for round 0."""
    numbers = (path.name.removeprefix("round-") for path in folder.glob("round-*") if any(path.iterdir()))
    return [int(number) for number in numbers if number.isdecimal() and int(number)]


def _in_use(folder: Path, config: Config, last: int) -> Iterator[tuple[int, str, str]]:
    """(round, section, key) of each setting that something was made with; round 0 stands for the run."""
    yield from _keys(config, 0, "run", "model")
    yield 0, "selfplay", "fresh_prompts"
    if last or (folder / "records.parquet").exists():
        yield from (each for each in _keys(config, 0, "data") if each[2] != "num_records")
    for number in range(1, last + 1):
        yield number, "data", "num_records"  # where a round's records begin depends on the rounds before it
    if is_measured(folder):
        yield from _keys(config, 0, "eval")
    of_rounds = [each for number in range(1, last + 1) for each in _in_use_of_round(folder, config, number)]
    if is_measured(folder) or of_rounds:
        yield from _keys(config, 0, "drawing")
    yield from of_rounds


def _in_use_of_round(folder: Path, config: Config, number: int) -> Iterator[tuple[int, str, str]]:
    of_round = folder / f"round-{number}"
    is_drawn = any(of_round.glob("candidates/part-*.parquet"))
    has_pairs = (of_round / "pairs.parquet").exists()
    is_trained = any(any(of_round.glob(name)) for name in ("train/step-*", "model", "training.json"))
    if is_drawn or has_pairs or is_trained:
        yield number, "selfplay", "algorithm"
    for each in _keys(config, number, "curation"):
        if is_trained or (has_pairs if each[2] in _CHOOSES else is_drawn):
            yield each
    if is_trained:
        yield from _keys(config, number, "train", "grpo", "own_drawings")


def _keys(config: Config, number: int, *sections: str) -> Iterable[tuple[int, str, str]]:
    return [(number, section, key) for section in sections for key in asdict(getattr(config, section))]


def describe_way_out(folder: Path, changed: Sequence[str], elsewhere: str) -> str:
    """What one may do who wants these settings: what keeps the run comes first."""
    ways = []
    with_pairs, last = sorted(folder.glob("round-*/pairs.parquet")), max(_rounds(folder), default=0)
    sections = {name.split(".")[-2] for name in changed}
    if with_pairs and sections == {"train"}:
        ways.append(f"train on its pairs by `hermesflow train --pairs {with_pairs[0]} -o FOLDER`")
    if last and sections <= {"curation", "train", "grpo", "own_drawings"} and changed[0].split(".")[0] != "round":
        ways.append(f"set it for a later round, as round.{last + 1}.{changed[0]}")
    settings = folder / "config.toml"
    ways += [f"choose another {elsewhere}", f"take its own by --config {settings}"]
    return f"{', '.join(ways)}, or delete {folder} to start over"
