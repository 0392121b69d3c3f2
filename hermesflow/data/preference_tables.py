"""Pairs as tables of the datasets library: prompt, chosen, rejected and images, as trainers of others read them.

    FOLDER/generation.parquet      prompt (text), chosen and rejected (images)
    FOLDER/understanding.parquet   images (a list of one), prompt, chosen and rejected (text)
    FOLDER/README.md               the card, by which load_dataset(FOLDER, "generation") finds them

Source: the preference columns of trl's DPOTrainer, and of pickapic for images.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from hermesflow.data.records import png_bytes
from hermesflow.models.model import Model
from hermesflow.runtime.files import StrPath, make_folder, parquet_writer, write_text
from hermesflow.runtime.progress import track

_BATCH_PAIRS = 8
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_SCORES = [("chosen_score", pa.float32()), ("rejected_score", pa.float32())]
_NAMES = [("id", pa.string()), ("category", pa.string()), ("prompt", pa.string())]


def _schema(columns: list[tuple[str, pa.DataType]]) -> pa.Schema:
    """With what the datasets library reads of its own, so that images are shown as such."""
    features = {name: _feature(kind) for name, kind in columns}
    return pa.schema(columns, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _feature(kind: pa.DataType) -> dict[str, Any]:
    if kind == _IMAGE:
        return {"_type": "Image"}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    return {"dtype": "float32" if kind == pa.float32() else "string", "_type": "Value"}


GENERATION_SCHEMA = _schema([*_NAMES, ("chosen", _IMAGE), ("rejected", _IMAGE), *_SCORES])
UNDERSTANDING_SCHEMA = _schema(
    [*_NAMES, ("images", pa.list_(_IMAGE)), ("chosen", pa.string()), ("rejected", pa.string()), *_SCORES]
)
_CARD = """---
configs:
- config_name: generation
  data_files: generation.parquet
- config_name: understanding
  data_files: understanding.parquet
tags: [preference, hermesflow]
---
Preference pairs of a model's own images and captions, made by hermesflow: `generation` prefers an image of a prompt,
`understanding` a caption of an image. Scores are those of the judge that chose.
"""


def write_preference_tables(model: Model, pairs: pa.Table, folder: StrPath) -> Path:
    """Writes pairs as tables of the datasets library.

    Args:
        model: decodes the images, and has the question that captions answer.
        pairs: with PAIRS_SCHEMA; each side that a pair has becomes a row.
        folder: made if need be; files of the same names are replaced.
    Returns: the folder.
    Raises: InputError if a file cannot be written.
    """
    folder = make_folder(folder)
    with (
        parquet_writer(folder / "generation.parquet", GENERATION_SCHEMA) as write_generation,
        parquet_writer(folder / "understanding.parquet", UNDERSTANDING_SCHEMA) as write_understanding,
    ):
        for start in track(range(0, len(pairs), _BATCH_PAIRS), "export pairs", "batches"):
            rows = pairs.slice(start, _BATCH_PAIRS).to_pylist()
            drawn = [_generation(model, row) for row in rows if row["win_codes"] is not None]
            said = [_understanding(model, row) for row in rows if row["win_caption"] is not None]
            write_generation(pa.Table.from_pylist(drawn, GENERATION_SCHEMA))
            write_understanding(pa.Table.from_pylist(said, UNDERSTANDING_SCHEMA))
    write_text(folder / "README.md", _CARD)
    return folder


def _generation(model: Model, row: dict[str, Any]) -> dict[str, Any]:
    images = model.decode_images(torch.tensor([row["win_codes"], row["lose_codes"]]))
    chosen, rejected = ({"bytes": png_bytes(image), "path": None} for image in images)
    scores = {"chosen_score": row["win_image_score"], "rejected_score": row["lose_image_score"]}
    return _named(row, row["caption"]) | {"chosen": chosen, "rejected": rejected} | scores


def _understanding(model: Model, row: dict[str, Any]) -> dict[str, Any]:
    image = row.get("record_image") or png_bytes(model.decode_images(torch.tensor([row["record_codes"]]))[0])
    scores = {"chosen_score": row["win_caption_score"], "rejected_score": row["lose_caption_score"]}
    texts = {"chosen": row["win_caption"], "rejected": row["lose_caption"]}
    images = {"images": [{"bytes": image, "path": None}]}
    return _named(row, model.prompts.caption_question) | images | texts | scores


def _named(row: dict[str, Any], prompt: str) -> dict[str, Any]:
    return {"id": row["record_id"], "category": row["category"], "prompt": prompt}
