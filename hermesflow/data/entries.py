"""Entries of data files, read one by one: JSON in any form, Parquet, and tars of samples in WebDataset's form.

A file is a path or an address that fsspec opens (s3://, hf://); its kind is known by its first bytes. Each entry has a
place, by which it is found again without a look at what lies before it: the byte at which it begins, in Parquet its
row. What is in memory does not grow with the file.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa

from hermesflow.runtime.files import InputError, ParquetRows, StrPath, damaged, open_file

_PARQUET, _GZIP = b"PAR1", b"\x1f\x8b"
_OTHERS = {
    b"PK\x03\x04": "a zip archive", b"BZh": "packed by bzip2", b"\xfd7zXZ\x00": "packed by xz",
    b"\x28\xb5\x2f\xfd": "packed by zstd", b"ARROW1": "an Arrow file", b"\xff\xff\xff\xff": "an Arrow stream",
    b"ORC": "an ORC file", b"SQLite format 3": "an SQLite database",
}  # fmt: skip
"""How files begin that are of no kind that is read."""
_HEAD, _TAR_MAGIC = 512, slice(257, 262)
_CHUNK = 2**20
_MOST = 2**28
"""Characters, or bytes of a sample's file, of one entry."""
_ROWS = 64
"""Of Parquet that are in memory, with their images."""
_SPACE, _LONGEST_TOKEN = re.compile(r"\s*"), 16
_IMAGES = {"avif", "bmp", "gif", "j2k", "jp2", "jpeg", "jpg", "png", "tif", "tiff", "webp"}
"""Ends of names of a sample's image."""


def read_entries(path: StrPath) -> list[Any]:
    """The entries of a JSON file: a list, one object a line, or objects one after the other.

    Commas between entries may be missing and one may follow the last, as the published scripts write them.

    Args:
        path: the file, UTF-8, or packed by gzip; or an address of fsspec.
    Returns: the entries, of any type.
    Raises: InputError if it is missing or no JSON; it names the line and column, of the start where an entry is cut.
    """
    stream, _ = _open(path)
    with stream:
        return [entry for _, entry in _JsonStream(path, stream)]


class EntryFile:
    """The entries of one file."""

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
        """(place, entry) of all, in order; of Parquet and tars an entry may have these columns alone.

        Raises: InputError where the file is damaged.
        """
        raise NotImplementedError

    def read(self, places: Sequence[int]) -> Iterator[Any]:
        """The entries at these places, which ascend. Raises: InputError where the file is damaged or is another one."""
        raise NotImplementedError


def open_entries(path: StrPath) -> EntryFile:
    """A file's entries.

    Args:
        path: Parquet; JSON in any form that read_entries takes; or a tar, whose files of one name up to its first dot
            are an entry: NAME.json has its keys, of which id is NAME where it is missing, NAME.txt the caption and
            NAME.jpg (or another image's ending) the image. JSON and tars may be packed by gzip.
    Raises: InputError if it is missing, cannot be read or is known to be of another kind.
    """
    stream, head = _open(path)
    if head.startswith(_PARQUET) or str(path).lower().endswith((".parquet", ".pq")):
        stream.close()
        return _ParquetFile(path)
    return _TarFile(path, stream) if head[_TAR_MAGIC] == b"ustar" else _JsonFile(path, stream)


def _open(path: StrPath) -> tuple[BinaryIO, bytes]:
    """(what a file holds, unpacked; its first bytes). Raises: InputError, see open_entries."""
    stream = open_file(path)
    head = _read(path, stream, _HEAD)
    if head.startswith(_GZIP):
        stream.seek(0)
        stream = io.BufferedReader(gzip.GzipFile(fileobj=stream), _CHUNK)
        head = _read(path, stream, _HEAD)
    for start, kind in _OTHERS.items():
        if head.startswith(start):
            raise InputError(f"{path}: is {kind}, expected JSON, Parquet or a tar (.gz may pack it); convert it")
    stream.seek(0)
    return stream, head


def _read(path: StrPath, stream: BinaryIO, size: int) -> bytes:
    try:
        return stream.read(size)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        kind = "gzip" if isinstance(error, gzip.BadGzipFile | EOFError | zlib.error) else "data"
        raise damaged(path, kind, error) from error


def _changed(path: StrPath) -> InputError:
    return InputError(f"{path}: has not the entries any more that it had at first; put the file back as it was")


class _JsonFile(EntryFile):
    def __init__(self, path: StrPath, stream: BinaryIO) -> None:
        self._path, self._file, self._at = path, stream, None

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
        yield from _JsonStream(self._path, self._file)

    def read(self, places: Sequence[int]) -> Iterator[Any]:
        for place in places:
            if self._at is None or not 0 <= place - self._at.place < _CHUNK:
                self._at = _JsonStream(self._path, self._file, place)
            found, entry = next((item for item in self._at if item[0] >= place), (None, None))
            if found != place:
                raise _changed(self._path)
            yield entry


class _JsonStream(Iterator[tuple[int, Any]]):
    """(byte, entry) of the entries of a stream from a byte on, at which one begins."""

    def __init__(self, path: StrPath, stream: BinaryIO, start: int = 0) -> None:
        stream.seek(start)
        self._path, self._stream = path, stream
        self._text, self._position, self._at_end = "", 0, False
        self._line, self._column, self._num_bytes = 1, 1, start  # of the text's start; of what is read
        self._utf8, self._json = codecs.getincrementaldecoder("utf-8")(), json.JSONDecoder()
        self.place = start
        """The byte at which the next entry begins, or the blanks before it."""
        self._in_list = False
        if start == 0:
            self._begin()

    def _begin(self) -> None:
        self._skip_space()
        if self._next() == "\ufeff":
            self._move(self._position + 1)
            self._skip_space()
        if self._next() == "[":
            self._in_list = True
            self._move(self._position + 1)
            self._skip_space()

    def __next__(self) -> tuple[int, Any]:
        self._skip_space()
        if self._in_list and self._next() == "]":
            self._in_list = False
            self._move(self._position + 1)
            self._skip_space()
            if self._next():
                raise self._damaged("more follows the list's end")
        if not self._next():
            if self._in_list:
                raise InputError(
                    f"{self._path}: damaged JSON: the list that begins at its start has no end; add what is cut off"
                )
            raise StopIteration
        place, entry = self.place, self._decode()
        self._skip_space()
        if self._next() == ",":
            self._move(self._position + 1)
        return place, entry

    def _decode(self) -> Any:
        while True:
            try:
                entry, end = self._json.raw_decode(self._text, self._position)
            except (ValueError, RecursionError) as error:
                if self._at_end or not self._is_cut(error):
                    raise self._damaged(getattr(error, "msg", None) or str(error)) from error
            else:
                if end < len(self._text) or self._at_end:  # else a number may go on
                    self._move(end)
                    return entry
            self._fill()

    def _is_cut(self, error: Exception) -> bool:
        """Whether more text may mend it."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.pos > len(self._text) - _LONGEST_TOKEN or error.msg.startswith("Unterminated string")

    def _next(self) -> str:
        """The next character; empty at the end."""
        return self._text[self._position : self._position + 1]

    def _skip_space(self) -> None:
        skipped = 0
        while True:
            end = _SPACE.match(self._text, self._position).end()
            skipped += end - self._position
            self._move(end)
            if end < len(self._text) or self._at_end:
                return
            if skipped > _MOST:
                raise InputError(f"{self._path}: has {_MOST} blanks in a row, expected JSON; mend it")
            self._fill()

    def _move(self, end: int) -> None:
        passed = self._text[self._position : end] if not self._text.isascii() else None
        self.place += end - self._position if passed is None else len(passed.encode())
        self._position = end

    def _fill(self) -> None:
        """Reads on, the more the longer the entry is, and lets go of what lies before it."""
        rest = len(self._text) - self._position
        if rest > _MOST:
            raise self._damaged(f"it is longer than {_MOST} characters")
        data = _read(self._path, self._stream, max(_CHUNK, rest))
        self._at_end = not data
        pending = len(self._utf8.getstate()[0])
        try:
            more = self._utf8.decode(data, final=self._at_end)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self._path}: not UTF-8 text ({error.reason} at byte {self._num_bytes - pending + error.start}); "
                "save it as UTF-8"
            ) from error
        self._num_bytes += len(data)
        self._line, self._column = self._line_and_column()
        self._text, self._position = self._text[self._position :] + more, 0

    def _line_and_column(self) -> tuple[int, int]:
        """Of the position, from 1."""
        lines = self._text.count("\n", 0, self._position)
        if lines:
            return self._line + lines, self._position - self._text.rfind("\n", 0, self._position)
        return self._line, self._column + self._position

    def _damaged(self, reason: str) -> InputError:
        line, column = self._line_and_column()
        return InputError(
            f"{self._path}: damaged JSON: the entry at line {line} column {column} cannot be read ({reason}); mend or "
            "remove it"
        )


class _ParquetFile(EntryFile):
    def __init__(self, path: StrPath) -> None:
        self._path, self._rows = path, ParquetRows(path)
        self._names = self._rows.schema.names
        self._next, self._table, self._tables = 0, None, iter(())

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
        there, place = [name for name in columns if name in self._names], 0
        if not there:
            yield from ((place, {}) for place in range(len(self._rows)))
            return
        for table in ParquetRows(self._path, there).each():
            for row in self._python(table):
                yield place, row
                place += 1

    def read(self, places: Sequence[int]) -> Iterator[Any]:
        for place in places:
            while self._table is None or not self._next - len(self._table) <= place < self._next:
                self._go_to(place)
            [row] = self._python(self._table.slice(place - self._next + len(self._table), 1))
            yield row

    def _go_to(self, place: int) -> None:
        """Reads on to a row, or from the start of its row group if that lies behind or further on."""
        if self._table is None or not self._next <= place < self._rows.group_end(self._next):
            self._tables, self._next = self._rows.each(place, _ROWS), place
        self._table = next(self._tables, None)
        if self._table is None:
            raise _changed(self._path)
        self._next += len(self._table)

    def _python(self, table: pa.Table) -> list[dict[str, Any]]:
        try:
            return table.to_pylist()
        except (pa.ArrowException, ArithmeticError, ValueError) as error:  # no UTF-8, times that Python has not
            raise damaged(self._path, "Parquet", error) from error


class _TarFile(EntryFile):
    def __init__(self, path: StrPath, stream: BinaryIO) -> None:
        self._path, self._file = path, stream

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
        yield from self._samples(0, with_images=False)

    def read(self, places: Sequence[int]) -> Iterator[Any]:
        for place in places:
            sample = next((sample for _, sample in self._samples(place, with_images=True)), None)
            if sample is None:
                raise _changed(self._path)
            yield sample

    def _samples(self, start: int, with_images: bool) -> Iterator[tuple[int, Any]]:
        """(byte, sample) of those from a byte on, at which one begins."""
        name, place, files = None, start, {}
        for member in self._members(start):
            folder, slash, last = member.name.rpartition("/")
            base, _, end = last.partition(".")
            if name is not None and folder + slash + base != name:
                yield place, _sample(name, files)
                files = {}
            if not files:
                name, place = folder + slash + base, member.offset
            files[end.lower()] = self._data(member) if with_images or end.lower() in ("json", "txt") else b""
        if name is not None:
            yield place, _sample(name, files)

    def _members(self, start: int) -> Iterator[tarfile.TarInfo]:
        """The plain files, but for hidden ones."""
        self._file.seek(start)
        with self._reading():
            self._tar = tarfile.TarFile(fileobj=self._file)
        while True:
            with self._reading():
                member = self._tar.next()
                self._tar.members.clear()  # it keeps all that it saw
            if member is None:
                return
            if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.name.startswith("."):
                yield member

    def _data(self, member: tarfile.TarInfo) -> bytes:
        if member.size > _MOST:
            raise InputError(f"{self._path}: {member.name} has more than {_MOST} bytes; leave it out")
        with self._reading():
            return self._tar.extractfile(member).read()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
            raise damaged(self._path, "tar", error) from error


def _sample(name: str, files: dict[str, bytes]) -> Any:
    """A sample as an entry; what of its texts cannot be read stands in its place, and is rejected for it."""
    row: Any = {"id": name}
    if "json" in files:
        try:
            own = json.loads(files["json"].decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return f"{name}.json is damaged"
        if not isinstance(own, dict):
            return own
        row |= {key: value for key, value in own.items() if value is not None}
    if "txt" in files:
        try:
            row.setdefault("caption", files["txt"].decode("utf-8-sig").strip())
        except UnicodeDecodeError:
            return f"{name}.txt is not UTF-8"
    image = next((files[end] for end in files if end in _IMAGES), None)
    return row if image is None else {key: row[key] for key in row if key != "img_path"} | {"image": image}
