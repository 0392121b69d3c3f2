"""Files: every write goes to a temporary name beside its target and is renamed, so what exists is whole."""

import bisect
import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

_Result = TypeVar("_Result")
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}
_LEAST_FREE_BYTES = 1 << 20
_MAX_MESSAGE = 1 << 16
_ROWS_PER_GROUP = 1024
# Parquet is read without Arrow's threads: one that lets go of a Python object, a file or bytes, while Python ends is
# ended in the midst of C++, and the process with it ("terminate called without an active exception", exit code 134).
_OLDER = "old.tmp"


StrPath = str | os.PathLike[str]
"""Paths as users give them."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that names it and says how to mend it.

    What a file says may stand in it: line breaks become blanks, other control characters are escaped, and the middle of
    an endless line is left out.
    """

    def __init__(self, message: str) -> None:
        if len(message) > _MAX_MESSAGE:
            message = f"{message[: _MAX_MESSAGE // 2]} ... {message[-_MAX_MESSAGE // 2 :]}"
        super().__init__("".join(_on_one_line(char) for char in message))


def write_problem(path: StrPath, error: BaseException) -> InputError | None:
    """The InputError that explains a failed write to `path`, or None if the error is about something else.

    Args:
        path: the file or folder that was being written.
        error: what was raised meanwhile.
    """
    code = error.errno if isinstance(error, OSError) else None
    # Writers in C++ and Rust (torch, safetensors) raise errors of their own, with the system's words inside.
    text = str(error)
    if code in _DISK_FULL or any(os.strerror(full) in text for full in _DISK_FULL):
        return _disk_full(path)
    if code in _UNWRITABLE:
        return InputError(f"{path}: cannot be written ({os.strerror(code)}); choose a folder you can write to")
    return None


def expand_home(path: str) -> str:
    """The path with a ~ or ~user at its start written out. Raises: InputError if there is no home folder."""
    expanded = os.path.expanduser(path)
    if expanded.partition("/")[0] == "~":
        raise InputError(f"{path}: ~ is the home folder, which this user has not; set HOME, or write the whole path")
    return expanded


def make_folder(path: StrPath) -> Path:
    """Make a folder and its parents.

    Args:
        path: the folder; it may exist.
    Returns: the folder as a Path.
    Raises: InputError if it cannot be made.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = write_problem(folder, error)
        if problem is not None:
            raise problem from error
        raise
    return folder


def check_output(path: StrPath) -> None:
    """Shows before a long work that its file cannot be written; makes the file's folder.

    Raises: InputError if `path` is a folder or a device, or its folder cannot be written.
    """
    target = Path(path)
    make_folder(target.parent)
    if os.path.exists(target) and not os.path.isfile(target):
        raise InputError(f"{path}: is a folder or a device; give the name of a file")
    temporary = _temporary(target)
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise write_problem(target, error) or error from error


@contextlib.contextmanager
def atomic_write(path: StrPath) -> Iterator[Path]:
    """Write a file all at once: `with atomic_write(path) as temporary: temporary.write_text(...)`.

    The temporary file lies in the same folder; it replaces `path` when the block ends, or is removed if it raises.

    Args:
        path: the file to write; its folder is made if need be.
    Yields: the temporary path to write to.
    Raises: InputError if the folder cannot be written or the disk is full.
    """
    target = Path(path)
    make_folder(target.parent)
    temporary = _temporary(target)
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, target)
        _flush(target.parent)
    except BaseException as error:
        problem = _block_problem(target, error)  # before the space is given back
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if problem is not None:
            raise problem from error
        raise


@contextlib.contextmanager
def atomic_folder(path: StrPath) -> Iterator[Path]:
    """Write a folder all at once; the block fills the temporary folder it is given, which then replaces `path`.

    Args:
        path: the folder to write; an older one of that name is replaced.
    Yields: the temporary folder to fill.
    Raises: InputError if it cannot be written or the disk is full.
    """
    target = Path(path)
    make_folder(target.parent)
    temporary, older = _temporary(target), _temporary(target, _OLDER)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for item in [*temporary.rglob("*"), temporary]:
            _flush(item)
        if target.exists():
            os.replace(target, older)
        os.replace(temporary, target)
        _flush(target.parent)
        shutil.rmtree(older, ignore_errors=True)
    except BaseException as error:
        problem = _block_problem(target, error)
        shutil.rmtree(temporary, ignore_errors=True)
        if problem is not None:
            raise problem from error
        raise


def remove_leftovers(folder: StrPath) -> None:
    """Remove the temporary files and folders that a killed process left anywhere below `folder`.

    A folder that was out of its place, since a new one was about to take it, is put back.

    Args:
        folder: a run's folder that no other process is writing to.
    """
    for leftover in list(Path(folder).rglob(".*.tmp")):
        target = leftover.with_name(leftover.name[1:].rsplit(".", 3)[0])
        if leftover.name.endswith(f".{_OLDER}") and not target.exists():
            os.replace(leftover, target)
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def write_text(path: StrPath, text: str) -> None:
    """Write text as UTF-8, all at once. Raises: InputError if it cannot be written, or is not valid Unicode."""
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{path}: cannot be written: {invalid_text(error)}") from error
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: StrPath, value: Any) -> None:
    """Write a value as indented JSON, all at once.

    Args:
        path: the file.
        value: anything that JSON can hold; NaN and infinity are refused, since other readers refuse them.
    Raises: InputError if it cannot be written, ValueError on NaN or infinity.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: StrPath) -> Any:
    """Read a JSON file.

    Raises: InputError if it is missing, unreadable or damaged.
    """
    data = read_bytes(path)
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number of thousands of digits
        raise damaged(path, "JSON", error) from error


def write_parquet(path: StrPath, table: pa.Table) -> None:
    """Write a table as Parquet, all at once. Raises: InputError if it cannot be written."""
    with atomic_write(path) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)


@contextlib.contextmanager
def parquet_writer(path: StrPath, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """Write a table part by part, with no more than a row group of it in memory.

    `with parquet_writer(path, schema) as write: write(part)`: the file appears whole when the block ends, or not at all
    if it raises.

    Args:
        path: the file.
        schema: of every part.
    Yields: the function that adds a part.
    Raises: InputError if it cannot be written.
    """
    waiting = schema.empty_table()
    with atomic_write(path) as temporary, pq.ParquetWriter(temporary, schema, write_page_checksum=True) as writer:

        def write(table: pa.Table) -> None:
            nonlocal waiting
            waiting = pa.concat_tables([waiting, table])
            if len(waiting) >= _ROWS_PER_GROUP:
                writer.write_table(waiting, _ROWS_PER_GROUP)
                waiting = schema.empty_table()

        yield write
        writer.write_table(waiting)


class ParquetRows:
    """The rows of a Parquet file, read where they are used; one row group at a time is in memory."""

    def __init__(self, path: StrPath, columns: list[str] | None = None) -> None:
        """
        Args:
            path: the file.
            columns: the columns that are needed; None reads all.
        Raises: InputError if it is missing, unreadable, damaged or lacks a column; read raises it for damage inside.
        """
        self.path, self._columns = path, columns
        source = open_file(path)  # closed with this object
        self._file = _open_parquet(path, source, source.seek(0, os.SEEK_END), columns)
        groups = range(self._file.num_row_groups)
        self._starts = [0, *itertools.accumulate(self._file.metadata.row_group(group).num_rows for group in groups)]
        self._group: tuple[int, pa.Table] | None = None

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def schema(self) -> pa.Schema:
        """The file's schema, with its metadata."""
        return self._file.schema_arrow

    def each(self, start: int = 0, rows: int = 256) -> Iterator[pa.Table]:
        """The rows from one on, some at a time; of a row group that is large no more than its pages are in memory."""
        group = bisect.bisect_right(self._starts, start) - 1
        groups, skipped = list(range(group, self._file.num_row_groups)), start - self._starts[group]
        batches = _arrow(self.path, lambda: self._file.iter_batches(rows, groups, self._columns, use_threads=False))
        while (batch := _arrow(self.path, lambda: next(batches, None))) is not None:
            if skipped < len(batch):
                yield pa.Table.from_batches([batch[skipped:]])
            skipped = max(0, skipped - len(batch))

    def group_end(self, row: int) -> int:
        """The row behind the row group that a row belongs to; the length for a row that there is not."""
        return self._starts[min(bisect.bisect_right(self._starts, row), len(self._starts) - 1)]

    def read(self, start: int, stop: int) -> pa.Table:
        """Rows start to stop, 0 <= start <= stop <= the length."""
        first, last = bisect.bisect_right(self._starts, start) - 1, bisect.bisect_left(self._starts, stop)
        parts = [self._read_group(group) for group in range(min(first, self._file.num_row_groups), last)]
        if not parts:
            return _arrow(self.path, lambda: self._file.read_row_groups([], self._columns, use_threads=False))
        offset = start - self._starts[first]
        return pa.concat_tables(parts).slice(offset, stop - start)

    def _read_group(self, group: int) -> pa.Table:
        if self._group is None or self._group[0] != group:
            self._group = None  # frees it first
            self._group = (
                group,
                _arrow(self.path, lambda: self._file.read_row_group(group, self._columns, use_threads=False)),
            )
        return self._group[1]


def read_parquet(path: StrPath, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file.

    Args:
        path: the file.
        columns: the columns that are needed; None reads all.
    Raises: InputError if it is missing, unreadable, damaged or lacks a column.
    """
    data = read_bytes(path)
    file = _open_parquet(path, pa.BufferReader(data), len(data), columns)
    return _arrow(path, lambda: file.read(columns, use_threads=False))


def is_url(path: StrPath) -> bool:
    """Whether a path is an address that fsspec opens, such as s3://bucket/data.jsonl."""
    return "://" in str(path)


def open_file(path: StrPath) -> BinaryIO:
    """A file, or what lies at an address of fsspec, open for reading and seeking.

    Raises: InputError if it is missing or cannot be read.
    """
    if not is_url(path):
        with _reading(path):
            return open(path, "rb")
    import fsspec  # loaded only where it is needed

    try:
        return fsspec.open(str(path), "rb").open()
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file; check the address") from error
    except Exception as error:  # of each file system its own, and of a package of it that is not installed
        raise InputError(
            f"{path}: cannot be opened ({reason_of(error)}); check the address and what its file system needs"
        ) from error


def read_bytes(path: StrPath) -> bytes:
    """Read a file or an address whole. Raises: InputError if it is missing, cannot be read or is larger than the
    memory."""
    with open_file(path) as file, _reads(path):
        return file.read()


def read_text(path: StrPath) -> str:
    """Read a text file whole, without a byte order mark. Raises: InputError as read_bytes, and if it is not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text; save it as UTF-8") from error


def split_lines(text: str) -> list[str]:
    r"""The lines of a user's text, which end at \n or \r\n alone; str.splitlines ends them at U+2028 and others too."""
    lines = re.split(r"\r?\n", text)
    return lines if lines[-1] else lines[:-1]


@contextlib.contextmanager
def _reading(path: StrPath) -> Iterator[None]:
    """Tells what goes wrong in the block, which opens a file, as an InputError."""
    with _reads(path):
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe may never end, nor a device such as /dev/zero
            raise InputError(f"{path}: cannot be read (it is no regular file); give a file")
        yield


@contextlib.contextmanager
def _reads(path: StrPath) -> Iterator[None]:
    """Tells what goes wrong in the block, which reads a file, as an InputError."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; check the path") from error
    except InputError:
        raise
    except (OSError, ValueError, MemoryError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise InputError(f"{path}: cannot be read ({reason}); give a file you can read") from error


def _open_parquet(path: StrPath, source: Any, size: int, columns: list[str] | None) -> pq.ParquetFile:
    """The open file, once its footer and its columns were looked at."""

    def work() -> pq.ParquetFile:
        file = pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=False)
        if file.metadata.num_rows > size:  # a small file can repeat one value for ever
            raise pa.ArrowInvalid(f"{file.metadata.num_rows} rows in {size} bytes")
        names = file.schema_arrow.names
        missing = [name for name in columns or [] if name not in names]
        if missing:
            raise InputError(f"{path}: has no column {missing[0]!r}; it has {', '.join(names)}; give another file")
        return file

    return _arrow(path, work)


def _arrow(path: StrPath, work: Callable[[], _Result]) -> _Result:
    """What the work returns. Raises: InputError where it finds the file damaged."""
    try:
        return work()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise damaged(path, "Parquet", error) from error


def damaged(path: StrPath, kind: str, error: BaseException) -> InputError:
    """The InputError for a file that was read but makes no sense.

    Args:
        path: the file.
        kind: what it should have been, such as "Parquet" or "checkpoint".
        error: what its reader said; the first line is shown.
    """
    return InputError(
        f"{path}: damaged {kind} file ({reason_of(error)}); restore it from a copy, "
        "or, if a run made it, delete it and run the same command again"
    )


def reason_of(error: BaseException) -> str:
    """What an error says, for a message: its first line, else its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def check_unicode(text: str, name: str) -> str:
    """The text. Raises: InputError that calls it by its name if it is not valid Unicode, as of a Latin-1 argument."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name}: {invalid_text(error)}") from error
    return text


def invalid_text(error: UnicodeEncodeError) -> str:
    """What is wrong with a text that UTF-8 cannot hold, for a message."""
    start = max(0, error.start - 30)
    part = error.object[start : error.start + 30]
    return f"{part!r} is not valid Unicode text; write it in UTF-8, and rename the file if it names one"


def shown(value: Any) -> str:
    """A value from a file, for a message: its repr, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _on_one_line(char: str) -> str:
    return char if char.isprintable() else " " if char.isspace() else char.encode("unicode_escape").decode()


def _disk_full(path: StrPath) -> InputError:
    return InputError(f"{path}: the disk is full; free some space or choose another folder, then run again")


def _block_problem(path: Path, error: BaseException) -> InputError | None:
    """As write_problem, for whatever the block that writes `path` raised."""
    problem = write_problem(path, error)
    if problem is None and isinstance(error, Exception) and not isinstance(error, InputError):
        # torch.save reports a full disk as a wrong position in the file, so look at the disk itself.
        if shutil.disk_usage(path.parent).free < _LEAST_FREE_BYTES:
            return _disk_full(path)
    return problem


def _temporary(target: Path, suffix: str = "tmp") -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.{suffix}")


def _flush(path: Path) -> None:
    """Have the system put a file or a folder's entries on the disk, so that the rename cannot overtake the data."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
