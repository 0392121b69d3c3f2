"""Pairs in the published layout: pair_dpo_data.json with its images as files.

The published code keeps images as PNG, and decoding and encoding again changes most of an image's tokens (Show-o, issue
74: 41 % stay). Between runs of this library, pairs.parquet carries the tokens themselves.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from hermesflow.config import load_config
from hermesflow.data.encoding import encode_lazily
from hermesflow.data.entries import read_entries
from hermesflow.data.locations import path_inside
from hermesflow.data.pairs import PAIRS_SCHEMA, REJECTED_SCHEMA, SIDES, read_pairs
from hermesflow.data.preference_tables import write_preference_tables
from hermesflow.data.records import png_bytes
from hermesflow.data.sources import describe_rejected, id_of, text_of
from hermesflow.models.family import open_model
from hermesflow.models.images import decode_image
from hermesflow.models.model import Model
from hermesflow.runtime.files import InputError, StrPath, atomic_write, read_bytes, write_json
from hermesflow.runtime.progress import track

FILE_NAME = "pair_dpo_data.json"
_BATCH_PAIRS = 8
# Published key of an image -> column of its codes.
_IMAGES = {"img_path": "record_codes", "image_win": "win_codes", "image_lose": "lose_codes"}
# Published keys of each side, and the columns that hold the same.
_COLUMNS = {
    "generation": {"vqa_score_win": "win_image_score", "vqa_score_lose": "lose_image_score"},
    "understanding": {
        "caption_win": "win_caption",
        "caption_lose": "lose_caption",
        "bert_score_win": "win_caption_score",
        "bert_score_lose": "lose_caption_score",
    },
}


class _Entry(NamedTuple):
    """A published entry that was found sound: the row it makes, without codes, and its image files."""

    row: dict[str, Any]
    images: dict[str, Path]


def export_pairs(run_folder: StrPath, number: int, folder: StrPath, layout: str = "published") -> Path:
    """Writes the pairs of a run's round, decoded by the model that the run began with.

    Args:
        run_folder: runs/NAME.
        number: the round, from 1.
        folder: see write_published_pairs.
        layout: "published", or "datasets" (preference_tables.py).
    Returns: the path of the JSON file, or the folder.
    Raises: InputError if the run or its round is missing or damaged, or the folder cannot be written.
    """
    config = load_config(Path(run_folder) / "config.toml")
    pairs = read_pairs(Path(run_folder) / f"round-{number}" / "pairs.parquet")
    write = {"published": write_published_pairs, "datasets": write_preference_tables}[layout]
    return write(open_model(config.model), pairs, folder)


def write_published_pairs(model: Model, pairs: pa.Table, folder: StrPath) -> Path:
    """Writes pairs as pair_dpo_data.json, valid JSON, with images/*.png beside it.

    Paths are relative to the folder. Prompt and caption are the same text. What belongs to a side that a pair lacks is
    null; the published code needs both sides.

    Args:
        model: decodes the images.
        pairs: with PAIRS_SCHEMA.
        folder: made if need be; files of the same names are replaced, others stay.
    Returns: the path of the JSON file, which is written last.
    Raises: InputError if a file cannot be written.
    Source: README of Gen-Verse/HermesFlow.
    """
    folder, entries = Path(folder), []
    for start in track(range(0, len(pairs), _BATCH_PAIRS), "export pairs", "batches"):
        rows = pairs.slice(start, _BATCH_PAIRS).to_pylist()
        found = [(index, key, row[column]) for index, row in enumerate(rows) for key, column in _IMAGES.items()]
        found = [item for item in found if item[2] is not None]
        pixels = model.decode_images(torch.tensor([codes for _, _, codes in found]))
        names: list[dict[str, str]] = [{} for _ in rows]
        for (index, key, _), image in zip(found, pixels, strict=True):
            # Numbered, since an id may be no file name.
            names[index][key] = f"images/{start + index:06d}-{key}.png"
            kept = rows[index].get("record_image") if key == "img_path" else None
            with atomic_write(folder / names[index][key]) as temporary:
                temporary.write_bytes(kept or png_bytes(image))
        entries += [_published(row, images) for row, images in zip(rows, names, strict=True)]
    write_json(folder / FILE_NAME, entries)
    return folder / FILE_NAME


def read_published_pairs(
    model: Model, path: StrPath, root: StrPath | None = None, threshold: float = 0.6
) -> tuple[pa.Table, pa.Table]:
    """Reads pair_dpo_data.json, valid or as the published scripts write it; images are encoded a batch at a time.

    An entry is rejected where a score of a win is not above that of its lose, and where the win's image is not above
    the threshold: the published scripts write such entries too, the latter with images of another record.

    Args:
        model: encodes the images, and must know the words of the captions.
        path: the file.
        root: the folder that image paths start from and may not leave; None is the folder of `path`.
        threshold: what a win's image scores more than, as curation.threshold.
    Returns: (pairs with PAIRS_SCHEMA, rejected with REJECTED_SCHEMA), both in the file's order.
    Raises: InputError if the file is missing or damaged, or no entry can be used.
    Source: README, datasets/journeydb/get_dpo_data.py and get_dpo_data_iterative.py of Gen-Verse/HermesFlow.
    """
    root, entries, unusable = Path(path).parent if root is None else Path(root), {}, []
    for number, row in enumerate(read_entries(path), 1):
        id = f"entry {number}"
        try:
            id = id_of(row)
            if id in entries:
                raise ValueError("duplicate id: an earlier entry has it")
            entries[id] = _check_entry(model, id, row, root, threshold)
        except ValueError as error:
            unusable.append({"record_id": id, "reason": str(error)})
    pairs = []
    for entry, codes in encode_lazily(model, entries.values(), lambda entry: _open_images(model, entry), len(entries)):
        if isinstance(codes, str):
            unusable.append({"record_id": entry.row["record_id"], "reason": codes})
        else:
            columns = (_IMAGES[key] for key in entry.images)
            row = entry.row | dict(zip(columns, codes, strict=True))
            if not model.views_codes:
                path = entry.images["img_path"]
                row["record_image"] = png_bytes(decode_image(read_bytes(path), str(path), model.fit))
            pairs.append(row)
    if not pairs:
        raise InputError(f"{path}: no pair can be used ({describe_rejected(unusable)}); mend the file")
    rejected = [row | {"side": side} for row in unusable for side in SIDES]
    return pa.Table.from_pylist(pairs, PAIRS_SCHEMA), pa.Table.from_pylist(rejected, REJECTED_SCHEMA)


def _published(row: dict[str, Any], images: dict[str, str]) -> dict[str, Any]:
    name = row["record_id"]  # the published ids are numbers
    entry = {"id": int(name) if re.fullmatch(r"0|[1-9][0-9]*", name) else name, "img_path": images["img_path"]}
    entry |= {"prompt": row["caption"], "caption": row["caption"]}
    entry |= {key: row[column] for key, column in _COLUMNS["understanding"].items()}
    entry |= {key: images.get(key) for key in ("image_win", "image_lose")}
    return entry | {key: row[column] for key, column in _COLUMNS["generation"].items()}


def _check_entry(model: Model, id: str, entry: dict[str, Any], root: Path, threshold: float) -> _Entry:
    """Raises: ValueError with the reason why the entry cannot be used."""
    keys = {
        "generation": ("image_win", "image_lose", *_COLUMNS["generation"]),
        "understanding": tuple(_COLUMNS["understanding"]),
    }
    sides = [side for side in SIDES if any(entry.get(key) is not None for key in keys[side])]
    if not sides:
        raise ValueError("no sides: the entry has neither images nor captions to prefer")
    row = dict.fromkeys(PAIRS_SCHEMA.names)
    row |= {"record_id": id, "category": "other", "caption": text_of(entry, "caption")}
    row["sides"] = "both" if len(sides) == 2 else sides[0]
    _encode(model, row["caption"])
    images = {"img_path": path_inside(root, text_of(entry, "img_path"))}
    if "generation" in sides:
        images |= {key: path_inside(root, text_of(entry, key)) for key in ("image_win", "image_lose")}
        win, lose = (_score(entry, key) for key in _COLUMNS["generation"])
        _check_order(win, lose, "vqa_score", alike=images["image_win"] == images["image_lose"])
        if win <= threshold:
            raise ValueError(f"best image not above threshold: it scores {win:g}, needed is more than {threshold:g}")
        row |= {"win_image_score": win, "lose_image_score": lose}
    if "understanding" in sides:
        win, lose = (_score(entry, key) for key in ("bert_score_win", "bert_score_lose"))
        texts = [text_of(entry, key) for key in ("caption_win", "caption_lose")]
        _check_order(win, lose, "bert_score", alike=texts[0] == texts[1])
        row |= {"win_caption_score": win, "lose_caption_score": lose}
        for role, text in zip(("win", "lose"), texts, strict=True):
            ids = _encode(model, text)[: model.prompts.max_caption_tokens]
            row |= {f"{role}_caption": text, f"{role}_caption_ids": ids}
    return _Entry(row, images)


def _check_order(win: float, lose: float, name: str, *, alike: bool) -> None:
    if alike:
        raise ValueError(f"win and lose alike: {name} {win:g} and {lose:g} are of the same thing")
    if win <= lose:
        raise ValueError(f"win not above lose: {name}_win is {win:g}, {name}_lose {lose:g}")


def _score(entry: dict[str, Any], key: str) -> float:
    value = entry.get(key)
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:  # isfinite fails on a huge int
        raise ValueError(f"wrong type: {key} is {str(value)[:80]!r}, expected a finite number")
    return float(value)


def _encode(model: Model, text: str) -> list[int]:
    try:
        return model.encode_text(text)
    except InputError as error:
        raise ValueError(f"unknown word: {str(error).partition('; ')[0]}") from error


def _open_images(model: Model, entry: _Entry) -> list[np.ndarray]:
    try:
        return [decode_image(read_bytes(path), str(path), model.fit) for path in entry.images.values()]
    except InputError as error:
        raise ValueError(f"damaged image: {error}") from error
