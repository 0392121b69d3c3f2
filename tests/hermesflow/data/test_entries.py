"""Entries of every kind of file: read in pieces, found again by their place, here and at addresses."""

import gzip
import io
import json
import os
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hermesflow.data import entries, sources
from hermesflow.data.entries import open_entries, read_entries
from hermesflow.data.locations import files_of
from hermesflow.data.sources import Source, read_source, scan_source
from hermesflow.runtime.files import InputError

QUESTION = {"question": "is there a circle ?", "choices": ["yes", "no"], "answer": "yes"}
ROWS = [
    {"id": f"é{number}", "caption": "ein Kreis 圆 \U0001f534" * (number % 5), "n": number, "questions": [QUESTION]}
    for number in range(300)
]


def png(size=64):
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (size, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(rows, row_group_size=50):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=row_group_size)
    return buffer.getvalue()


def tar(files, mode="w"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


FORMS = {
    "lines": lines(ROWS),
    "lines with a mark and blanks": b"\xef\xbb\xbf\n\n" + lines(ROWS).replace(b"\n", b"\r\n\r\n"),
    "list": json.dumps(ROWS, indent=3, ensure_ascii=False).encode(),
    "escaped list": json.dumps(ROWS).encode(),
    "with commas": lines(ROWS).replace(b"\n", b",\n"),
    "gzip": gzip.compress(lines(ROWS)),
    "Parquet": parquet(ROWS),
    "Parquet of one row group": parquet(ROWS, 10**6),
    "tar": tar({f"a/{number:04d}.json": json.dumps(row).encode() for number, row in enumerate(ROWS)}),
    "tar.gz": tar({f"{number:04d}.json": json.dumps(row).encode() for number, row in enumerate(ROWS)}, "w:gz"),
}


@pytest.fixture
def in_pieces(monkeypatch):
    """So small that every entry is cut somewhere."""
    monkeypatch.setattr(entries, "_CHUNK", 97)
    monkeypatch.setattr(entries, "_ROWS", 7)


@pytest.mark.parametrize("data", FORMS.values(), ids=FORMS.keys())
def test_entries_are_found_again_by_their_places(data, tmp_path, in_pieces):
    (tmp_path / "data").write_bytes(data)
    columns = list(ROWS[0])
    found = list(open_entries(tmp_path / "data").scan(columns))
    assert [row for _, row in found] == ROWS
    places = [place for place, _ in found]
    assert places == sorted(set(places))
    rng, file = np.random.default_rng(0), open_entries(tmp_path / "data")
    for wanted in ([0], [299], [5, 6, 7], range(100, 200), sorted(rng.choice(300, 40, replace=False)), [0, 299]):
        assert list(file.read([places[number] for number in wanted])) == [ROWS[number] for number in wanted]


@pytest.mark.parametrize("cut", range(1, 400, 7))
def test_json_that_is_cut_is_damaged_wherever_it_is_cut(cut, tmp_path, in_pieces):
    whole = json.dumps(ROWS[:5]).encode()
    (tmp_path / "data.json").write_bytes(whole[:-cut])
    with pytest.raises(InputError, match="damaged JSON: the entry at line 1 column|damaged JSON: the list that begins"):
        read_entries(tmp_path / "data.json")


def test_a_damaged_entry_is_named_by_its_place_without_a_look_at_the_rest(tmp_path, in_pieces, monkeypatch):
    (tmp_path / "data.jsonl").write_bytes(lines(ROWS[:20]) + b'  {"id": nothing}\n' + lines(ROWS) * 20)
    read = []
    monkeypatch.setattr(entries, "_read", lambda path, stream, size: read.append(size) or stream.read(size))
    with pytest.raises(InputError, match="entry at line 21 column 3 cannot be read"):
        read_entries(tmp_path / "data.jsonl")
    assert sum(read) < 6_000


def test_numbers_that_are_cut_go_on(tmp_path, in_pieces):
    numbers = list(range(10**6, 10**6 + 500))
    (tmp_path / "data.json").write_text(" ".join(map(str, numbers)))
    assert read_entries(tmp_path / "data.json") == numbers


def test_a_file_that_is_not_what_it_was_is_named(tmp_path):
    for data in (lines(ROWS), parquet(ROWS)):
        (tmp_path / "data").write_bytes(data)
        places = [place for place, _ in open_entries(tmp_path / "data").scan(("id",))]
        (tmp_path / "data").write_bytes(lines(ROWS[:9]) if data[:4] != b"PAR1" else parquet(ROWS[:9]))
        with pytest.raises(InputError, match="has not the entries any more that it had at first|damaged"):
            list(open_entries(tmp_path / "data").read([places[250]]))


# WebDataset


def test_samples_of_tars_are_records(tmp_path):
    """Files of one name are an entry; keys of the JSON win, but for the image."""
    files = {
        "train/000.jpg": png(),
        "train/000.json": json.dumps({"caption": "a red circle", "questions": [QUESTION]}).encode(),
        "train/001.txt": b"a blue circle\n", "train/001.png": png(), "train/001.seg.png": b"no image",
        "train/001.json": json.dumps({"id": "mine", "url": None, "questions": [QUESTION]}).encode(),
        "train/002.png": png(), "train/002.json": b"{", "train/003.png": png(), "train/003.json": b"[1]",
        "train/004.json": json.dumps({"caption": "a circle", "questions": [QUESTION]}).encode(),
        ".hidden": b"", "train/005.txt": b"\xff", "train/005.png": png(),
    }  # fmt: skip
    for name, mode in (("a.tar", "w"), ("a.tar.gz", "w:gz")):
        (tmp_path / name).write_bytes(tar(files, mode))
        records, rejected = read_source(tmp_path / name)
        assert [(record.id, record.caption) for record in records] == [
            ("train/000", "a red circle"), ("mine", "a blue circle"),
        ]  # fmt: skip
        assert all(record.image == png() for record in records)
        assert [row["record_id"] for row in rejected] == [
            f"entry 3 of {name}", f"entry 4 of {name}", f"entry 6 of {name}", "train/004",
        ]  # fmt: skip
        assert rejected[-1]["reason"].startswith("no image") and "002.json is damaged" in rejected[0]["reason"]


def test_tars_of_a_folder_are_shards(tmp_path):
    for number in range(3):
        sample = {"caption": "a red circle", "questions": [QUESTION]}
        files = {f"{number}{index}.json": json.dumps(sample).encode() for index in range(4)}
        files = {name: data for key in files for name, data in ((key, files[key]), (key.replace("json", "png"), png()))}
        (tmp_path / f"shard-{number}.tar").write_bytes(tar(files))
    assert [record.id for record in read_source(tmp_path)[0]] == [f"{n}{i}" for n in range(3) for i in range(4)]


@pytest.mark.parametrize("cut", [10, 600, 1500])
def test_a_tar_that_is_cut_is_named(cut, tmp_path):
    data = tar({"0.json": b"{}" * 400, "1.json": b"{}" * 400})
    (tmp_path / "a.tar").write_bytes(data[:cut])
    with pytest.raises(InputError, match="damaged (tar|JSON)"):
        list(open_entries(tmp_path / "a.tar").scan(()))


def test_members_that_are_no_files_are_passed_over(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for kind, name in ((tarfile.SYMTYPE, "0.png"), (tarfile.LNKTYPE, "1.json"), (tarfile.DIRTYPE, "2.json")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/hostname"
            archive.addfile(member)
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    assert list(open_entries(tmp_path / "a.tar").scan(())) == []


# addresses


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def test_files_at_an_address(memory, tmp_path):
    image = {"caption": "a red circle", "questions": [QUESTION], "image": "img/0.png"}
    memory.pipe("/bucket/img/0.png", png())
    memory.pipe("/bucket/a.jsonl", lines([image | {"id": 1}, image | {"id": 2, "image": "../secret.png"}]))
    memory.pipe("/bucket/b.jsonl", gzip.compress(lines([image | {"id": 3, "image": "/img/0.png"}, image | {"id": 4}])))
    memory.pipe("/other/train-0.parquet", parquet([image | {"id": 5}]))
    assert files_of("memory://bucket") == ["memory:///bucket/a.jsonl", "memory:///bucket/b.jsonl"]
    records, rejected = read_source("memory://bucket/*.jsonl")
    assert [record.id for record in records] == ["1", "4"]
    assert [row["reason"].partition(":")[0] for row in rejected] == ["path leaves its root"] * 2
    [record], _ = read_source("memory://other/train-*.parquet", root="memory://bucket")
    assert record.image_path == "memory://bucket/img/0.png"
    with pytest.raises(InputError, match="no file fits this pattern"):
        read_source("memory://bucket/*.tar")
    with pytest.raises(InputError, match="none.jsonl: there is no such file"):
        read_source("memory://bucket/none.jsonl")
    with pytest.raises(InputError, match="cannot be looked at .*check the address"):
        read_source("nothing://bucket/none.jsonl")
    (tmp_path / "a.jsonl").write_bytes(lines([image | {"id": 1, "codes": [1] * 16}]))
    assert len(read_source(f"file://{tmp_path}/a.jsonl")[0]) == 1


def test_images_at_an_address_are_encoded(memory, shared_tiny_model):
    rows = [{"id": 1, "caption": "a red circle", "questions": [QUESTION], "image": name} for name in ("0.png", "1.png")]
    memory.pipe("/b/0.png", png())
    memory.pipe("/b/a.jsonl", lines([rows[0], rows[1] | {"id": 2}]))
    [record] = sources.read_records("memory://b/a.jsonl", shared_tiny_model)
    assert record.id == "1" and len(record.codes) == 16


def test_a_data_set_of_the_hub(monkeypatch, tmp_path):
    """Its shards wherever they lie; a pattern chooses a split."""
    rows, asked = [{"id": 1, "caption": "a red circle", "codes": [1] * 16, "questions": [QUESTION]}], []
    (tmp_path / "data").mkdir()
    for name in ("train-0", "train-1", "test-0"):
        (tmp_path / f"data/{name}.parquet").write_bytes(parquet([rows[0] | {"id": name}]))

    def snapshot_download(name, **options):
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert [record.id for record in read_source("owner/pictures")[0]] == ["test-0", "train-0", "train-1"]
    assert [record.id for record in read_source("owner/pictures/data/train-*.parquet")[0]] == ["train-0", "train-1"]
    assert asked[0][0] == "owner/pictures" and asked[0][1]["repo_type"] == "dataset"
    assert asked[-1][1]["allow_patterns"] == ["data/train-*.parquet"]

    def unreachable(name, **options):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(InputError, match=r"no data 'owner/pictures': .*the hub does not give it \(no network\); check"):
        read_source("owner/pictures")
    with pytest.raises(InputError, match="pictures.jsonl: no such file"):
        read_source("owner/pictures.jsonl")


# what one pass finds


def test_a_source_is_saved_and_read_in_pieces(tmp_path):
    """The records are those of the whole, in any pieces; questions are joined wherever they stand."""
    rng, image = np.random.default_rng(0), {"codes": [1] * 16}
    rows = [image | {"id": number, "caption": f"a circle {number}"} for number in range(200)]
    asked = [
        QUESTION | {"id": int(number), "element": str(index)}
        for index, number in enumerate(rng.integers(250, size=900))
    ]
    rows += [
        image | asked[0] | {"id": 300, "caption": "of its own"},
        asked[1] | {"id": 300},
        image | {"id": 5},
        {"x": 1},
    ]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    (tmp_path / "b.jsonl").write_bytes(lines(asked[:500]))
    (tmp_path / "c.jsonl").write_bytes(lines(asked[500:]))
    records, rejected = read_source(tmp_path / "a.jsonl", f"{tmp_path}/[bc].jsonl")
    expected = {}
    for row in asked:
        expected.setdefault(str(row["id"]), []).append(row["element"])
    assert [record.id for record in records] == [
        *(str(number) for number in range(200) if str(number) in expected), "300",
    ]  # fmt: skip
    for record in records[:-1]:
        assert [question.element for question in record.questions] == expected[record.id]
    assert [question.element for question in records[-1].questions] == ["0", "1"]
    assert [row["record_id"] for row in rejected[:2]] == ["entry 204 of a.jsonl", "5"]
    found = scan_source(tmp_path / "a.jsonl", f"{tmp_path}/[bc].jsonl")
    (tmp_path / "kept").mkdir()
    found.save(tmp_path / "kept")
    again = Source.load(tmp_path / "kept")
    assert len(again) == len(found) == 201 and again.rejected == found.rejected and list(again.things) == []
    for pieces in ([(0, 201)], [(150, 201), (0, 150)], [(start, start + 33) for start in range(0, 201, 33)]):
        pieced = [record for piece in sorted(pieces) for record in again.records(*piece, [])]
        assert [(record.id, record.questions) for record in pieced] == [(each.id, each.questions) for each in records]


def test_no_more_than_some_files_are_open_at_once(tmp_path):
    for number in range(40):
        rows = [
            {"id": f"{number}-{index}", "caption": "a", "codes": [1], "questions": [QUESTION]} for index in range(3)
        ]
        (tmp_path / f"{number:02d}.jsonl").write_bytes(lines(rows))
    found = scan_source(f"{tmp_path}/*.jsonl")
    before = len(os.listdir("/proc/self/fd"))
    assert len(list(found.records(0, 120, []))) == 120
    assert len(os.listdir("/proc/self/fd")) <= before + 8
    assert len(list(found.records(0, 3, []))) == 3


def test_things_of_very_many_questions_are_a_sample_of_all(monkeypatch):
    from hermesflow.data import balancing
    from hermesflow.data.records import Question

    monkeypatch.setattr(balancing, "_MOST_THINGS", 50)
    every = [Question(f"is there a {n} ?", ("yes", "no"), "yes", "object", str(n)) for n in range(1000)]
    kept = balancing.Things(every)
    assert len(kept) == 50 and len(set(kept)) == 50 and 300 < np.mean([int(item.element) for item in kept]) < 700
    assert list(balancing.Things(every)) == list(kept) and list(balancing.Things(every[:50])) == every[:50]
