"""Files: what exists is whole, and every failure names the file and the fix."""

import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hermesflow.runtime import files
from hermesflow.runtime.files import InputError, ParquetRows, parquet_writer, read_parquet, write_parquet


@pytest.fixture
def table():
    return pa.table({"id": ["a", "b"], "codes": [[1, 2], []]})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_json_round_trip_makes_the_folder(tmp_path):
    path = tmp_path / "deep" / "er" / "value.json"
    files.write_json(path, {"text": "é", "numbers": [1, 2.5, None]})
    assert files.read_json(path) == {"text": "é", "numbers": [1, 2.5, None]}
    assert names(path.parent) == ["value.json"]


def test_parquet_round_trip(tmp_path, table):
    path = tmp_path / "table.parquet"
    files.write_parquet(path, table)
    assert files.read_parquet(path).equals(table)
    assert files.read_parquet(path, ["codes"]).column_names == ["codes"]
    assert names(tmp_path) == ["table.parquet"]


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "value.json"
    files.write_json(path, 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, float("nan"))
    assert files.read_json(path) == 1


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "value.txt"
    files.write_text(path, "old")
    with pytest.raises(type(error)), files.atomic_write(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["value.txt"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "step-1"
    with pytest.raises(RuntimeError), files.atomic_folder(path) as temporary:
        (temporary / "half").write_text("half")
        raise RuntimeError
    assert names(tmp_path) == []
    for text in ("old", "new"):
        with files.atomic_folder(path) as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner" / text).write_text(text)
            assert (tmp_path / "step-1" / "inner" / "old").exists() == (text == "new")
    assert names(tmp_path) == ["step-1"] and names(path / "inner") == ["new"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    inner = tmp_path / "round-1"
    (inner / ".step-1.123.tmp").mkdir(parents=True)
    (inner / ".step-1.123.tmp" / "model").touch()
    (inner / ".part-0.parquet.123.tmp").touch()
    (inner / "part-0.parquet").touch()
    files.remove_leftovers(tmp_path)
    assert names(inner) == ["part-0.parquet"]


def test_a_folder_that_was_about_to_be_replaced_is_put_back(tmp_path, monkeypatch):
    path = tmp_path / "best"
    with files.atomic_folder(path) as temporary:
        (temporary / "old").touch()
    moved, replace = [], os.replace

    def killed(source, target):
        if moved:
            os._exit(0)
        moved.append(replace(source, target))

    process = os.fork()
    if not process:
        monkeypatch.setattr(os, "replace", killed)
        with files.atomic_folder(path) as temporary:
            (temporary / "new").touch()
    os.waitpid(process, 0)
    assert not path.exists()
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["best"] and names(path) == ["old"]


@pytest.mark.parametrize("data", [b'"\xc3\xa9"', b'\xef\xbb\xbf"\xc3\xa9"'], ids=["plain", "byte order mark"])
def test_a_byte_order_mark_is_no_text(tmp_path, data):
    (tmp_path / "a").write_bytes(data)
    assert files.read_text(tmp_path / "a") == '"é"' and files.read_json(tmp_path / "a") == "é"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", []),
        ("\n", [""]),
        ("a", ["a"]),
        ("a\nb\r\nc\n", ["a", "b", "c"]),
        ("a\n\n\r\nb", ["a", "", "", "b"]),
        ("a\rb\n\rc", ["a\rb", "\rc"]),
        ("a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei", ["a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"]),
    ],
    ids=["empty", "blank", "no end", "both ends", "blank lines", "carriage return", "separators"],
)
def test_lines_end_at_line_ends_alone(text, lines):
    assert files.split_lines(text) == lines


@pytest.mark.parametrize(
    ("path", "expanded"),
    [("~", "/home/me"), ("~/a/~", "/home/me/a/~"), ("a/~", "a/~"), ("./~", "./~"), ("~nobody-of-that-name/a",) * 2,
     ("", ""), ("a~", "a~"), ("~root/a", f"{os.path.expanduser('~root')}/a")],
)  # fmt: skip
def test_the_home_folder_is_written_out(path, expanded, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert files.expand_home(path) == expanded


@pytest.mark.parametrize("path", ["~", "~/a"])
def test_a_user_without_a_home_folder(path, monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(InputError, match=f"^{path}: ~ is the home folder, .*; set HOME, or write the whole path"):
        files.expand_home(path)


def test_an_output_is_checked_and_left_as_it_is(tmp_path, no_folder):
    files.check_output(tmp_path / "new" / "file")
    assert names(tmp_path) == ["a-file", "new"] and names(tmp_path / "new") == []
    (tmp_path / "old").write_text("old")
    files.check_output(tmp_path / "old")
    assert (tmp_path / "old").read_text() == "old"
    refused = {tmp_path: "is a folder or a device; give the name of a file", "/dev/null": "is a folder or a device"}
    refused |= {no_folder / "file": "cannot be written", tmp_path / ("x" * 300): "cannot be written"}
    for path, message in refused.items():
        with pytest.raises(InputError, match=message):
            files.check_output(path)


@pytest.mark.parametrize("write", [files.write_text, files.write_json])
def test_text_that_is_no_unicode(tmp_path, write):
    text = f"{'a' * 50}\udce9{'b' * 50}"
    with pytest.raises(
        InputError, match=r"file: cannot be written: .*a{30}\\udce9b{29}' is not valid Unicode text; wr"
    ):
        write(tmp_path / "file", text)
    assert names(tmp_path) == []
    with pytest.raises(InputError, match=r"^prompt 3: '\\ud800' is not valid Unicode text"):
        files.check_unicode("\ud800", "prompt 3")
    assert files.check_unicode("é\0 🙂", "prompt") == "é\0 🙂"


WRITERS = {
    "text": lambda path: files.write_text(path, "x" * 200_000),
    "json": lambda path: files.write_json(path, "x" * 200_000),
    # numbers that do not compress, so that they do not fit
    "parquet": lambda path: files.write_parquet(path, pa.table({"x": np.random.default_rng(0).random(50_000)})),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_folder_that_cannot_be_written(no_folder, write):
    with pytest.raises(InputError, match=r"a-file.folder: cannot be written .*; choose a folder you can write to"):
        write(no_folder / "value")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only folder")
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_read_only_folder(tmp_path, write):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot be written .*; choose a folder"):
        write(tmp_path / "value")


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk(full_disk, write):
    with pytest.raises(InputError, match="value: the disk is full; free some space"):
        write(full_disk / "value")
    assert names(full_disk) == ["filling"]


def test_a_full_disk_told_by_torch_and_safetensors(full_disk):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    weights = {"weight": torch.zeros(50_000)}
    for save in (torch.save, save_file):
        with pytest.raises(InputError, match="model: the disk is full"):
            with files.atomic_write(full_disk / "model") as file:
                save(weights, file)
        with pytest.raises(InputError, match="step-1: the disk is full"):
            with files.atomic_folder(full_disk / "step-1") as folder:
                save(weights, folder / "model")
    assert names(full_disk) == ["filling"]


def test_missing_files(tmp_path):
    for read in (files.read_json, files.read_parquet):
        with pytest.raises(InputError, match="none: no such file; check the path"):
            read(tmp_path / "none")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        files.read_json(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xff"], ids=["empty", "cut", "binary"])
def test_damaged_json(tmp_path, content):
    path = tmp_path / "value.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"value.json: damaged JSON file \(.*\); restore it .* delete it and run"):
        files.read_json(path)


@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.95], ids=["empty", "tiny", "half", "no footer"])
def test_damaged_parquet(tmp_path, table, keep):
    path = tmp_path / "part-0.parquet"
    files.write_parquet(path, table)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else keep])
    with pytest.raises(InputError, match=r"part-0.parquet: damaged Parquet file \(.*\); restore it") as caught:
        files.read_parquet(path)
    assert "\n" not in str(caught.value)


def test_parquet_with_flipped_bytes(tmp_path):
    path = tmp_path / "part-0.parquet"
    files.write_parquet(path, pa.table({"x": np.random.default_rng(0).random(1000)}))
    content = bytearray(path.read_bytes())
    content[8:60] = bytes(52)  # the first page's header
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged Parquet file"):
        files.read_parquet(path)


def test_parquet_with_a_flipped_byte_of_data(tmp_path):
    path = tmp_path / "part-0.parquet"
    numbers = np.random.default_rng(0).random(1000)  # do not compress, so that they lie in the file as they are
    files.write_parquet(path, pa.table({"x": numbers}))
    content = bytearray(path.read_bytes())
    content[content.index(numbers[500].tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="part-0.parquet: damaged Parquet file"):
        files.read_parquet(path)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("a\nb\u2028c\td", "a b c d"),
        ("\x1b[2J\0", r"\x1b[2J\x00"),
        ("\ud800.png", r"\ud800.png"),
        ("größe 図", "größe 図"),
        ("a" * 10**6 + "; mend it", "a" * 2**15 + " ... " + "a" * (2**15 - 9) + "; mend it"),
    ],
    ids=["breaks", "control", "surrogate", "printable", "endless"],
)
def test_an_error_is_one_line_that_a_terminal_can_show(message, words):
    assert str(InputError(message)) == words


def test_parquet_without_the_column(tmp_path, table):
    path = tmp_path / "table.parquet"
    files.write_parquet(path, table)
    with pytest.raises(InputError, match="table.parquet: has no column 'score'; it has id, codes"):
        files.read_parquet(path, ["id", "score"])


def numbers(start, stop):
    return pa.table({"a": pa.array(range(start, stop), pa.int64())})


@pytest.mark.parametrize("sizes", [(), (0,), (3, 4), (1024,), (700, 700, 700), (5000,)], ids=str)
def test_a_table_written_and_read_in_parts_is_the_table(tmp_path, sizes):
    path, num_rows = tmp_path / "t.parquet", sum(sizes)
    with parquet_writer(path, numbers(0, 0).schema) as write:
        start = 0
        for size in sizes:
            write(numbers(start, start := start + size))
        assert not path.exists()
    assert read_parquet(path).equals(numbers(0, num_rows))
    rows = ParquetRows(path)
    assert len(rows) == num_rows and rows.schema == numbers(0, 0).schema
    for low, high in ((0, 0), (0, num_rows), (num_rows // 3, num_rows // 2), (num_rows, num_rows)):
        assert rows.read(low, high).equals(numbers(low, high))


def test_small_parts_make_few_row_groups(tmp_path):
    """Each group of rows costs memory until the file is closed."""
    with parquet_writer(tmp_path / "t.parquet", numbers(0, 0).schema) as write:
        for start in range(3000):
            write(numbers(start, start + 1))
    assert pq.ParquetFile(tmp_path / "t.parquet").num_row_groups == 3


def test_a_table_that_breaks_off_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), parquet_writer(tmp_path / "t.parquet", numbers(0, 0).schema) as write:
        write(numbers(0, 2000))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["none.parquet", "short.parquet", "column.parquet", "inside.parquet"])
def test_rows_of_a_file_that_cannot_be_read_name_it(tmp_path, name):
    path = tmp_path / name
    write_parquet(path, numbers(0, 5000))
    data = bytearray(path.read_bytes())
    data[100] ^= 255
    {
        "none": lambda: path.unlink(),
        "short": lambda: path.write_bytes(data[:50]),
        "column": lambda: None,
        "inside": lambda: path.write_bytes(data),
    }[path.stem]()
    words = {"none": "no such file", "column": "has no column 'b'"}.get(path.stem, "damaged Parquet file")
    with pytest.raises(InputError, match=f"{name}: {words}"):
        ParquetRows(path, ["b"] if path.stem == "column" else None).read(0, 10)


THREADS = """
import os, sys
from pathlib import Path
import pyarrow as pa
from hermesflow.runtime.files import ParquetRows, read_parquet, write_parquet
path = Path(sys.argv[1])
write_parquet(path, pa.table({str(number): list(range(5000)) for number in range(20)}))
before = len(os.listdir("/proc/self/task"))
rows = ParquetRows(path)
assert len(read_parquet(path)) == len(rows.read(0, 5000)) == sum(map(len, rows.each())) == 5000
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads")
def test_no_thread_of_arrows_outlives_the_reading_of_a_file(tmp_path):
    """One that lets go of a file while Python ends takes the process down with it, seldom enough to be missed."""
    command = [sys.executable, "-P", "-c", THREADS, str(tmp_path / "a.parquet")]
    assert subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout == "0\n"
