"""Curation: each record's candidate images and captions with their scores, in parts from which a killed run resumes."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from hermesflow.config import DRAWING, CurationConfig, print_of
from hermesflow.data.pairs import PairFile
from hermesflow.data.records import Record
from hermesflow.data.sources import record_views
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.models.model import Model
from hermesflow.runtime.claims import Claims
from hermesflow.runtime.distributed import rank, world_size
from hermesflow.runtime.files import InputError, ParquetRows, StrPath, damaged, make_folder, read_parquet, write_parquet
from hermesflow.runtime.progress import track
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
_LOOK_AGAIN = 1.0  # seconds, where all parts that are left are others'


def curate(
    model: Model,
    records: Sequence[Record],
    config: CurationConfig,
    *,
    seed: int,
    folder: StrPath,
    previous: PairFile | None = None,
    judge: Callable[[], Model | None] = lambda: None,
) -> Iterator[tuple[list[Record], pa.Table]]:
    """Draws and scores every record's candidates, part by part: what is in memory does not grow with the records.

    Each record gets config.num_images images of its caption, scored by the model's own answers to its questions, and
    config.num_captions captions of its image, scored against its caption. Every config.batch_records records make one
    file, folder/part-NNNNN.parquet; a part that exists is read instead of made again. A candidate's draws depend on the
    seed and the record alone, not on the batch.

    With several processes each makes every so many-th part and yields those; the files are the same as one makes.

    All records are looked at once before anything is drawn; then each part comes as soon as it is on the disk.

    Args:
        model: draws and judges. Do not resume a folder with another model.
        records: with codes, questions and ids of their own; gone through twice.
        config: numbers, sampling settings and scorers.
        seed: of this round; from 0 to 2**63 - 1.
        folder: of the parts.
        previous: the pairs of the previous round; their images of these records are scored again by this model, so that
            one judge compares old and new.
        judge: opens the model that scores images in place of this one; None: this one. Do not resume a folder with
            another judge.
    Yields: (the records of one of this process's parts, their candidates with CANDIDATES_SCHEMA), both in the records'
        order.
    Raises: InputError, at the call itself, on a damaged part, parts of other records or settings, an unwritable folder,
        a record that cannot be curated, a scorer that cannot be had, or a word that the model does not know.
    Source: HermesFlow (arXiv 2502.12148), section 3.
    """
    paths, prints, done = _look(model, records, config, seed, folder, previous)
    share = slice(rank(), None, world_size())
    scorers = Scorers(config, judge()) if set(paths[share]) - done else None

    def parts() -> Iterator[tuple[list[Record], pa.Table]]:
        every = zip(paths, prints, _batches(records, config), strict=True)
        batches = itertools.islice(every, share.start, None, share.step)
        for path, fingerprint, batch in track(batches, "candidates", "batches", total=len(paths[share])):
            if path not in done:
                _make_part(path, fingerprint, model, batch, config, seed, previous, scorers)
            yield batch, _read_part(path)

    return parts()


def curate_as_worker(
    model: Model,
    records: Sequence[Record],
    config: CurationConfig,
    *,
    seed: int,
    folder: StrPath,
    claims: Claims,
    previous: PairFile | None = None,
    judge: Callable[[], Model | None] = lambda: None,
) -> None:
    """Makes parts of curate beside other workers, of this or other machines, until all are there.

    A worker takes the first part that nobody has; parts of workers that are gone are taken again (runtime/claims.py).

    Args:
        model, records, config, seed, folder, previous, judge: as in curate, of all workers alike.
        claims: of this worker, in a folder that all share.
    Raises: InputError as curate.
    """
    paths, prints, done = _look(model, records, config, seed, folder, previous)
    scorers = Scorers(config, judge()) if len(done) < len(paths) else None
    left = [number for number, path in enumerate(paths) if path not in done]

    def made() -> Iterator[int]:
        """The numbers of parts as this worker sees them made, by whom ever."""
        while left:
            before = len(left)
            for number in list(left):
                with claims.take(paths[number].stem) as is_mine:
                    if is_mine and not _is_made(paths[number], prints[number]):
                        start = number * config.batch_records
                        batch = list(records[start : start + config.batch_records])
                        _make_part(paths[number], prints[number], model, batch, config, seed, previous, scorers)
                if _is_made(paths[number], prints[number]):
                    left.remove(number)
                    yield number
            if len(left) == before:
                time.sleep(_LOOK_AGAIN)

    for _ in track(made(), "candidates of all workers", "batches", total=len(paths), completed=len(done)):
        pass


def _look(
    model: Model,
    records: Sequence[Record],
    config: CurationConfig,
    seed: int,
    folder: StrPath,
    previous: PairFile | None,
) -> tuple[list[Path], list[str], set[Path]]:
    """The parts' files, their fingerprints, and the files that are there. Raises: InputError, see curate."""
    prints = _fingerprints(model, records, config, seed, previous)
    paths = [Path(folder) / f"part-{number:05d}.parquet" for number in range(len(prints))]
    _refuse_strange_parts(make_folder(folder), paths)
    return paths, prints, {path for path, own in zip(paths, prints, strict=True) if _is_made(path, own)}


def _make_part(
    path: Path,
    fingerprint: str,
    model: Model,
    batch: Sequence[Record],
    config: CurationConfig,
    seed: int,
    previous: PairFile | None,
    scorers: Scorers,
) -> None:
    rows = _rows(model, batch, config, seed, _previous_images(batch, previous), scorers)
    table = pa.Table.from_pylist(rows, CANDIDATES_SCHEMA)
    write_parquet(path, table.replace_schema_metadata({_FINGERPRINT: fingerprint}))


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


def _batches(records: Sequence[Record], config: CurationConfig) -> Iterator[list[Record]]:
    """The records of each part, of which one part is in memory."""
    waiting = iter(records)
    while batch := list(itertools.islice(waiting, config.batch_records)):
        yield batch


def _fingerprints(
    model: Model, records: Sequence[Record], config: CurationConfig, seed: int, previous: PairFile | None
) -> list[str]:
    """Each part's, after a look at all records: what would stop the work at the last one shows at once."""
    prints, seen = [], set()
    for batch in _batches(records, config):
        for record in batch:
            if record.id in seen:
                raise InputError(f"record {record.id}: the id occurs twice; give each record an id of its own")
            seen.add(record.id)
            check_record(model, record)
        prints.append(_fingerprint(model, batch, config, seed, _previous_images(batch, previous)))
    return prints


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


def _is_made(path: Path, fingerprint: str) -> bool:
    """Whether the part is there. Raises: InputError if it was made from something else."""
    if not path.exists():
        return False
    if (ParquetRows(path).schema.metadata or {}).get(_FINGERPRINT) != fingerprint.encode():
        raise _made_otherwise(path)
    return True


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
