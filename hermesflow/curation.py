"""Curation: each record's candidate images and captions with their scores, in parts from which a killed run resumes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from hermesflow.config import DRAWING, CurationConfig, print_of
from hermesflow.data.encoding import record_views
from hermesflow.data.pairs import PairFile
from hermesflow.data.records import Record
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.models.model import Model
from hermesflow.runtime.claims import Claims
from hermesflow.runtime.distributed import rank, world_size
from hermesflow.runtime.files import InputError, ParquetRows, StrPath, damaged, make_folder, read_parquet, write_parquet
from hermesflow.runtime.parts import make_parts
from hermesflow.runtime.seeds import candidate_seeds
from hermesflow.scoring.scorers import Scorers
from hermesflow.scoring.self_answers import Judged, check_record

CANDIDATES_SCHEMA = pa.schema(
    [
        ("record_id", pa.string()),
        ("kind", pa.string()),
        ("index", pa.int32()),
        ("seed", pa.int64()),
        ("token_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("score", pa.float32()),
        ("settings", pa.string()),
        ("answers", pa.string()),
    ]
)
"""kind is "image", "caption", "real" (the record's own image, where it is to be the win), "previous_win" or
"previous_lose" (the previous round's images, scored again). token_ids are image codes, or text ids without the end of
text; text is null for images. settings and answers are JSON: answers of an image a list of {"question", "answer",
"expected", "probability"}, of a caption the empty list."""

PreviousImages = dict[str, tuple[list[int], list[int]]]
"""Record id -> (win codes, lose codes) of the previous round."""

# What candidates depend on, in the order of older fingerprints, and what only chooses among them or splits them into
# parts; how images are drawn stands in the fingerprint with the model's own way filled in.
_DRAWN_BY = (
    "num_images",
    "caption_temperatures",
    "caption_top_k",
    "include_greedy",
    "score",
    "caption_scorer",
    "answer_scorer",
    "bert_model",
    "sentence_model",
)
_NOT_DRAWN_BY = ("threshold", "margin", "keep", "lose_caption", "batch_records", *DRAWING)
_FINGERPRINT = b"hermesflow.fingerprint"


def curate(
    model: Model, records: Sequence[Record], config: CurationConfig, **options: Any
) -> Iterator[tuple[list[Record], pa.Table]]:
    """Draws and scores every record's candidates, part by part: what is in memory does not grow with the records.

    With several processes each makes every so many-th part and yields those; the files are the same as one makes. Each
    part comes as soon as it is on the disk.

    Args:
        model, records, config, options: see Candidates.
    Yields: (the records of one of this process's parts, their candidates with CANDIDATES_SCHEMA), both in the records'
        order.
    Raises: InputError, at the call itself but for what a part alone shows, as Candidates.
    """
    return Candidates(model, records, config, **options).share()


class Candidates:
    """The candidates of records, in parts of which each is a file, folder/part-NNNNN.parquet, of config.batch_records
    records.

    Each record gets config.num_images images of its caption, scored by the model's own answers to its questions, and
    config.num_captions captions of its image, scored against its caption. A candidate's draws depend on the seed and
    the record alone, not on its part.

    Source: HermesFlow (arXiv 2502.12148), section 3.
    """

    def __init__(
        self,
        model: Model,
        records: Sequence[Record],
        config: CurationConfig,
        *,
        seed: int,
        folder: StrPath,
        previous: PairFile | None = None,
        judge: Callable[[], Model | None] = lambda: None,
        are_checked: bool = False,
    ) -> None:
        """
        Args:
            model: draws and judges. Do not resume a folder with another model.
            records: with codes, questions and ids of their own.
            config: numbers, sampling settings and scorers.
            seed: of this round; from 0 to 2**63 - 1.
            folder: of the parts.
            previous: the pairs of the previous round; their images of these records are scored again by this model, so
                that one judge compares old and new.
            judge: opens the model that scores images in place of this one; None: this one. Do not resume a folder with
                another judge.
            are_checked: the records come from encode_records and this model's words; else all are looked at now.
        Raises: InputError on parts of other records or settings, an unwritable folder, a record that cannot be curated
            or a word that the model does not know.
        """
        if not are_checked:
            _check_records(model, records)
        self._model, self._records, self._config, self._seed = model, records, config, seed
        self._previous, self._judge = previous, judge
        self.paths = part_paths(folder, len(records), config)
        _refuse_strange_parts(make_folder(folder), self.paths)

    @cached_property
    def _scorers(self) -> Scorers:
        return Scorers(self._config, self._judge())

    def _check_scorers(self, numbers: Sequence[int]) -> None:
        """Raises InputError if one of these parts is still to be made, and a scorer cannot be had."""
        if not all(self.paths[number].exists() for number in numbers):
            _ = self._scorers

    def share(self) -> Iterator[tuple[list[Record], pa.Table]]:
        """Makes this process's share of the parts, and yields each when it is on the disk; see curate."""
        self._check_scorers(range(rank(), len(self.paths), world_size()))
        numbers = make_parts(self.paths, self.make, "candidates", check=self.check)
        return (self.read(number) for number in numbers)

    def share_as_worker(self, claims: Claims) -> None:
        """Makes parts beside other workers until all are there.

        Args:
            claims: of this worker, in a folder that all share.
        Raises: InputError as make, or if a scorer cannot be had.
        """
        self._check_scorers(range(len(self.paths)))
        for _ in make_parts(self.paths, self.make, "candidates of all workers", claims=claims):
            pass

    def make(self, number: int) -> None:
        """Draws and scores a part, and writes its file. Raises: InputError if it cannot be written."""
        batch = self._batch(number)
        rows = _rows(
            self._model, batch, self._config, self._seed, _previous_images(batch, self._previous), self._scorers
        )
        table = pa.Table.from_pylist(rows, CANDIDATES_SCHEMA)
        write_parquet(self.paths[number], table.replace_schema_metadata({_FINGERPRINT: self._fingerprint(batch)}))

    def check(self, number: int) -> None:
        """Raises: InputError if the part that is there was made from other records or settings, or is damaged."""
        metadata = ParquetRows(self.paths[number]).schema.metadata or {}
        if metadata.get(_FINGERPRINT) != self._fingerprint(self._batch(number)).encode():
            raise _made_otherwise(self.paths[number])

    def read(self, number: int) -> tuple[list[Record], pa.Table]:
        """(the records of a part, their candidates). Raises: InputError if its file is damaged."""
        return self._batch(number), _read_part(self.paths[number])

    def _batch(self, number: int) -> list[Record]:
        size = self._config.batch_records
        return list(self._records[number * size : (number + 1) * size])

    def _fingerprint(self, batch: Sequence[Record]) -> str:
        return _fingerprint(self._model, batch, self._config, self._seed, _previous_images(batch, self._previous))


def part_paths(folder: StrPath, num_records: int, config: CurationConfig) -> list[Path]:
    """The files of the parts of so many records' candidates."""
    count = math.ceil(num_records / config.batch_records)
    return [Path(folder) / f"part-{number:05d}.parquet" for number in range(count)]


def caption_sampling(config: CurationConfig, max_new_tokens: int) -> list[SamplingParams]:
    """How each caption of an image is drawn: greedy once, then every top-k with every temperature."""
    greedy = [SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens)] if config.include_greedy else []
    return greedy + [
        SamplingParams(temperature=temperature, top_k=top_k, max_new_tokens=max_new_tokens)
        for top_k in config.caption_top_k
        for temperature in config.caption_temperatures
    ]


def _rows(
    model: Model, records: Sequence[Record], config: CurationConfig, seed: int, old: PreviousImages, scorers: Scorers
) -> list[dict]:
    """One part's candidates, record by record."""
    rows = [*_image_rows(model, records, config, seed, scorers), *_caption_rows(model, records, config, seed, scorers)]
    if config.win_image == "real":
        rows += _real_rows(model, records, scorers)
    rows += _previous_rows(model, records, config, old, scorers)
    order = {record.id: index for index, record in enumerate(records)}
    return sorted(rows, key=lambda row: order[row["record_id"]])


def _image_rows(
    model: Model, records: Sequence[Record], config: CurationConfig, seed: int, scorers: Scorers
) -> Iterator[dict]:
    sampling = model.sampling_of(config)
    seeds = candidate_seeds(seed, [record.id for record in records], "image", config.num_images)
    prompts = [model.image_prompt(record.caption) for record in records]
    options = {"num_images": config.num_images, "seeds": torch.from_numpy(seeds), "sampling": sampling}
    codes, settings = model.engine.generate(prompts, **options), json.dumps(asdict(sampling))
    scores = scorers.score_images(model, codes, records)
    for record, record_codes, record_seeds, record_scores in zip(records, codes.cpu(), seeds, scores, strict=True):
        for index, score in enumerate(record_scores):
            row = _image_row(record, "image", index, record_codes[index].tolist(), score)
            yield row | {"seed": int(record_seeds[index]), "settings": settings}


def _caption_rows(
    model: Model, records: Sequence[Record], config: CurationConfig, seed: int, scorers: Scorers
) -> Iterator[dict]:
    sampling = caption_sampling(config, model.prompts.max_caption_tokens)
    seeds = candidate_seeds(seed, [record.id for record in records], "caption", len(sampling))
    question = model.caption_prompt()
    answers = model.engine.generate_text(
        record_views(model, records),
        [[question]] * len(records),
        sampling=sampling,
        seeds=torch.from_numpy(seeds[:, None]),
    )
    texts_of = [[model.decode_text(ids) for ids in captions] for (captions,) in answers]
    scores_of = scorers.score_captions(texts_of, [record.caption for record in records])
    for record, (captions,), texts, scores, record_seeds in zip(
        records, answers, texts_of, scores_of, seeds, strict=True
    ):
        for index, params in enumerate(sampling):
            yield {
                "record_id": record.id,
                "kind": "caption",
                "index": index,
                "seed": int(record_seeds[index]),
                "token_ids": captions[index],
                "text": texts[index],
                "score": scores[index],
                "settings": json.dumps({"temperature": params.temperature, "top_k": params.top_k}),
                "answers": "[]",
            }


def _real_rows(model: Model, records: Sequence[Record], scorers: Scorers) -> Iterator[dict]:
    codes = _real_codes(records)
    for record, of_record, [score] in zip(
        records, codes, scorers.score_images(model, codes[:, None], records), strict=True
    ):
        yield _image_row(record, "real", 0, of_record.tolist(), score) | {"settings": "{}"}


def _real_codes(records: Sequence[Record]) -> torch.Tensor:
    """int64 [B, N]."""
    return torch.from_numpy(np.stack([record.codes for record in records]).astype(np.int64))


def _previous_rows(
    model: Model, records: Sequence[Record], config: CurationConfig, old: PreviousImages, scorers: Scorers
) -> Iterator[dict]:
    kept = [record for record in records if record.id in old]
    if not kept:
        return
    images = torch.tensor([old[record.id] for record in kept])
    scores = scorers.score_images(model, images, kept)
    for record, record_scores in zip(kept, scores, strict=True):
        for kind, codes, score in zip(("previous_win", "previous_lose"), old[record.id], record_scores, strict=True):
            yield _image_row(record, kind, 0, codes, score) | {"settings": "{}"}


def _image_row(record: Record, kind: str, index: int, codes: list[int], judged: Judged) -> dict:
    return {
        "record_id": record.id,
        "kind": kind,
        "index": index,
        "token_ids": codes,
        "score": judged.score,
        "answers": json.dumps([answer._asdict() for answer in judged.answers]),
    }


def _check_records(model: Model, records: Iterable[Record]) -> None:
    """Shows at once what would stop the work at the last record."""
    seen = set()
    for record in records:
        if record.id in seen:
            raise InputError(f"record {record.id}: the id occurs twice; give each record an id of its own")
        seen.add(record.id)
        check_record(model, record)


def _previous_images(records: Sequence[Record], previous: PairFile | None) -> PreviousImages:
    """The previous win and lose codes of those records that have them."""
    if previous is None:
        return {}
    table = previous.of(records)
    columns = (table[name].to_pylist() for name in ("record_id", "win_codes", "lose_codes"))
    return {id: (win, lose) for id, win, lose in zip(*columns, strict=True) if win is not None}


def _fingerprint(
    model: Model, records: Sequence[Record], config: CurationConfig, seed: int, old: PreviousImages
) -> str:
    """What a part was made from, the model's weights aside."""
    sampling = asdict(model.sampling_of(config))
    if sampling.get("schedule_unknown") is False and sampling["grid"] is None:  # settings that older files do not name
        del sampling["schedule_unknown"], sampling["grid"]
    if "ml_cache" in sampling and sampling["ml_cache"] is None:
        del sampling["ml_cache"]
    if model.answer_masks:
        sampling["answer_masks"] = model.answer_masks
    made_from = [
        seed,
        print_of(config, _DRAWN_BY, _NOT_DRAWN_BY),
        [sampling, asdict(model.prompts)],
        [
            [record.id, record.caption, record.codes.tolist(), repr(record.questions), old.get(record.id)]
            for record in records
        ],
    ]
    return hashlib.blake2b(json.dumps(made_from).encode(), digest_size=16).hexdigest()


def _refuse_strange_parts(folder: Path, paths: Sequence[Path]) -> None:
    strange = sorted(set(folder.glob("part-*.parquet")) - set(paths))
    if strange:
        raise _made_otherwise(strange[0])


def _read_part(path: Path) -> pa.Table:
    table = read_parquet(path)
    try:
        return table.replace_schema_metadata(None).cast(CANDIDATES_SCHEMA)
    except (pa.ArrowException, ValueError) as error:
        raise damaged(path, "candidates", error) from error


def _made_otherwise(path: Path) -> InputError:
    return InputError(
        f"{path}: was made from other records or settings; delete {path.parent}, or choose another run.name"
    )
