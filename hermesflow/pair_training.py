"""Pair-DPO on a file of pairs, without a run: in one folder, resumable at every checkpoint.

    FOLDER/  config.toml  origin.json  training.json  model/
      train/  step-*/  metrics.jsonl  reference.parquet
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from .config import Config
from .distributed import barrier, is_main
from .files import InputError, atomic_folder, write_json
from .models import Model, open_model
from .origins import check_origin, check_views_codes, claim_folder, model_digest
from .pairs import SIDES, read_pairs
from .published_pairs import read_published_pairs
from .sources import describe_rejected
from .trackers import check_tracker
from .training import train_pairs

_ELSEWHERE = "output folder (-o)"
_LOGGER = logging.getLogger(__name__)


def train_on_pairs(
    config: Config, path: str | os.PathLike, folder: str | os.PathLike, root: str | os.PathLike | None = None
) -> Path:
    """Trains a model on a file of pairs, going on where an earlier call of the same settings and pairs stopped.

    Args:
        config: model and train are used, run.seed, and for a published file curation.threshold.
        path: pairs.parquet of any run, or a published pair_dpo_data.json, whose images are encoded.
        folder: receives config.toml, train/ as train_pairs fills it, training.json with the means over the last tenth
            of the steps, and the trained model/.
        root: the folder that a published file's image paths start from; None is the file's own.
    Returns: the path of the trained model.
    Raises: InputError if the file cannot be used, a pair does not fit the model, or the folder holds results of other
        settings, weights or pairs.
    """
    check_tracker(config.train.tracker)
    folder, path = Path(folder), Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give pairs.parquet of a run or a published pair_dpo_data.json")
    pairs = read_pairs(path) if path.suffix == ".parquet" else None
    if any(folder.glob("round-*")):
        raise InputError(f"{folder}: holds a run of self-play; choose another {_ELSEWHERE}")
    lock = claim_folder(folder, config, _ELSEWHERE) if is_main() else None
    try:
        # A step of 2e-5 is lost in the 8 bits of bf16.
        model = open_model(replace(config.model, dtype="float32"))
        check_views_codes(model, config.model.name)
        if pairs is None:
            pairs, rejected = read_published_pairs(model, path, root, config.curation.threshold)
            if len(rejected):
                _LOGGER.info("%s: left out %s", path, describe_rejected(rejected.to_pylist()[:: len(SIDES)]))
        _check_pairs(pairs, model, path, config.model.name)
        if is_main():
            origin = {"pairs": _digest(pairs), "model": model_digest(model)}
            told = {"pairs": f"other pairs than {path} holds now"}
            told["model"] = f"other weights than {config.model.name!r} holds now"
            check_origin(folder, origin, told, _ELSEWHERE)
        target = folder / "model"
        if not (target.exists() and (folder / "training.json").exists()):
            means = train_pairs(model, pairs, config.train, seed=config.run.seed, folder=folder / "train")
            if is_main():
                write_json(folder / "training.json", means)
                with atomic_folder(target) as temporary:
                    model.save(temporary)
        barrier()
        return target
    finally:
        if lock is not None:
            lock.close()


def _digest(pairs: pa.Table) -> str:
    """A fingerprint of all columns, wherever the file lies and however it is stored."""
    digest = hashlib.blake2b(digest_size=16)
    for row in _rows(pairs):
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def _check_pairs(pairs: pa.Table, model: Model, path: Path, name: str) -> None:
    """Refuses pairs of another model, or with holes, with the first record that shows it."""
    for row in _rows(pairs):
        try:
            _check_row(row, model)
        except ValueError as error:
            reason = str(error).partition("; ")[0]
            raise InputError(
                f"{path}: record {row['record_id']}: {reason}; give pairs that were made with {name!r}, or the "
                "--model that made these"
            ) from error


def _check_row(row: dict, model: Model) -> None:
    layout, sides = model.layout, row["sides"]
    if sides not in ("both", "generation", "understanding"):
        raise ValueError(f"sides is {sides!r}, expected both, generation or understanding")
    codes, ids = [], []
    if sides != "understanding":
        model.encode_text(_present(row, "caption"))
        codes += ["win_codes", "lose_codes"]
    if sides != "generation":
        codes.append("record_codes")
        ids += ["win_caption_ids", "lose_caption_ids"]
    for name in codes:
        if len(_present(row, name)) != layout.num_image_tokens:
            raise ValueError(f"{name} has {len(row[name])} tokens, the model's image {layout.num_image_tokens}")
        _check_range(name, row[name], layout.codebook_size, "codebook")
    for name in ids:
        _check_range(name, _present(row, name), layout.vocab_size, "vocabulary")


def _present(row: dict, name: str) -> str | list[int]:
    if row[name] is None:
        raise ValueError(f"{name} is missing, which sides {row['sides']!r} needs")
    return row[name]


def _check_range(name: str, values: Sequence[int | None], size: int, what: str) -> None:
    for value in values:
        if value is None or not 0 <= value < size:
            raise ValueError(f"{name} holds {value}, the model's {what} has {size}")


def _rows(pairs: pa.Table) -> Iterator[dict]:
    """Rows one by one; as Python objects a large file would not fit into memory."""
    for batch in pairs.to_batches(256):
        yield from batch.to_pylist()
