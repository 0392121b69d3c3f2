"""A run's records: encoded in blocks that processes share, and joined into records.parquet.

    records/  made-of.json  source/ (what the pass over the files found)  part-*.parquet  claims/

is there while they are made; records.parquet comes when all are there, and rejected.parquet last.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from hermesflow.config import Config
from hermesflow.data.balancing import count_answers, describe_one_sided
from hermesflow.data.encoding import RecordEncoder
from hermesflow.data.records import Record, RecordFile, records_schema, records_to_table
from hermesflow.data.sources import UNUSABLE_SCHEMA, Source, describe_rejected, scan_source
from hermesflow.models.model import Model
from hermesflow.runs.settings import described_files
from hermesflow.runtime.claims import Claims
from hermesflow.runtime.distributed import barrier, on_main
from hermesflow.runtime.files import (
    InputError,
    ParquetRows,
    atomic_folder,
    make_folder,
    parquet_writer,
    read_json,
    read_parquet,
    write_json,
    write_parquet,
)
from hermesflow.runtime.parts import make_parts
from hermesflow.runtime.registry import SOURCES, resolve

_LEAST_BLOCK, _MOST_BLOCK, _SHARES = 256, 4096, 64
"""Records of a block: few enough that many processes have work, many enough that files cost little."""
_NOTES = b"hermesflow.block"
_LOGGER = logging.getLogger(__name__)


def are_made(folder: Path, count: int) -> bool:
    """Whether a run's folder has so many records."""
    path = folder / "records.parquet"
    return (folder / "rejected.parquet").exists() and path.exists() and len(ParquetRows(path)) >= count


def make_records(folder: Path, config: Config, counts: Sequence[int], model: Model, *, as_worker: bool = False) -> None:
    """Makes a run's records, together with torchrun's other processes or with other workers.

    Args:
        folder: of the run.
        config: data, and run.seed for the built-in world.
        counts: how many each round needs.
        model: encodes the images, and must know the words; of all processes alike.
        as_worker: beside others, which share the folder.
    Raises: InputError if the files cannot be used or have not so many usable records, or if they give other records
        than those that the run has already.
    """
    work, marker = make_folder(folder / "records"), folder / "rejected.parquet"
    made_of = _made_of(config)
    if not (work / "made-of.json").exists():
        write_json(work / "made-of.json", made_of)
    if read_json(work / "made-of.json") != made_of:
        raise InputError(f"{work}: other workers make the records of other data; give all the same settings and files")
    claims = Claims(work / "claims") if as_worker else None
    builder = _Builder(folder, config, counts, model)
    # What one alone does is a part too: the others wait for its file.
    _make_all([work / "source"], lambda _: builder.look(), "look at the data", claims)
    builder.check_number(len(builder.source), "records", builder.source.rejected)
    blocks: list[Path] = []
    start, stop, size = 0, sum(counts), min(_MOST_BLOCK, max(_LEAST_BLOCK, sum(counts) // _SHARES))
    while start < stop:  # of these entries none is too many, whatever the others are
        new = [work / f"part-{first:09d}-{min(first + size, stop):09d}.parquet" for first in range(start, stop, size)]
        _make_all(new, lambda number, new=new: builder.write(new[number]), "encode records", claims)
        blocks += new
        num_missing = sum(counts) - sum(len(ParquetRows(path)) for path in blocks)
        start, stop = stop, min(stop + num_missing, len(builder.source))
    _make_all([marker], lambda _: builder.join(blocks), "join records", claims)
    if not as_worker:
        on_main(lambda: shutil.rmtree(work, ignore_errors=True))


def _make_all(paths: Sequence[Path], make: Callable[[int], None], what: str, claims: Claims | None) -> None:
    for _ in make_parts(paths, make, what, claims=claims):
        pass
    if claims is None:
        barrier()


def clear_records(folder: Path, config: Config) -> None:
    """Removes what is left of making records, if all are made or it was for other data; nobody may be at it."""
    work = folder / "records"
    shutil.rmtree(work / "claims", ignore_errors=True)
    made_of = work / "made-of.json"
    if (folder / "rejected.parquet").exists() or not made_of.exists() or read_json(made_of) != _made_of(config):
        shutil.rmtree(work, ignore_errors=True)


def _made_of(config: Config) -> dict[str, Any]:
    """What blocks of records depend on, as it comes back from JSON."""
    data, model = asdict(config.data), asdict(config.model)
    for section, key in ((data, "num_records"), (model, "device"), (model, "judge")):
        del section[key]
    files = {key: each["digest"] for key, each in described_files(config, "data").items()}
    return {"data": data, "model": model, "seed": config.run.seed, "files": files}


class _Builder:
    """Makes the records of a run's folder."""

    def __init__(self, folder: Path, config: Config, counts: Sequence[int], model: Model) -> None:
        self._folder, self._config, self._counts, self._model = folder, config, counts, model
        self._encoder = RecordEncoder(model)

    def look(self) -> None:
        """Goes through the data once, and writes records/source."""
        data = self._config.data
        (self._folder / "rejected.parquet").unlink(missing_ok=True)  # it says that all records are there
        with atomic_folder(self._folder / "records/source") as temporary:
            if data.source not in SOURCES:
                scan_source(data.source, data.questions or None, data.root or None).save(temporary)

    @cached_property
    def source(self) -> Source | _World:
        """What records/source found."""
        data = self._config.data
        if data.source in SOURCES:
            return _World(data.source, self._config.run.seed, sum(self._counts))
        return Source.load(self._folder / "records/source")

    def write(self, path: Path) -> None:
        """Encodes the entries of a block, and writes those that can be used."""
        model, usable, rejected = self._model, [], []
        start, stop = map(int, path.stem.split("-")[1:])
        records = map(self.source.balanced, self.source.records(start, stop, rejected))
        for record, reason in self._encoder.encode(records, stop - start):
            if reason is None:
                usable.append(record)
            else:
                rejected.append({"record_id": record.id, "reason": reason})
        notes = {"rejected": rejected, "num_cut": sum(bool(model.describe_cut(record.caption)) for record in usable)}
        notes["answers"] = count_answers(usable)
        table = records_to_table(usable, include_images=not model.views_codes)
        write_parquet(path, table.replace_schema_metadata({_NOTES: json.dumps(notes)}))

    def join(self, paths: Sequence[Path]) -> None:
        """Writes records.parquet and rejected.parquet. Raises: InputError if there are too few."""
        notes = [json.loads(ParquetRows(path).schema.metadata[_NOTES]) for path in paths]
        rejected = self.source.rejected + [row for each in notes for row in each["rejected"]]
        self.check_number(sum(len(ParquetRows(path)) for path in paths), "usable records", rejected)
        path, source = self._folder / "records.parquet", self._config.data.source
        made, at = RecordFile(path) if path.exists() else [], 0
        with parquet_writer(path, records_schema(include_images=not self._model.views_codes)) as write:
            for block in paths:
                table = read_parquet(block).replace_schema_metadata(None)
                write(_keep(made[at : at + len(table)], table, source) if at < len(made) else table)
                at += len(table)
        write_parquet(self._folder / "rejected.parquet", pa.Table.from_pylist(rejected, UNUSABLE_SCHEMA))
        if num_cut := sum(each["num_cut"] for each in notes):
            most = self._model.prompts.max_prompt_tokens
            _LOGGER.warning(
                "%s: %d of %d captions are cut to the model's %d tokens of a prompt", source, num_cut, at, most
            )
        num_yes, num_asked = (sum(each["answers"][index] for each in notes) for index in range(2))
        if message := describe_one_sided(num_yes / num_asked if num_asked else None):
            _LOGGER.warning("%s: %s", source, message)

    def check_number(self, number: int, what: str, rejected: Sequence[dict[str, str]]) -> None:
        """Raises InputError if these are fewer than are needed."""
        counts, count = self._counts, sum(self._counts)
        if number < count:
            why = f"; rejected were {describe_rejected(rejected)}" if rejected else ""
            need = f"{count} are needed" + (f" (by round {', '.join(map(str, counts))})" if len(counts) > 1 else "")
            raise InputError(f"{self._config.data.source}: has {number} {what}, {need}; lower data.num_records{why}")


def _keep(made: RecordFile, table: pa.Table, source: str) -> pa.Table:
    """The block with the records that were made before in place of its first. Raises: InputError if they are others."""
    before = records_to_table(made, include_images="image" in table.column_names)
    columns = ["id", "caption", "questions"]
    if not before.select(columns).equals(table.slice(0, len(before)).select(columns)):
        raise InputError(f"{source}: gives other records than when the run began; choose another run.name")
    return pa.concat_tables([before, table.slice(len(before))])


class _World:
    """Records of the built-in world, in the form of a Source."""

    def __init__(self, name: str, seed: int, count: int) -> None:
        self._make, self._count = lambda: iter(resolve(SOURCES, name, "data.source")(seed, count)), count
        self._at, self._left, self.rejected = 0, self._make(), []

    def __len__(self) -> int:
        return self._count

    def records(self, start: int, stop: int, rejected: list[dict[str, str]]) -> Iterator[Record]:
        """Those from start to stop; none is rejected."""
        if start < self._at:
            self._at, self._left = 0, self._make()
        for record in islice(self._left, stop - self._at):
            self._at += 1
            if self._at > start:
                yield record

    def balanced(self, record: Record) -> Record:
        """The record, whose questions are balanced as they are."""
        return record
