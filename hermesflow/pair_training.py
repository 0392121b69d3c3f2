"""Pair-DPO on a file of pairs, without a run: in one folder, resumable at every checkpoint.

    FOLDER/  config.toml  origin.json  training.json  model/
      train/  step-*/  metrics.jsonl  reference.parquet
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from hermesflow.algorithms.packing import check_pairs
from hermesflow.config import Config, TrainConfig
from hermesflow.data.pairs import SIDES, each_row, read_pairs
from hermesflow.data.published_pairs import read_published_pairs
from hermesflow.data.sources import describe_rejected
from hermesflow.models.family import open_model
from hermesflow.models.model import Model, model_digest
from hermesflow.runs import check_origin, check_views_codes, claim_folder
from hermesflow.runtime.distributed import on_main
from hermesflow.runtime.files import InputError, atomic_folder, write_json
from hermesflow.runtime.trackers import check_tracker
from hermesflow.training import train_pairs

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
    with contextlib.ExitStack() as held:

        def claim() -> None:
            held.enter_context(claim_folder(folder, config, _ELSEWHERE))

        on_main(claim)
        model, pairs = _open(config, path, root, pairs)
        origin = {"pairs": _digest(pairs), "model": model_digest(model)}
        told = {
            "pairs": f"other pairs than {path} holds now",
            "model": f"other weights than {config.model.name!r} holds now",
        }
        on_main(lambda: check_origin(folder, origin, told, _ELSEWHERE))
        if not on_main(lambda: (folder / "model").exists() and (folder / "training.json").exists()):
            train_and_save(model, pairs, config.train, seed=config.run.seed, folder=folder)
    return folder / "model"


def train_and_save(model: Model, pairs: pa.Table, config: TrainConfig, *, seed: int, folder: Path) -> None:
    """Trains with train_pairs in folder/train; then the first process writes folder/training.json and folder/model."""
    means = train_pairs(model, pairs, config, seed=seed, folder=folder / "train")

    def save() -> None:
        write_json(folder / "training.json", means)
        with atomic_folder(folder / "model") as temporary:
            model.save(temporary)

    on_main(save)


def _open(
    config: Config, path: Path, root: str | os.PathLike | None, pairs: pa.Table | None
) -> tuple[Model, pa.Table]:  # fmt: skip
    """The model, and the pairs, which fit it; None are still to be read from a published file."""
    # A step of 2e-5 is lost in the 8 bits of bf16.
    model = open_model(replace(config.model, dtype="float32"))
    check_views_codes(model, config.model.name)
    if pairs is None:
        pairs, rejected = read_published_pairs(model, path, root, config.curation.threshold)
        if len(rejected):
            _LOGGER.info("%s: left out %s", path, describe_rejected(rejected.to_pylist()[:: len(SIDES)]))
    try:
        check_pairs(pairs, model)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return model, pairs


def _digest(pairs: pa.Table) -> str:
    """A fingerprint of all columns, wherever the file lies and however it is stored."""
    digest = hashlib.blake2b(digest_size=16)
    for row in each_row(pairs):
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()
