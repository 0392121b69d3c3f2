"""Records: an image with its caption and its questions of known answer, in memory and as a Parquet table."""

from __future__ import annotations

import copy
import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from hermesflow.runtime.files import InputError, ParquetRows, StrPath, parquet_writer

ELEMENT_TYPES = ("object", "count", "color", "location", "spatial", "size", "background")

_QUESTION_TYPE = pa.struct(
    [
        ("question", pa.string()),
        ("choices", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("element_type", pa.string()),
        ("element", pa.string()),
    ]
)
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("caption", pa.string()),
        ("category", pa.string()),
        ("questions", pa.list_(_QUESTION_TYPE)),
        ("codes", pa.list_(pa.int32())),
        ("balanced_questions", pa.list_(_QUESTION_TYPE)),
    ]
)
_IMAGE_FIELD = pa.field("image", pa.binary())
_PART = 256


@dataclass(frozen=True, slots=True)
class Question:
    """A question about an image with its choices and its right answer, in the form of TIFA (arXiv 2303.11897)."""

    question: str
    """Words split by single spaces, such as "what color is the circle ?"."""
    choices: tuple[str, ...]
    """Every answer that may be given, in a fixed order."""
    answer: str
    """The right one of the choices."""
    element_type: str
    """What kind of fact is asked for, such as "color" or "count"; the built-in world uses ELEMENT_TYPES."""
    element: str
    """The words of the caption that the question is about."""

    def __post_init__(self) -> None:
        if self.answer not in self.choices:
            raise ValueError(
                f"Question: expected an answer among the choices {list(self.choices)}, got {self.answer!r} for "
                f"{self.question!r}; add it to the choices or correct it"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One image-caption pair with its questions; the image is there as codes, as an image or as a file."""

    id: str
    """Unique within a data set."""
    caption: str
    """The true caption: the prompt of generation and the reference of captioning."""
    category: str
    """The group in which results are reported, such as "counting"."""
    questions: tuple[Question, ...]
    """What a picture of the caption must answer."""
    codes: np.ndarray | None = None
    """Image codes int32 [N]."""
    image: np.ndarray | bytes | None = None
    """Pixels uint8 [H, W, 3], or the bytes of an image file, which are decoded where the image is used."""
    image_path: Path | None = None
    """An image file, which is read where the image is used."""
    balanced_questions: tuple[Question, ...] = ()
    """Questions about the record's own image: what understanding is measured by, and what is replayed in training.
    Those of yes or no are answered yes half of the time, in data sets as far as others' questions allow. Empty:
    `questions` take their place."""

    @property
    def image_questions(self) -> tuple[Question, ...]:
        """What is asked about the record's own image."""
        return self.balanced_questions or self.questions


def records_to_table(records: Iterable[Record], include_images: bool = False) -> pa.Table:
    """Records as an Arrow table, ready for Parquet.

    Args:
        records: the records.
        include_images: adds a column of image files' bytes, PNG for pixels; without it images are left out, since codes
            are what a run needs. Files that image_path names are not read.
    Returns: a table with columns id, caption, category, questions (list of structs), codes (list<int32>),
        balanced_questions (as questions), and image if asked for.
    """
    rows = list(records)
    columns = [
        pa.array([record.id for record in rows], pa.string()),
        pa.array([record.caption for record in rows], pa.string()),
        pa.array([record.category for record in rows], pa.string()),
        _questions_array([record.questions for record in rows]),
        pa.array([None if record.codes is None else np.asarray(record.codes, dtype=np.int32) for record in rows],
                 _SCHEMA.field("codes").type),
        _questions_array([record.balanced_questions for record in rows]),
    ]  # fmt: skip
    if include_images:
        columns.append(pa.array([png_bytes(record.image) for record in rows], _IMAGE_FIELD.type))
    return pa.table(columns, schema=records_schema(include_images))


def _questions_array(of_records: Sequence[Sequence[Question]]) -> pa.ListArray:
    """The questions of each record, of which those that repeat are turned into Arrow once."""
    numbers: dict[Question, int] = {}
    flat = [numbers.setdefault(question, len(numbers)) for questions in of_records for question in questions]
    offsets = np.cumsum([0, *map(len, of_records)], dtype=np.int32)
    values = pa.array([_question_row(question) for question in numbers], _QUESTION_TYPE).take(
        pa.array(flat, pa.int64())
    )
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def records_from_table(table: pa.Table) -> list[Record]:
    """The records of a table that has the columns of records_to_table; codes, balanced_questions and image may be
    missing.

    Args:
        table: an Arrow table, for instance read from Parquet.
    Returns: the records in the table's order; images stay bytes.
    Raises: ValueError if a column is missing, has another type, or holds a question whose answer is no choice.
    """
    for name in ("id", "caption", "category", "questions"):
        if name not in table.column_names:
            raise ValueError(
                f"records_from_table: expected a column {name!r}, got {table.column_names}; add the column"
            )
    fields = [field for field in (*_SCHEMA, _IMAGE_FIELD) if field.name in table.column_names]
    try:
        rows = table.select([field.name for field in fields]).cast(pa.schema(fields)).to_pylist()
    except (pa.ArrowException, ValueError) as error:
        expected = ", ".join(f"{field.name}: {field.type}" for field in fields)
        raise ValueError(
            f"records_from_table: expected columns {expected}, got {error}; write the table with these types"
        ) from error
    return [_record(row) for row in rows]


def write_records(path: StrPath, records: Iterable[Record], include_images: bool = False) -> None:
    """Writes records as Parquet, all at once.

    Args:
        path: the file.
        records: the records; they are gone through once, and a part of them is in memory.
        include_images: see records_to_table.
    Raises: InputError if the file cannot be written.
    """
    waiting = iter(records)
    with parquet_writer(path, records_schema(include_images)) as write:
        while part := list(itertools.islice(waiting, _PART)):
            write(records_to_table(part, include_images))


class RecordFile(Sequence[Record]):
    """The records of a file that write_records wrote, read where they are used; for files of others see
    hermesflow.data.sources. A slice is another of its kind and reads nothing yet."""

    def __init__(self, path: StrPath) -> None:
        """Raises: InputError if the file is missing or damaged or is no table of records, here or where it is read."""
        self._rows = ParquetRows(path)
        self._span = range(len(self._rows))
        self._records(0, 0)

    def __len__(self) -> int:
        return len(self._span)

    def __getitem__(self, index: int | slice) -> Record | RecordFile:
        if isinstance(index, slice):
            part = copy.copy(self)
            part._span = self._span[index]
            return part
        row = self._span[index]
        return self._records(row, row + 1)[0]

    def __iter__(self) -> Iterator[Record]:
        if self._span.step != 1:
            yield from super().__iter__()
            return
        for start in range(self._span.start, self._span.stop, _PART):
            yield from self._records(start, min(start + _PART, self._span.stop))

    def _records(self, start: int, stop: int) -> list[Record]:
        table = self._rows.read(start, stop)
        try:
            return records_from_table(table)
        except ValueError as error:
            raise InputError(f"{self._rows.path}: is no table of records ({error})") from error


def records_schema(include_images: bool = False) -> pa.Schema:
    """Of records_to_table."""
    return _SCHEMA.append(_IMAGE_FIELD) if include_images else _SCHEMA


def _record(row: dict) -> Record:
    for name in ("id", "caption", "category", "questions"):
        if row[name] is None:
            raise ValueError(
                f"records_from_table: expected a value in column {name!r}, got null in record {row['id']!r}; fill it in"
            )
    codes = row.get("codes")
    if None in (codes or ()):
        raise ValueError(
            f"records_from_table: expected codes without nulls, got some in record {row['id']!r}; fill them in"
        )
    return Record(
        id=row["id"],
        caption=row["caption"],
        category=row["category"],
        questions=tuple(_question(row["id"], question) for question in row["questions"]),
        codes=None if codes is None else np.asarray(codes, dtype=np.int32),
        image=row.get("image"),
        balanced_questions=tuple(_question(row["id"], question) for question in row.get("balanced_questions") or ()),
    )


def _question_row(question: Question) -> dict[str, str | Sequence[str]]:
    return {
        "question": question.question,
        "choices": list(question.choices),
        "answer": question.answer,
        "element_type": question.element_type,
        "element": question.element,
    }


def _question(id: str, row: dict | None) -> Question:
    if row is None or None in row.values() or None in row["choices"]:
        raise ValueError(
            f"records_from_table: expected questions without nulls, got {row} in record {id!r}; fill it in"
        )
    return Question(row["question"], tuple(row["choices"]), row["answer"], row["element_type"], row["element"])


def id_digest(id: str) -> int:
    """64 bits that stand for an id where there are very many."""
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "little")


def png_bytes(image: np.ndarray | bytes | None) -> bytes | None:
    """The bytes of a PNG file of pixels uint8 [H, W, 3]; bytes of a file, and None, stay as they are."""
    if not isinstance(image, np.ndarray):
        return image
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
