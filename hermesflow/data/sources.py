"""Records of a user's own files, found in one pass over them and read where they are used.

What cannot be used is rejected with its reason, in the form "kind: detail", and stops nothing else.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hermesflow.data.balancing import THINGS, Things, balance_record
from hermesflow.data.encoding import encode_records
from hermesflow.data.entries import EntryFile, open_entries
from hermesflow.data.locations import files_of, folder_of, path_inside
from hermesflow.data.records import Question, Record, id_digest
from hermesflow.models.model import Model
from hermesflow.runtime.files import (
    InputError,
    ParquetRows,
    StrPath,
    is_url,
    read_json,
    read_parquet,
    shown,
    write_json,
    write_parquet,
)
from hermesflow.runtime.text import plain_text

UNUSABLE_SCHEMA = pa.schema([("record_id", pa.string()), ("reason", pa.string())])
"""record_id is "entry N of FILE" where an entry has no id."""

_LOGGER = logging.getLogger(__name__)
_SCANNED = ("id", "question", "questions", "choices", "answer", "element_type", "element")
"""Columns that the first pass needs."""
_PLACE = pa.struct([("file", pa.int32()), ("place", pa.int64())])
_INDEX_SCHEMA = pa.schema(
    [("file", pa.int32()), ("place", pa.int64()), ("asked", pa.list_(_PLACE)), ("joined", pa.list_(_PLACE))]
)
"""Of each record where its entry lies, the further entries that are questions of it, and those of the other file."""
_AT_ONCE = 64  # records that are read together
_MOST_OPEN = 8  # files
_REMEMBERED = 2**16
"""Questions that were checked: those of a data set repeat."""
_WHOLE_FLOATS = 2**53
_QUESTION_KEYS = tuple(item.name for item in fields(Question))


class Source:
    """Records of files: where each lies, so that those in use alone are in memory."""

    def __init__(self, files: Sequence[Path | str], roots: Sequence[Path | str], need_questions: bool) -> None:
        """Reads nothing; see scan_source and load."""
        self.files, self._roots, self._need_questions = list(files), list(roots), need_questions
        self.things = Things()
        """What other records' questions ask for, to balance with."""
        self.rejected: list[dict[str, str]] = []
        """Entries without an id, and those whose id an earlier one has: rows of UNUSABLE_SCHEMA."""
        self._index: TableRows | ParquetRows = TableRows(_INDEX_SCHEMA.empty_table())
        self._open: dict[int, EntryFile] = {}

    def __len__(self) -> int:
        """How many entries may be records."""
        return len(self._index)

    def records(self, start: int, stop: int, rejected: list[dict[str, str]]) -> Iterator[Record]:
        """The records start to stop in the files' order; of those that cannot be used, rejected takes the reasons.

        Raises: InputError if a file is damaged or is another one.
        """
        stop = min(stop, len(self))
        for first in range(start, stop, _AT_ONCE):
            last = min(first + _AT_ONCE, stop)
            index = self._index.read(first, last)
            own = list(zip(index["file"].to_pylist(), index["place"].to_pylist(), strict=True))
            asked, joined = (_place_tuples(index[name]) for name in ("asked", "joined"))
            entries = self._entries(itertools.chain(own, *asked, *joined))
            for place, *further in zip(own, asked, joined, strict=True):
                id = id_of(entries[place])
                try:
                    yield self._record(id, entries[place], *([entries[each] for each in places] for places in further))
                except ValueError as error:
                    rejected.append({"record_id": id, "reason": str(error)})

    def balanced(self, record: Record) -> Record:
        """The record with questions of others, by which it is asked as often for what is not there; see balancing."""
        return balance_record(record, self.things)

    def save(self, folder: Path) -> None:
        """Writes what the pass over the files found into a folder, for load."""
        write_parquet(folder / "index.parquet", self._index.read(0, len(self)))
        write_parquet(folder / "rejected.parquet", pa.Table.from_pylist(self.rejected, UNUSABLE_SCHEMA))
        kept = {"files": list(map(str, self.files)), "roots": list(map(str, self._roots))}
        kept["things"] = [[getattr(question, key) for key in _QUESTION_KEYS] for question in self.things]
        write_json(folder / "source.json", kept | {"need_questions": self._need_questions})

    @classmethod
    def load(cls, folder: Path) -> Source:
        """What save wrote. Raises: InputError if it is damaged."""
        kept = read_json(folder / "source.json")
        source = cls(*([_location(each) for each in kept[key]] for key in ("files", "roots")), kept["need_questions"])
        things = ([tuple(value) if isinstance(value, list) else value for value in row] for row in kept["things"])
        source.things = Things(Question(*values) for values in things)
        source.rejected = read_parquet(folder / "rejected.parquet").to_pylist()
        source._index = ParquetRows(folder / "index.parquet")
        return source

    def _entries(self, wanted: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Any]:
        """The entries at (file, place)."""
        of_files: dict[int, set[int]] = {}
        for file, place in wanted:
            of_files.setdefault(file, set()).add(place)
        found = {}
        for number, places in of_files.items():
            if number not in self._open:
                for oldest in list(self._open)[: 1 - _MOST_OPEN]:
                    del self._open[oldest]
                self._open[number] = open_entries(self.files[number])
            ordered = sorted(places)
            for place, entry in zip(ordered, self._open[number].read(ordered), strict=True):
                found[number, place] = entry
        return found

    def _record(self, id: str, row: dict, asked: list[dict], joined: list[dict]) -> Record:
        """Raises: ValueError with the reason why the entry, with the questions joined to it, cannot be used."""
        caption = text_of(row, "caption")
        own = [row, *asked] if _is_question(row) else _questions(row)
        if joined:
            own = own + (joined if _is_question(joined[0]) else _questions(joined[0]))
        if self._need_questions and not own:
            raise ValueError("no questions: there is nothing to judge its images by")
        category = "other" if row.get("category") is None else text_of(row, "category")
        questions = tuple(map(_question, own))
        if row.get("codes") is not None:
            return Record(id, caption, category, questions, _codes(row))
        key = next((key for key in ("image", "img_path") if _image_of(row, key) is not None), None)
        if key is None:
            raise ValueError("no image: the entry has neither image, img_path nor codes")
        image = _image_of(row, key)
        if isinstance(image, bytes):
            return Record(id, caption, category, questions, image=image)
        path = path_inside(self._roots[0], text_of({key: image}, key), self._roots[1])
        return Record(id, caption, category, questions, image_path=path)


def scan_source(
    path: StrPath, questions: StrPath | None = None, root: StrPath | None = None, *, need_questions: bool = True
) -> Source:
    """Finds the records of files in one pass; see read_source for the arguments.

    Raises: InputError if a file is missing or damaged.
    """
    files, others = files_of(path), [] if questions is None else files_of(questions)
    start = folder_of(files[0])
    source = Source([*files, *others], [start if root is None else _location(root), start], need_questions)
    own, asked = _Entries(), _Entries()
    for number in range(len(source.files)):
        (own if number < len(files) else asked).scan(number, source)
    source._index = TableRows(_index(own, asked))
    duplicates = own.duplicates
    for first in range(0, len(duplicates), _AT_ONCE):
        places = [tuple(each.values()) for each in own.places(duplicates[first : first + _AT_ONCE]).to_pylist()]
        entries = source._entries(places)
        reason = "duplicate id: an earlier entry has it"
        source.rejected += [{"record_id": id_of(entries[place]), "reason": reason} for place in places]
    return source


def read_source(
    path: StrPath,
    questions: StrPath | None = None,
    root: StrPath | None = None,
    *,
    need_questions: bool = True,
) -> tuple[list[Record], list[dict[str, str]]]:
    """Reads all records of files; images given as paths are checked to be there and are not opened.

    Keys of an entry: id (text or whole number), caption, image or img_path (a path; in Parquet also the file's bytes,
    or the datasets library's struct of bytes and path) or codes, questions (a list, keys as Question has them, or a
    struct of such lists), and category. Of a question element_type and element may be missing. An entry that is itself
    a question, with the key "question", belongs to the record of its id; so the published initial_data.json can be
    given with vqa_data.json as its questions, or vqa_data.json alone.

    Args:
        path: Parquet, JSON or tars, as open_entries takes them, and as files_of names them: a file, a folder, a
            pattern, an address or a data set of the hub.
        questions: such questions, joined to the records by id.
        root: the folder that image paths may not leave; they start from it, or where there is no such file from the
            folder of `path` inside it. None is the folder of `path`.
        need_questions: reject a record that has none.
    Returns: (records in the files' order, rejected: rows of UNUSABLE_SCHEMA).
    Raises: InputError if a file is missing or damaged, or no record can be used.
    """
    source = scan_source(path, questions, root, need_questions=need_questions)
    rejected = list(source.rejected)
    records = list(source.records(0, len(source), rejected))
    if not records:
        raise InputError(f"{path}: no record can be used ({describe_rejected(rejected)}); mend the file")
    return records, rejected


def read_records(
    path: StrPath,
    model: Model,
    questions: StrPath | None = None,
    root: StrPath | None = None,
    *,
    count: int | None = None,
) -> list[Record]:
    """Reads records and encodes their images, ready for curate and train_records.

    Args:
        path, questions, root: as in read_source.
        model: encodes the images; it must know the words of captions and questions.
        count: how many are wanted; later ones are not looked at. None: all.
    Returns: those that can be used, in the files' order; what was left out is logged with the reasons.
    Raises: InputError as read_source, or if no record can be used with this model.
    """
    source = scan_source(path, questions, root)
    usable, rejected = [], list(source.rejected)
    records = map(source.balanced, source.records(0, len(source), rejected))
    for record, reason in encode_records(model, records, len(source) if count is None else count):
        if reason is None:
            usable.append(record)
        else:
            rejected.append({"record_id": record.id, "reason": reason})
    if not usable:
        raise InputError(f"{path}: no record can be used; rejected were {describe_rejected(rejected)}")
    if rejected:
        _LOGGER.warning("%s: left out %s", path, describe_rejected(rejected))
    return usable


def text_of(row: dict, key: str) -> str:
    """The text under a key of an entry. Raises: ValueError if it is missing, empty or no text."""
    value = row.get(key)
    if value is None or value == "" or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"no {key}: the entry has none")
    if not isinstance(value, str):
        raise ValueError(f"wrong type: {key} is {shown(value)}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a pair of surrogates
        raise ValueError(f"wrong type: {key} is {shown(value)}, which is no Unicode text") from error
    return value


def id_of(row: Any) -> str:
    """The id of an entry, as text. Raises: ValueError if it has none."""
    if not isinstance(row, dict):
        raise ValueError(f"wrong type: {shown(row)} is no object with keys")
    id = row.get("id")
    if type(id) is float and id.is_integer() and abs(id) < _WHOLE_FLOATS:  # as pandas has a column with gaps
        id = int(id)
    return str(id) if type(id) is int else text_of(row, "id")


def count_reasons(rejected: Iterable[dict[str, str]]) -> dict[str, int]:
    """How often each kind of reason occurs, the most frequent first."""
    counts = Counter(row["reason"].partition(":")[0] for row in rejected)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def describe_rejected(rejected: Sequence[dict[str, str]]) -> str:
    """The three most frequent reasons with their counts, and the first rejected record; for an error's message."""
    if not rejected:
        return "it has no entries"
    counts = count_reasons(rejected)
    kinds = [f"{count} {kind}" for kind, count in list(counts.items())[:3]]
    if len(counts) > 3:
        kinds.append(f"{sum(list(counts.values())[3:])} of other kinds")
    return f"{', '.join(kinds)}; the first is record {rejected[0]['record_id']}: {rejected[0]['reason']}"


class TableRows:
    """The rows of a table, as ParquetRows has those of a file."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def read(self, start: int, stop: int) -> pa.Table:
        return self._table.slice(start, stop - start)


class _Entries:
    """Entries as the pass over the files finds them, some 30 bytes each: ids are 64 bits of their digest."""

    def __init__(self) -> None:
        self._ids, self._files, self._places, self._ask = array("Q"), array("i"), array("q"), bytearray()

    def scan(self, number: int, source: Source) -> None:
        """Adds those of a file of the source, and to the source what it rejects and what its questions ask for."""
        file, things = source.files[number], source.things
        for count, (place, row) in enumerate(open_entries(file).scan(_SCANNED), 1):
            try:
                id = id_of(row)
            except ValueError as error:
                name = str(file).rpartition("/")[2]
                source.rejected.append({"record_id": f"entry {count} of {name}", "reason": str(error)})
                continue
            self._ids.append(id_digest(id))
            self._files.append(number)
            self._places.append(place)
            asks = _is_question(row)
            self._ask.append(asks)
            for question in [row] if asks else _questions_there(row):
                if isinstance(question, dict) and question.get("element_type") in THINGS:
                    with contextlib.suppress(ValueError):
                        things.add(_question(question))

    @cached_property
    def ids(self) -> np.ndarray:
        """uint64 [entries]."""
        return np.frombuffer(self._ids, dtype=np.uint64) if self._ids else np.zeros(0, np.uint64)

    @cached_property
    def first(self) -> np.ndarray:
        """int64 [entries]: of each the first with its id."""
        order = np.argsort(self.ids, kind="stable")
        starts = np.ones(len(order), dtype=bool)
        starts[1:] = self.ids[order][1:] != self.ids[order][:-1]
        first = np.empty(len(order), dtype=np.int64)
        first[order] = order[starts][np.cumsum(starts) - 1]
        return first

    @cached_property
    def _is_first(self) -> np.ndarray:
        return self.first == np.arange(len(self.first))

    @cached_property
    def _is_joined(self) -> np.ndarray:
        """Whether an entry is a further question of an earlier one that is a question too."""
        ask = np.frombuffer(self._ask, dtype=bool) if self._ask else np.zeros(0, bool)
        return ~self._is_first & ask & ask[self.first]

    @property
    def records(self) -> np.ndarray:
        """The numbers of the entries that are the first with their id."""
        return np.flatnonzero(self._is_first)

    @property
    def joined(self) -> np.ndarray:
        """The numbers of the entries that are further questions of another."""
        return np.flatnonzero(self._is_joined)

    @property
    def duplicates(self) -> np.ndarray:
        """The numbers of the entries whose id an earlier one has, of which they are no questions."""
        return np.flatnonzero(~self._is_first & ~self._is_joined)

    def places(self, numbers: np.ndarray) -> pa.StructArray:
        """Where entries lie, with the type _PLACE."""
        files, places = (np.array(each)[numbers] for each in (self._files, self._places))
        return pa.StructArray.from_arrays(
            [pa.array(files, pa.int32()), pa.array(places, pa.int64())], ["file", "place"]
        )


def _index(own: _Entries, other: _Entries) -> pa.Table:
    """With _INDEX_SCHEMA."""
    records = own.records
    place = own.places(records)
    asked = _place_lists(len(records), np.searchsorted(records, own.first[own.joined]), own, own.joined)
    # Of the other file those count whose id is a record's: its first entry, and the questions that belong to it.
    order = np.argsort(own.ids[records], kind="stable")
    numbers = np.flatnonzero(other._is_first | other._is_joined)
    at = np.searchsorted(own.ids[records], other.ids[numbers], sorter=order)
    at = order[np.minimum(at, len(order) - 1)] if len(order) else np.zeros(len(numbers), np.int64)
    fits = own.ids[records][at] == other.ids[numbers] if len(order) else np.zeros(len(numbers), bool)
    joined = _place_lists(len(records), at[fits], other, numbers[fits])
    columns = [place.field("file"), place.field("place"), asked, joined]
    return pa.Table.from_arrays(columns, schema=_INDEX_SCHEMA)


def _place_lists(count: int, records: np.ndarray, entries: _Entries, numbers: np.ndarray) -> pa.ListArray:
    """Of each of count records the places of the entries that belong to it, in their order."""
    order = np.argsort(records, kind="stable")
    offsets = np.searchsorted(records[order], np.arange(count + 1)).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), entries.places(numbers[order]), type=pa.list_(_PLACE))


def _place_tuples(lists: pa.ChunkedArray) -> list[list[tuple[int, int]]]:
    """(file, place) of each of each list."""
    if not any(len(chunk.values) for chunk in lists.chunks):  # as almost always
        return [[]] * len(lists)
    return [[tuple(each.values()) for each in places] for places in lists.to_pylist()]


def _location(path: StrPath) -> Path | str:
    return str(path) if is_url(path) else Path(path)


def _is_question(row: dict) -> bool:
    return row.get("question") is not None


def _questions_there(row: dict) -> list:
    """The questions of an entry that may be damaged."""
    try:
        return _questions(row)
    except ValueError:
        return []


def _codes(row: dict) -> np.ndarray:
    codes = _list(row, "codes")
    if not set(map(type, codes)) <= {int} or not all(0 <= code < 2**31 for code in codes):
        raise ValueError(f"wrong type: codes is {shown(row['codes'])}, expected whole numbers from 0")
    return np.array(codes, dtype=np.int32)


def _image_of(row: dict, key: str) -> Any:
    """What stands under a key: a path or bytes; of the datasets library's Image the bytes, else the path."""
    value = row.get(key)
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        return value.get("bytes") or value.get("path")
    return value


def _questions(row: dict) -> list:
    """The questions of an entry; a struct of lists, as the datasets library keeps a sequence, is turned over."""
    value = row.get("questions")
    if not isinstance(value, dict):
        return _list(row, "questions")
    columns = {key: _list(value, key) for key in value if value[key] is not None}
    if len({len(column) for column in columns.values()}) > 1:
        raise ValueError(f"wrong type: questions is {shown(value)}, whose lists differ in length")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _question(row: Any) -> Question:
    if not isinstance(row, dict):
        raise ValueError(f"wrong type: question {shown(row)} is no object with keys")
    get = row.get
    values = tuple(_list(row, "choices")), get("question"), get("answer"), get("element_type"), get("element")
    try:
        return _checked_question(*values)
    except TypeError:  # a value that is a list or an object, which the rules name
        return _checked_question.__wrapped__(*values)


@lru_cache(_REMEMBERED)
def _checked_question(choices: tuple, *values: Any) -> Question:
    row = dict(zip(("question", "answer", "element_type", "element"), values, strict=True))
    question, answer = text_of(row, "question"), text_of(row, "answer").strip()
    choices = tuple(text_of({"choice": choice}, "choice").strip() for choice in choices)
    answer = next((choice for choice in choices if plain_text(choice) == plain_text(answer)), answer)
    if len(set(map(plain_text, choices))) < 2:
        raise ValueError(f"too few choices: {shown(list(choices))} for {shown(question)}, expected two or more")
    if answer not in choices:
        values = [shown(value) for value in (answer, list(choices), question)]
        raise ValueError("wrong answer: {} is no choice of {} for {}".format(*values))
    kind, element = ("" if row[key] is None else text_of(row, key) for key in ("element_type", "element"))
    return Question(question, choices, answer, kind, element)


def _list(row: dict, key: str) -> list:
    value = row.get(key)
    if not isinstance(value, list | None):
        raise ValueError(f"wrong type: {key} is {shown(value)}, expected a list")
    return value or []
