"""Image-caption pairs of a user's own: read from JSON or Parquet files, their images encoded batch by batch.

What cannot be used is rejected with its reason, in the form "kind: detail", and stops nothing else.
"""

from __future__ import annotations

import glob
import gzip
import io
import itertools
import json
import logging
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from hermesflow.data.balancing import balance_questions
from hermesflow.data.records import Question, Record, png_bytes
from hermesflow.models.images import decode_image
from hermesflow.models.model import Model
from hermesflow.runtime.files import InputError, StrPath, damaged, read_bytes, read_parquet, shown
from hermesflow.runtime.progress import track
from hermesflow.runtime.text import plain_text

UNUSABLE_SCHEMA = pa.schema([("record_id", pa.string()), ("reason", pa.string())])
"""record_id is "entry N of FILE" where an entry has no id."""

_BATCH_PIXELS = 2**22
_LOGGER = logging.getLogger(__name__)
_PARQUET, _GZIP = b"PAR1", b"\x1f\x8b"
_OTHERS = {
    b"PK\x03\x04": "a zip archive", b"BZh": "packed by bzip2", b"\xfd7zXZ\x00": "packed by xz",
    b"\x28\xb5\x2f\xfd": "packed by zstd", b"ARROW1": "an Arrow file", b"\xff\xff\xff\xff": "an Arrow stream",
    b"ORC": "an ORC file", b"SQLite format 3": "an SQLite database",
}  # fmt: skip
"""How files begin that are neither JSON nor Parquet."""
_KINDS = ("*.parquet", "*.jsonl", "*.jsonl.gz", "*.json", "*.json.gz")
"""What a folder is searched for: the files of the first that it has."""
_MOST_UNPACKED = 2**32
_WHOLE_FLOATS = 2**53
_SPACE, _SEPARATOR = re.compile(r"\s*"), re.compile(r"\s*,?\s*")
_Item = TypeVar("_Item")


def read_source(
    path: StrPath,
    questions: StrPath | None = None,
    root: StrPath | None = None,
    *,
    need_questions: bool = True,
) -> tuple[list[Record], list[dict[str, str]]]:
    """Reads records from JSON or Parquet; images given as paths are checked to be there and are not opened.

    Keys of an entry: id (text or whole number), caption, image or img_path (a path; in Parquet also the file's bytes,
    or the datasets library's struct of bytes and path) or codes, questions (a list, keys as Question has them, or a
    struct of such lists), and category. Of a question element_type and element may
    be missing. An entry that is itself a question, with the key "question", belongs to the record of its id; so the
    published initial_data.json can be given with vqa_data.json as its questions, or vqa_data.json alone.

    Args:
        path: Parquet, or JSON in any form that read_entries takes, by what it begins with; a folder of such files, or
            a pattern such as "train-*.parquet", is read in the order of names.
        questions: such questions, joined to the records by id.
        root: the folder that image paths may not leave; they start from it, or where there is no such file from the
            folder of `path` inside it. None is the folder of `path`.
        need_questions: reject a record that has none.
    Returns: (records, rejected), both in the file's order; rejected are rows of UNUSABLE_SCHEMA.
    Raises: InputError if a file is missing or damaged, or no record can be used.
    """
    rejected: list[dict[str, str]] = []
    files = files_of(path)
    roots = (files[0].parent if root is None else Path(root), files[0].parent)
    rows = _join_questions(_read_rows(files), rejected)
    asked = {} if questions is None else _join_questions(_read_rows(files_of(questions)), rejected)
    records: dict[str, Record] = {}
    for id, (row, *others) in rows.items():
        try:
            records[id] = _record(id, row, asked.get(id, [{}])[0], roots, need_questions)
        except ValueError as error:
            rejected.append({"record_id": id, "reason": str(error)})
        rejected += [{"record_id": id, "reason": "duplicate id: an earlier entry has it"} for _ in others]
    if not records:
        raise InputError(f"{path}: no record can be used ({describe_rejected(rejected)}); mend the file")
    return list(records.values()), rejected


def read_records(
    path: StrPath, model: Model, questions: StrPath | None = None, root: StrPath | None = None
) -> list[Record]:
    """Reads records and encodes their images, ready for curate and train_records.

    Args:
        path, questions, root: as in read_source.
        model: encodes the images; it must know the words of captions and questions.
    Returns: those that can be used, in the file's order; what was left out is logged with the reasons.
    Raises: InputError as read_source, or if no record can be used with this model.
    """
    records, rejected = read_source(path, questions, root)
    usable = []
    for record, reason in encode_records(model, balance_questions(records), len(records)):
        if reason is None:
            usable.append(record)
        else:
            rejected.append({"record_id": record.id, "reason": reason})
    if not usable:
        raise InputError(f"{path}: no record can be used; rejected were {describe_rejected(rejected)}")
    if rejected:
        _LOGGER.warning("%s: left out %s", path, describe_rejected(rejected))
    return usable


def encode_records(model: Model, records: Iterable[Record], count: int) -> Iterator[tuple[Record, str | None]]:
    """Adds the codes of their images to records; images are opened a batch at a time and dropped, but for models that
    do not see codes.

    Args:
        model: encodes the images, and must know the words of captions and questions.
        records: with codes, images or image paths; images of other sizes are fitted to the model's (see fit_image).
        count: how many usable records are wanted; later ones are not looked at.
    Yields: in order (a usable record with its codes, None), or (a record, why it is unusable).
    """
    num_done, waiting, at_end = 0, iter(records), False
    while num_done < count and not at_end:
        wanted, at_end = count - num_done, True
        for record, codes in encode_lazily(
            model, itertools.islice(waiting, wanted), lambda record: _check_and_open(model, record), wanted
        ):
            at_end = False
            if isinstance(codes, str):
                yield record, codes
            else:
                [codes] = codes or [record.codes]
                num_done += 1
                asked = (question for question in record.balanced_questions if _knows(model, question))
                balanced = tuple(_distinct_choices(model, question) for question in asked)
                own = tuple(_distinct_choices(model, question) for question in record.questions)
                record = replace(record, questions=own, balanced_questions=balanced)
                kept = None if model.views_codes or _is_coded(record) else png_bytes(open_record(model, record))
                yield replace(record, codes=codes, image=kept, image_path=None), None


def encode_lazily(
    model: Model, items: Iterable[_Item], read: Callable[[_Item], list[np.ndarray]], total: int
) -> Iterator[tuple[_Item, list[np.ndarray] | str]]:
    """Encodes the images of each item, with no more than one batch of images in memory.

    Args:
        model: encodes them.
        items: what has images.
        read: the images of an item, uint8 [size, size, 3] each; raises ValueError where it cannot.
        total: how many items there are at most, for the progress bar.
    Yields: (item, codes int32 [N] of each of its images) in order, or (item, the reason) where read raised.
    """
    batch: list[tuple[_Item, list[np.ndarray] | str]] = []
    num_images = 0
    for item in track(items, "encode images", "records", total=total):
        try:
            images = read(item)
            batch.append((item, images))
            num_images += len(images)
        except ValueError as error:
            batch.append((item, str(error)))
        if num_images * model.image_size**2 >= _BATCH_PIXELS:
            yield from _encode(model, batch)
            batch, num_images = [], 0
    yield from _encode(model, batch)


def read_entries(path: StrPath) -> list[Any]:
    """The entries of a JSON file: a list, one object a line, or objects one after the other.

    Commas between entries may be missing and one may follow the last, as the published scripts write them.

    Args:
        path: the file, UTF-8, or packed by gzip.
    Returns: the entries, of any type.
    Raises: InputError if it is missing or no JSON; it names the line and column, of the start where an entry is cut.
    """
    return _parse_entries(path, _unpacked(path, read_bytes(path)))


def _parse_entries(path: StrPath, data: bytes) -> list[Any]:
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    entries, decoder, position, end = [], json.JSONDecoder(), 0, len(text)
    is_list = text.startswith("[")
    if is_list:
        position, end = _SPACE.match(text, 1).end(), end - text.endswith("]")
    while position < end:
        try:
            entry, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            line, column = text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)
            reason = getattr(error, "msg", None) or str(error)
            raise InputError(
                f"{path}: damaged JSON: the entry at line {line} column {column} cannot be read ({reason}); mend or "
                "remove it"
            ) from error
        entries.append(entry)
        position = _SEPARATOR.match(text, position).end()
    if is_list and (position > end or not text.endswith("]")):
        raise InputError(f"{path}: damaged JSON: the list that begins at its start has no end; add what is cut off")
    return entries


def path_inside(root: Path, name: str, start: Path | None = None) -> Path:
    """The file that a path from a data set means.

    Args:
        root: the folder that it may not leave. Files of a hub cache may be links to its blobs.
        name: the path.
        start: where it starts if there is no such file in root; must lie in root to be of use.
    Returns: the file, symbolic links followed.
    Raises: ValueError if it lies outside the root or is no file.
    """
    try:
        start = root if start is None or os.path.lexists(root / name) else start
        path = (start / name).resolve()
        inside = any(path.is_relative_to(each.resolve()) for each in (root, *_blobs_of(start)))
        there, plain = path.is_file(), Path(os.path.abspath(start / name))
    except (OSError, RuntimeError, ValueError) as error:  # too long, a circle of links, a null byte
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"missing image: {shown(name)} is no path ({why})") from error
    if not inside and plain.is_relative_to(os.path.abspath(root)):
        raise ValueError(
            f"path leaves its root: {shown(name)} leads by a link to {path}, outside {root}; give a data.root that "
            "holds both"
        )
    if not inside:
        raise ValueError(f"path leaves its root: {shown(name)} is outside {root}")
    if not there:
        raise ValueError(f"missing image: there is no file {shown(name)} in {root}")
    return path


def _blobs_of(folder: Path) -> list[Path]:
    """REPO/blobs of the hub's cache, where a folder lies in REPO/snapshots/REV, whose files are links."""
    whole = Path(os.path.abspath(folder))
    snapshots = [each for each in (whole, *whole.parents) if each.parent.name == "snapshots"]
    return [each.parent.parent / "blobs" for each in snapshots if (each.parent.parent / "blobs").is_dir()]


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


def files_of(path: StrPath) -> list[Path]:
    """The files that a source names: itself, those of a folder, or those of a pattern, by name.

    Raises: InputError if there are none.
    """
    given = Path(path).expanduser()
    if not _can_be_looked_at(given):
        return [given]  # its reader says why
    if given.is_dir():
        found = next((files for kind in _KINDS if (files := sorted(given.glob(kind)))), [])
        if not found:
            raise InputError(f"{path}: holds none of {', '.join(_KINDS)}; give the file, or the folder that has them")
        return found
    if given.exists() or not glob.has_magic(str(path)):
        return [given]
    found = sorted(Path(name) for name in glob.glob(str(given), recursive=True) if Path(name).is_file())
    if not found:
        raise InputError(f"{path}: no file fits this pattern; check it")
    return found


def _can_be_looked_at(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except (OSError, ValueError):  # too long, a circle of links, a null byte
        return False
    return True


def _read_rows(files: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    """("entry N of FILE", row) of each."""
    for file in files:
        for number, row in enumerate(_rows_of(file), 1):
            yield f"entry {number} of {file.name}", row


def _rows_of(path: Path) -> list[Any]:
    data = _unpacked(path, read_bytes(path))
    if not (data.startswith(_PARQUET) or path.suffix.lower() in (".parquet", ".pq")):
        return _parse_entries(path, data)
    try:
        return read_parquet(path).to_pylist()
    except (pa.ArrowException, ArithmeticError, UnicodeDecodeError) as error:  # no UTF-8, dates out of range
        raise damaged(path, "Parquet", error) from error


def _unpacked(path: StrPath, data: bytes) -> bytes:
    """What a file holds, by its first bytes. Raises: InputError if that is known to be neither JSON nor Parquet."""
    if data.startswith(_GZIP):
        try:
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(_MOST_UNPACKED + 1)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise damaged(path, "gzip", error) from error
        if len(data) > _MOST_UNPACKED:
            raise InputError(f"{path}: unpacks to more than {_MOST_UNPACKED // 2**30} GiB; split it")
    for start, kind in _OTHERS.items():
        if data.startswith(start):
            raise InputError(f"{path}: is {kind}, expected JSON or Parquet (.gz may pack JSON); convert it")
    return data


def _join_questions(rows: Iterable[tuple[str, Any]], rejected: list[dict[str, str]]) -> dict[str, list[dict]]:
    """Rows by id; of those that are questions the first carries the list of all with its id."""
    found: dict[str, list[dict]] = {}
    for place, row in rows:
        try:
            id = id_of(row)
        except ValueError as error:
            rejected.append({"record_id": place, "reason": str(error)})
            continue
        of_id = found.setdefault(id, [])
        if row.get("question") is None:
            of_id.append(row)
        elif of_id and of_id[0].get("question") is not None:
            of_id[0]["questions"].append(row)
        else:
            of_id.append(row | {"questions": [row]})
    return found


def _record(id: str, row: dict, joined: dict, roots: tuple[Path, Path], need_questions: bool) -> Record:
    """Raises: ValueError with the reason why the entry, with the questions joined to it, cannot be used."""
    caption = text_of(row, "caption")
    questions = [_question(question) for source in (row, joined) for question in _questions(source)]
    if need_questions and not questions:
        raise ValueError("no questions: there is nothing to judge its images by")
    category = "other" if row.get("category") is None else text_of(row, "category")
    record = Record(id, caption, category, tuple(questions))
    if row.get("codes") is not None:
        codes = _list(row, "codes")
        if not all(type(code) is int and 0 <= code < 2**31 for code in codes):
            raise ValueError(f"wrong type: codes is {shown(codes)}, expected whole numbers from 0")
        return replace(record, codes=np.array(codes, dtype=np.int32))
    key = next((key for key in ("image", "img_path") if _image_of(row, key) is not None), None)
    if key is None:
        raise ValueError("no image: the entry has neither image, img_path nor codes")
    image = _image_of(row, key)
    if isinstance(image, bytes):
        return replace(record, image=image)
    return replace(record, image_path=path_inside(roots[0], text_of({key: image}, key), roots[1]))


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
    question, answer = text_of(row, "question"), text_of(row, "answer").strip()
    choices = tuple(text_of({"choice": choice}, "choice").strip() for choice in _list(row, "choices"))
    answer = next((choice for choice in choices if plain_text(choice) == plain_text(answer)), answer)
    if len(set(map(plain_text, choices))) < 2:
        raise ValueError(f"too few choices: {shown(list(choices))} for {shown(question)}, expected two or more")
    if answer not in choices:
        values = [shown(value) for value in (answer, list(choices), question)]
        raise ValueError("wrong answer: {} is no choice of {} for {}".format(*values))
    kind, element = ("" if row.get(key) is None else text_of(row, key) for key in ("element_type", "element"))
    return Question(question, choices, answer, kind, element)


def _list(row: dict, key: str) -> list:
    value = row.get(key)
    if not isinstance(value, list | None):
        raise ValueError(f"wrong type: {key} is {shown(value)}, expected a list")
    return value or []


def _check_and_open(model: Model, record: Record) -> list[np.ndarray]:
    """The record's image if it is to be encoded, after a look at all the rest."""
    try:
        model.image_prompt(record.caption)
        for question in record.questions:
            model.choice_prompt(question.question, question.choices)
    except InputError as error:
        raise ValueError(f"unknown word: {str(error).partition('; ')[0]}") from error
    for question in record.questions:
        if len(_distinct_choices(model, question).choices) < 2:
            values = shown(list(question.choices)), shown(question.question)
            raise ValueError("too few choices: {} for {} are one to the model, expected two or more".format(*values))
    if record.codes is not None:
        _check_codes(model, record.codes)
        return []
    return [open_record(model, record)]


def _is_coded(record: Record) -> bool:
    return record.image is None and record.image_path is None


def _knows(model: Model, question: Question) -> bool:
    """Whether the model knows a question's words and tells its choices apart: it may be of another record, which is
    rejected for them."""
    try:
        model.choice_prompt(question.question, question.choices)
    except InputError:
        return False
    return len(_distinct_choices(model, question).choices) > 1


def _distinct_choices(model: Model, question: Question) -> Question:
    """The question with each choice once, as the model sees it."""
    return replace(question, choices=tuple(model.merge_choices(question.choices, question.answer)))


def open_record(model: Model, record: Record) -> np.ndarray:
    """A record's image as the model sees it, uint8 [image_size, image_size, 3].

    Raises: ValueError if there is none or it is damaged.
    """
    try:
        if record.image_path is not None:
            return decode_image(read_bytes(record.image_path), str(record.image_path), model.fit)
        if isinstance(record.image, bytes):
            return decode_image(record.image, "its image", model.fit)
    except InputError as error:
        raise ValueError(f"damaged image: {error}") from error
    if record.image is None:
        raise ValueError("no image: the record has neither an image nor codes")
    return model.fit(Image.fromarray(record.image))


def record_views(model: Model, records: Sequence[Record]) -> Tensor:
    """What the model sees of records' own images: codes int64 [B, N]; or features [B, F, D], of the images, and where a
    record has none of the images that its codes give."""
    codes = torch.from_numpy(np.stack([record.codes for record in records]).astype(np.int64))
    if model.views_codes or all(record.image is None for record in records):
        return model.view_codes(codes)
    decoded = iter(model.decode_images(codes[[record.image is None for record in records]]))
    images = [next(decoded) if record.image is None else open_record(model, record) for record in records]
    return model.view_pixels(np.stack(images))


def _check_codes(model: Model, codes: np.ndarray) -> None:
    try:
        model.layout.check_codes(codes)
    except ValueError as error:
        raise ValueError(f"wrong codes: {error}; give codes of this model's tokenizer, or the image") from error


def _encode(
    model: Model, batch: Sequence[tuple[_Item, list[np.ndarray] | str]]
) -> Iterator[tuple[_Item, list[np.ndarray] | str]]:
    images = [image for _, found in batch if not isinstance(found, str) for image in found]
    codes = iter(model.encode_images(np.stack(images)).cpu().numpy().astype(np.int32) if images else ())
    for item, found in batch:
        yield item, found if isinstance(found, str) else [next(codes) for _ in found]
