"""Data of a user's own: every form of file, a reason for each record that cannot be used, images a batch at a time."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hermesflow.data import entries, sources
from hermesflow.data.encoding import encode_records
from hermesflow.data.entries import read_entries
from hermesflow.data.records import Record
from hermesflow.data.sources import describe_rejected, read_source
from hermesflow.runtime.files import InputError, shown
from hermesflow.worlds import shapes

COLOR = {
    "question": "what color is the circle ?", "choices": ["red", "blue"], "answer": "red", "element_type": "color",
    "element": "red",
}  # fmt: skip
SHAPE = {"question": "is there a circle ?", "choices": ["yes", "no"], "answer": "yes"}


@pytest.fixture
def folder(tmp_path):
    """A data set's folder with two images, and a third beside it."""
    rng = np.random.default_rng(0)
    (tmp_path / "data/images").mkdir(parents=True)
    for name in ("data/images/1.png", "data/images/2.png", "outside.png"):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / name)
    return tmp_path / "data"


def entry(number=1, **changes):
    row = {"id": number, "caption": "a red circle", "image": f"images/{number}.png", "questions": [COLOR]}
    return {key: value for key, value in (row | changes).items() if value is not ...}


def write(folder, rows, name="mine.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ENTRIES = [{"id": 1, "caption": "a [red], {blue}"}, {"id": 2, "caption": "x,\n"}]
ONE, TWO = (json.dumps(item, indent=4) for item in ENTRIES)
FORMS = {
    "list": json.dumps(ENTRIES),
    "list with a comma at its end": f"[\n{ONE},\n{TWO},\n]",
    "bare, with commas": f"{ONE},\n{TWO},\n",
    "bare, without the last comma": f"{ONE},\n{TWO}",
    "one a line": "".join(json.dumps(item) + "\n" for item in ENTRIES),
    "byte order mark": f"\ufeff[{ONE}, {TWO}]",
    "blank lines": f"\n\n{ONE}\n\n\n{TWO}\n\n",
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS.keys())
def test_every_form_of_json(text, tmp_path):
    (tmp_path / "data.json").write_text(text, encoding="utf-8")
    assert read_entries(tmp_path / "data.json") == ENTRIES


@pytest.mark.parametrize("text", ["", " \n", "[]", "[ ]"], ids=["empty", "blank", "list", "spaced list"])
def test_a_file_without_entries(text, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(text)
    assert read_entries(path) == []
    with pytest.raises(InputError, match=r"data.json: no record can be used \(it has no entries\); mend the file"):
        read_source(path)


DAMAGED = {
    "cut in an entry": (f"{ONE},\n{TWO[:-20]}", r"entry at line 5 column 1 cannot be read \(Expecting property name"),
    "cut in a list": (f"[{ONE},\n{TWO[:20]}", "entry at line 5 column 1 cannot be read"),
    "list without its end": (f"[{ONE},\n{TWO},\n", "the list that begins at its start has no end"),
    "inner list ends the file": ('[{"id": 1}, [1, 2]', "the list that begins at its start has no end"),
    "no JSON": ("hello", r"entry at line 1 column 1 cannot be read \(Expecting value\)"),
    "two lists": ("[1]\n[2]", "entry at line 2 column 1 cannot be read"),
    "two commas": ('[{"id": 1},,]', "entry at line 1 column 12 cannot be read"),
    "leading comma": ('[,{"id": 1}]', "entry at line 1 column 2 cannot be read"),
    "deep": ("[" * 100_000, "cannot be read"),
    "huge number": (f'[{{"id": {"9" * 5000}}}]', "cannot be read"),
}


@pytest.mark.parametrize(("text", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_json_is_named_with_its_place(text, message, tmp_path):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(InputError, match=f"data.json: damaged JSON: .*{message}") as error:
        read_entries(tmp_path / "data.json")
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "data.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="data.json: not UTF-8 text .* at byte 0"):
        read_entries(tmp_path / "data.json")


def test_records_of_json_lines(folder):
    rows = [entry(1, category="colors"), entry(2, id="b", questions=[COLOR, SHAPE])]
    (first, second), rejected = read_source(write(folder, rows))
    assert (first.id, first.caption, first.category) == ("1", "a red circle", "colors")
    assert first.image_path == (folder / "images/1.png").resolve() and first.image is None and first.codes is None
    assert (second.id, second.category, second.questions[0].choices) == ("b", "other", ("red", "blue"))
    assert (second.questions[0].element_type, second.questions[1].element_type) == ("color", "")
    assert rejected == []


def published(folder, rows, name):
    """As the published scripts write it."""
    (folder / name).write_text("".join(json.dumps(row, indent=4) + ",\n" for row in rows))
    return folder / name


def flat(number, question):
    common = {"id": number, "img_path": f"data/images/{number}.png", "prompt": "circle", "caption": "a red circle"}
    return common | question


def test_the_published_files_are_joined_by_id(folder):
    data = published(folder, [flat(1, {}), flat(2, {})], "initial_data.json")
    asked = published(folder, [flat(2, COLOR), flat(1, SHAPE), flat(1, COLOR), flat(9, COLOR)], "vqa_data.json")
    (first, second), rejected = read_source(data, asked, folder.parent)
    assert [question.question for question in first.questions] == [SHAPE["question"], COLOR["question"]]
    assert len(second.questions) == 1 and rejected == []
    assert second.image_path == (folder / "images/2.png").resolve()


def test_the_published_questions_alone_make_records(folder):
    asked = published(folder, [flat(1, SHAPE), flat(2, COLOR), flat(1, COLOR)], "vqa_data.json")
    records, rejected = read_source(asked, root=folder.parent)
    assert [(record.id, len(record.questions)) for record in records] == [("1", 2), ("2", 1)] and rejected == []


def test_questions_are_joined_to_json_lines_too(folder):
    path = write(folder, [entry(1), entry(2, questions=...)])
    asked = write(folder, [{"id": 1, "questions": [SHAPE]}, {"id": "2"} | SHAPE], "questions.jsonl")
    records, rejected = read_source(path, asked)
    assert [len(record.questions) for record in records] == [2, 1] and rejected == []


def test_records_of_parquet_keep_their_images_as_bytes(folder, shared_tiny_model):
    data = (folder / "images/1.png").read_bytes()
    rows = [entry(1, image=data, codes=None), entry(2, image=b"none", codes=None),
            entry(3, image=None, codes=[1] * 16), entry(4, image=None, codes=None)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "mine.parquet")
    records, rejected = read_source(folder / "mine.parquet")
    assert [type(record.image) for record in records] == [bytes, bytes, type(None)]
    assert reasons(rejected) == ["no image: the entry has neither image, img_path nor codes"]
    records, rejected = encode_all(shared_tiny_model, records)
    assert [record.id for record in records] == ["1", "3"]
    assert reasons(rejected) == [
        "damaged image: its image: not an image that can be read; give a whole PNG, JPEG or WebP file"
    ]


def reasons(rejected):
    return [row["reason"] for row in rejected]


BAD = {
    "no id": (entry(id=...), "no id: the entry has none"),
    "null id": (entry(id=None), "no id"),
    "id of no type": (entry(id=1.5), "wrong type: id is 1.5, expected text"),
    "id true": (entry(id=True), "wrong type: id is True, expected text"),
    "id NaN": (entry(id=float("nan")), "wrong type: id is nan"),
    "no object": ([1, 2], r"wrong type: \[1, 2\] is no object with keys"),
    "no caption": (entry(caption=...), "no caption: the entry has none"),
    "blank caption": (entry(caption=" \n"), "no caption"),
    "caption of no type": (entry(caption=["a"]), "wrong type: caption is"),
    "half a character": (entry(caption="a \ud800"), "wrong type: caption is .*no Unicode text"),
    "no image": (entry(image=...), "no image: the entry has neither image, img_path nor codes"),
    "image of no type": (entry(image=7), "wrong type: image is 7, expected text"),
    "missing image": (entry(image="images/none.png"), "missing image: there is no file 'images/none.png' in "),
    "folder for an image": (entry(image="images"), "missing image"),
    "null byte": (entry(image="a\0b"), "missing image: .*null"),
    "long path": (entry(image="a" * 5000), "missing image"),
    "no questions": (entry(questions=...), "no questions: there is nothing to judge its images by"),
    "empty questions": (entry(questions=[]), "no questions"),
    "questions of no type": (entry(questions="what ?"), "wrong type: questions is 'what [?]', expected a list"),
    "question of no type": (entry(questions=["what ?"]), "wrong type: question 'what [?]' is no object"),
    "no answer": (entry(questions=[COLOR | {"answer": None}]), "no answer"),
    "no choices": (entry(questions=[COLOR | {"choices": []}]), r"too few choices: \[\] for 'what"),
    "one choice": (entry(questions=[COLOR | {"choices": ["red", "red"]}]), "too few choices: .* expected two or more"),
    "one choice but for blanks": (entry(questions=[COLOR | {"choices": ["red", "red "]}]), "too few choices"),
    "choice of no type": (entry(questions=[COLOR | {"choices": ["red", 3]}]), "wrong type: choice is 3"),
    "wrong answer": (entry(questions=[COLOR, SHAPE | {"answer": "maybe"}]), "wrong answer: 'maybe' is no choice of"),
    "codes of no type": (entry(codes=[1, 2.5]), r"wrong type: codes is \[1, 2.5\], expected whole numbers"),
    "codes NaN": (entry(codes=[float("nan")]), "wrong type: codes is"),
    "codes too large": (entry(codes=[2**40]), "wrong type: codes is"),
    "category of no type": (entry(category=3), "wrong type: category is 3"),
    "duplicate id": (entry(2), "duplicate id: an earlier entry has it"),
}


@pytest.mark.parametrize(("row", "reason"), BAD.values(), ids=BAD.keys())
def test_a_record_that_cannot_be_used_is_rejected_and_stops_nothing(row, reason, folder):
    path = write(folder, [entry(2, id="0"), entry(2), row])
    records, rejected = read_source(path)
    assert [record.id for record in records] == ["0", "2"]
    [found] = rejected
    assert re.match(reason, found["reason"])
    assert "\n" not in found["reason"] and len(found["reason"]) < 400
    named = isinstance(row, dict) and type(row.get("id")) is int
    assert found["record_id"] == (str(row["id"]) if named else "entry 3 of mine.jsonl")


REPEATED = {
    "same text": (["red", "blue", "red"], "red", ["red", "blue"]),
    "blanks around": ([" red", "blue", "red "], "red", ["red", "blue"]),
    "blank answer": (["red", "blue"], " red ", ["red", "blue"]),
    "other blanks": (["large blue", "red", "large \u00a0blue"], "large blue", ["large blue", "red"]),
    "capitals": (["RED", "Blue", "blue", "red"], "red", ["red", "Blue"]),
    "another letter for k": (["blac\u212a", "black", "red"], "black", ["black", "red"]),
}


@pytest.mark.parametrize(("choices", "answer", "kept"), REPEATED.values(), ids=REPEATED.keys())
def test_choices_that_are_one_to_the_model_are_merged(choices, answer, kept, folder, shared_tiny_model):
    rows = [entry(questions=[COLOR | {"choices": choices, "answer": answer}])]
    records, rejected = read_source(write(folder, rows))
    again = replace(records[0], balanced_questions=records[0].questions)
    [(record, reason)] = encode_records(shared_tiny_model, [again], 1)
    assert rejected == [] and reason is None
    for [question] in (record.questions, record.balanced_questions):
        assert (list(question.choices), question.answer) == (kept, answer.strip())


def test_another_unicode_form_of_an_answer_is_its_choice(folder):
    asked = [COLOR | {"choices": ["caf\u00e9", "bar"], "answer": "cafe\u0301"}]
    [record], _ = read_source(write(folder, [entry(questions=asked)]))
    assert record.questions[0].answer == "caf\u00e9"


@pytest.mark.parametrize("choices", [["red", "RED"], ["red", "Red", " rEd"]], ids=["two", "three"])
def test_a_question_whose_choices_are_all_one_is_refused(choices, folder, shared_tiny_model):
    [record], _ = read_source(write(folder, [entry(questions=[COLOR | {"choices": choices}])]))
    [(_, reason)] = encode_records(shared_tiny_model, [record], 1)
    assert re.match(
        r"too few choices: \['red'.* for 'what color .*' are one to the model, expected two or more", reason
    )
    others = replace(record, questions=(shapes_question(),), balanced_questions=record.questions)
    [(kept, reason)] = encode_records(shared_tiny_model, [others], 1)
    assert reason is None and kept.balanced_questions == ()


def shapes_question():
    return sources._question(SHAPE)


def test_records_need_questions_only_to_be_judged(folder):
    path = write(folder, [entry(questions=...)])
    records, rejected = read_source(path, need_questions=False)
    assert records[0].questions == () and rejected == []


def escape(folder, kind):
    outside = folder.parent / "outside.png"
    if kind == "absolute":
        return str(outside)
    if kind == "upwards":
        return "../outside.png"
    if kind == "up and down again":
        return "images/../../data/../outside.png"
    if kind == "link to a file":
        os.symlink(outside, folder / "link.png")
        return "link.png"
    os.symlink(folder.parent, folder / "link")
    return "link/outside.png"


@pytest.mark.parametrize("kind", ["absolute", "upwards", "up and down again", "link to a file", "link to a folder"])
def test_a_path_that_leaves_its_root_is_refused(kind, folder):
    name = escape(folder, kind)
    records, rejected = read_source(write(folder, [entry(1, image=name), entry(2)]))
    assert [record.id for record in records] == ["2"]
    outside = f"leads by a link to {folder.parent / 'outside.png'}, outside" if "link" in kind else "is outside"
    advice = "; give a data.root that holds both" if "link" in kind else ""
    assert reasons(rejected) == [f"path leaves its root: {shown(name)} {outside} {folder}{advice}"]
    wider = write(folder, [entry(1, image=os.path.join("data", name))])
    assert len(read_source(wider, root=folder.parent)[0]) == 1


def test_paths_that_stay_inside_are_followed(folder):
    os.symlink(folder / "images", folder / "link")
    rows = [entry(1, image="link/1.png"), entry(2, image=str(folder / "images/2.png"))]
    records, rejected = read_source(write(folder, rows))
    assert [record.image_path.name for record in records] == ["1.png", "2.png"] and rejected == []


def test_a_circle_of_links_is_refused(folder):
    os.symlink(folder / "b.png", folder / "a.png")
    os.symlink(folder / "a.png", folder / "b.png")
    _, rejected = read_source(write(folder, [entry(1, image="a.png"), entry(2)]))
    assert reasons(rejected)[0].startswith("missing image: ")


def test_a_file_of_unusable_records_says_why(folder):
    rows = [entry(n, caption=...) for n in range(3)] + [entry(n, image="x.png") for n in (3, 4)]
    rows += [entry(n, category=5) for n in (5, 6)] + [entry(7, questions=[])]
    with pytest.raises(InputError) as error:
        read_source(write(folder, rows))
    assert str(error.value) == (
        f"{folder / 'mine.jsonl'}: no record can be used (3 no caption, 2 missing image, 2 wrong type, "
        "1 of other kinds; the first is record 0: no caption: the entry has none); mend the file"
    )


@pytest.mark.parametrize("name", ["none.jsonl", "none.parquet"])
def test_a_missing_file_is_named(name, tmp_path):
    with pytest.raises(InputError, match=f"{name}: no such file"):
        read_source(tmp_path / name)


@pytest.mark.parametrize("kind", ["no table", "no text"])
def test_a_damaged_parquet_is_named(kind, tmp_path):
    path = tmp_path / "mine.parquet"
    if kind == "no table":
        path.write_text("no table")
    else:
        pq.write_table(pa.table({"id": pa.array([b"\xff"]).view(pa.string())}), path)
    with pytest.raises(InputError, match="mine.parquet: damaged Parquet") as error:
        read_source(path)
    assert "\n" not in str(error.value)


def encode_all(model, records, count=None):
    """(the usable records, the rejected ones with their reasons)."""
    found = list(encode_records(model, iter(records), len(records) if count is None else count))
    done = [record for record, reason in found if reason is None]
    return done, [{"record_id": record.id, "reason": reason} for record, reason in found if reason is not None]


def image_records(*sizes):
    scenes = shapes.sample_scenes("train", len(sizes), 3)
    rng = np.random.default_rng(0)
    records = [shapes.make_record(scene, f"r{i}", rng) for i, scene in enumerate(scenes)]
    return [
        replace(record, image=np.asarray(Image.fromarray(record.image).resize(size)))
        for record, size in zip(records, sizes, strict=True)
    ]


def test_images_of_any_size_are_fitted_to_the_model(shared_tiny_model):
    records, rejected = encode_all(shared_tiny_model, image_records((64, 64), (100, 100), (128, 64)))
    assert [(record.codes.shape, record.codes.dtype) for record in records] == [((16,), np.int32)] * 3
    assert not rejected and not [record for record in records if record.image is not None]


def test_codes_are_those_of_the_image_wherever_it_lies(shared_tiny_model, folder):
    path = folder / "images/1.png"
    pixels = np.array(Image.open(path))
    expected = shared_tiny_model.encode_images(pixels[None])[0].numpy()
    common = Record("a", "a red circle", "other", ())
    kinds = {"image_path": path, "image": pixels}
    for record in (
        *(replace(common, **{key: value}) for key, value in kinds.items()),
        replace(common, image=path.read_bytes()),
    ):
        [done], _ = encode_all(shared_tiny_model, [record])
        np.testing.assert_array_equal(done.codes, expected)
        assert done.image is None and done.image_path is None


def change(record, **changes):
    return replace(record, **changes)


def question(record, **changes):
    return replace(record, questions=(replace(record.questions[0], **changes),))


UNFIT = {
    "length": (lambda r: change(r, codes=np.zeros(64, np.int32)),
               r"wrong codes: expected 16 image codes in \[0, 32\), got 64"),
    "range": (lambda r: change(r, codes=np.full(16, 64, np.int32)), "wrong codes: expected 16 image codes"),
    "no codes": (lambda r: change(r, codes=np.zeros(0, np.int32)), "wrong codes: expected 16 image codes"),
    "nothing": (lambda r: change(r, image=None), "no image: the record has neither an image nor codes"),
    "bytes": (lambda r: change(r, image=b"none"), "damaged image: its image: not an image that can be read"),
    "caption": (lambda r: change(r, caption="a red zebra"),
                "unknown word: the model does not know the word 'zebra' in 'a red zebra'$"),
    "question": (lambda r: question(r, question="why ?"), "unknown word: the model does not know the word 'why'"),
    "choice": (lambda r: question(r, choices=("mauve", r.questions[0].answer)), "unknown word: .* 'mauve'"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "reason"), UNFIT.values(), ids=UNFIT.keys())
def test_a_record_that_does_not_fit_the_model_is_rejected(make, reason, shared_tiny_model):
    first, second, third = image_records((64, 64), (64, 64), (64, 64))
    records, [rejected] = encode_all(shared_tiny_model, [first, make(second), third])
    assert [record.id for record in records] == ["r0", "r2"] and rejected["record_id"] == "r1"
    assert re.match(reason, rejected["reason"])


def test_damaged_files_are_rejected_where_they_are_opened(shared_tiny_model, folder):
    whole = (folder / "images/1.png").read_bytes()
    (folder / "images/3.png").write_bytes(whole[: len(whole) // 2])
    records, rejected = read_source(write(folder, [entry(3), entry(1), entry(2)]))
    assert len(records) == 3 and not rejected
    records, rejected = encode_all(shared_tiny_model, records)
    assert [record.id for record in records] == ["1", "2"]
    assert reasons(rejected)[0].startswith("damaged image: ") and "3.png" in reasons(rejected)[0]


@pytest.mark.parametrize(("count", "opened"), [(3, 3), (None, 19), (100, 19)])
def test_images_are_opened_a_batch_at_a_time_and_no_more_than_are_needed(
    count, opened, shared_tiny_model, folder, images_in_memory
):
    common = Record("0", "a red circle", "other", (), image_path=folder / "images/1.png")
    records = [replace(common, id=str(index)) for index in range(20)]
    records[1] = replace(records[1], image_path=folder / "mine.png")  # is not there
    done, rejected = encode_all(shared_tiny_model, records, count)
    assert [record.id for record in done] == [str(i) for i in range(20) if i != 1][:count] and len(rejected) == 1
    assert images_in_memory.count(1) == opened
    assert max(np.cumsum(images_in_memory)) <= 4  # a batch; one could not be opened


ODD = [None, 1, 1.5, True, "", [], {}, "images", "x" * 300, "\ud800", "\0", float("nan"), [None], -1, 10**30, "/", ".."]


def mutated(rng, value):
    """The value with something odd in some place of it."""
    if isinstance(value, dict) and rng.random() < 0.8:
        key = rng.choice(list(value))
        return value | {key: mutated(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.6:
        place = rng.integers(len(value))
        return [*value[:place], mutated(rng, value[place]), *value[place + 1 :]]
    return ODD[rng.integers(len(ODD))]


def test_whatever_the_entries_each_is_a_record_or_rejected_in_a_line(folder):
    rng = np.random.default_rng(0)
    rows = [mutated(rng, entry(1, category="x", codes=None, element=[COLOR]) | {"id": number}) for number in range(300)]
    records, rejected = read_source(write(folder, rows))
    assert len(records) + len(rejected) == 300 and records and rejected
    assert not [row for row in rejected if "\n" in row["reason"] or len(row["reason"]) > 500]
    pa.Table.from_pylist(rejected, sources.UNUSABLE_SCHEMA)


def test_nothing_rejected_is_an_empty_file():
    assert describe_rejected([]) == "it has no entries"


def test_records_of_a_file_are_ready_for_training(tiny_model, tmp_path, caplog):
    (tmp_path / "images").mkdir()
    for number in (1, 2):
        Image.new("RGB", (64, 64)).save(tmp_path / f"images/{number}.png")
    path = write(tmp_path, [entry(1), entry(2, caption="a unicorn")])
    (record,) = sources.read_records(path, tiny_model)
    assert record.id == "1" and record.codes is not None and record.questions
    assert "left out" in caplog.text and "unicorn" in caplog.text
    with pytest.raises(InputError, match="no record can be used; rejected were .*unicorn"):
        sources.read_records(write(tmp_path, [entry(2, caption="a unicorn")]), tiny_model)


# tables, files and links as other programs leave them

QUESTION = {"question": "is there a circle ?", "choices": ["yes", "no"], "answer": "yes"}
ROW = {"id": "0", "caption": "a red circle", "codes": [1] * 16, "questions": [QUESTION]}


def one_png():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("key", ["image", "img_path"])
@pytest.mark.parametrize("name", [None, "0.png", "nowhere.png"])
def test_an_image_of_the_datasets_library(key, name, tmp_path):
    """Its bytes count, whatever its path says; without bytes the path is that of a file beside."""
    row = {name: value for name, value in ROW.items() if name != "codes"}
    pq.write_table(pa.Table.from_pylist([row | {key: {"bytes": one_png(), "path": name}}]), tmp_path / "a.parquet")
    assert read_source(tmp_path / "a.parquet")[0][0].image == one_png()
    (tmp_path / "0.png").write_bytes(one_png())
    write(tmp_path, [row | {key: {"bytes": None, "path": "0.png"}}], "b.json")
    assert read_source(tmp_path / "b.json")[0][0].image_path == tmp_path / "0.png"
    write(tmp_path, [ROW | {"id": 1}, row | {key: {"bytes": None, "path": None}}], "c.json")
    assert reasons(read_source(tmp_path / "c.json")[1]) == ["no image: the entry has neither image, img_path nor codes"]
    write(tmp_path, [ROW | {"id": 1}, row | {key: {"path": "../0.png"}}], "d.json")
    assert reasons(read_source(tmp_path / "d.json")[1])[0].startswith("path leaves its root: '../0.png' is outside")


def test_questions_as_lists_by_key(tmp_path):
    lists = {key: [value, value] for key, value in QUESTION.items()} | {"element": ["circle", "circle"]}
    write(tmp_path, [ROW | {"questions": lists}, ROW | {"id": "1", "questions": lists | {"answer": ["yes"]}},
                     ROW | {"id": "2", "questions": {key: [] for key in QUESTION}}], "a.json")  # fmt: skip
    [record], rejected = read_source(tmp_path / "a.json")
    assert len(record.questions) == 2 and record.questions[0].element == "circle"
    assert [reason.partition(":")[0] for reason in reasons(rejected)] == ["wrong type", "no questions"]


@pytest.mark.parametrize(
    "id, expected", [(3.0, "3"), (-2.0, "-2"), (0.0, "0"), (3.5, None), (1e300, None), (True, None), (7, "7")]
)
def test_whole_numbers_as_floats(id, expected, tmp_path):
    write(tmp_path, [ROW | {"id": "other"}, ROW | {"id": id}], "a.json")
    records, rejected = read_source(tmp_path / "a.json")
    assert [record.id for record in records] == ["other", *([expected] if expected else [])]
    assert len(rejected) == (expected is None)


def parquet_bytes(rows):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["a.PARQUET", "a.pq", "a.parquet", "a", "a.json"])
def test_parquet_is_known_by_its_bytes(name, tmp_path):
    (tmp_path / name).write_bytes(parquet_bytes([ROW]))
    assert len(read_source(tmp_path / name)[0]) == 1


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.gz", "a.jsonl", "a"])
def test_gzip_is_known_by_its_bytes(name, tmp_path):
    data = gzip.compress(json.dumps(ROW).encode())
    (tmp_path / name).write_bytes(data)
    assert len(read_source(tmp_path / name)[0]) == 1
    for broken in (data[:-9], data[:12], data[:20] + b"x" * 9 + data[29:]):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(InputError, match="damaged gzip|damaged JSON"):
            read_source(tmp_path / name)


@pytest.mark.parametrize(
    "text, reason", [(b" ", "has 1000 blanks in a row"), (b'"a', "is longer than 1000 characters")]
)
def test_gzip_that_unpacks_without_end_is_refused(text, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "_MOST", 1000)
    (tmp_path / "a.gz").write_bytes(gzip.compress(text[:1] + text[-1:] * 2**22))
    with pytest.raises(InputError, match=reason):
        read_source(tmp_path / "a.gz")


@pytest.mark.parametrize(
    "data, kind",
    [(b"PK\x03\x04...", "a zip archive"), (b"\x28\xb5\x2f\xfdx", "packed by zstd"), (b"ARROW1\x00", "an Arrow file"),
     (bz2.compress(b"{}"), "packed by bzip2"), (lzma.compress(b"{}"), "packed by xz")],
)  # fmt: skip
def test_files_of_other_kinds_are_told_by_name(data, kind, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(InputError, match=f"a.jsonl: is {kind}, expected JSON, Parquet or a tar"):
        read_source(tmp_path / "a.jsonl")


def test_shards_of_a_folder_and_of_a_pattern(tmp_path):
    """In the order of names; a card beside them is no data."""
    for number in (2, 0, 1):
        (tmp_path / f"train-{number:05d}-of-00003.parquet").write_bytes(parquet_bytes([ROW | {"id": str(number)}]))
    (tmp_path / "dataset_info.json").write_text("{}")
    for path in (tmp_path, f"{tmp_path}/train-*.parquet", tmp_path / "train-0000?-of-00003.parquet"):
        assert [record.id for record in read_source(path)[0]] == ["0", "1", "2"]
    (tmp_path / "lines").mkdir()
    for name in ("b.jsonl", "a.jsonl"):
        write(tmp_path / "lines", [ROW | {"id": name}], name)
    assert [record.id for record in read_source(tmp_path / "lines")[0]] == ["a.jsonl", "b.jsonl"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: holds none of \*.parquet, .*; give the file"):
        read_source(tmp_path / "empty")
    with pytest.raises(InputError, match="no file fits this pattern"):
        read_source(tmp_path / "none-*.parquet")
    (tmp_path / "odd[1].json").write_text(json.dumps(ROW))  # a name with letters of patterns is a name
    assert len(read_source(tmp_path / "odd[1].json")[0]) == 1


def test_links_of_a_hub_cache_are_followed(tmp_path):
    """Into the blobs of its own repository, and nowhere else."""
    blobs, snapshot = tmp_path / "datasets--me--a/blobs", tmp_path / "datasets--me--a/snapshots/rev"
    other = tmp_path / "datasets--me--b/blobs"
    for folder in (blobs, snapshot / "img", other):
        folder.mkdir(parents=True)
    for folder in (blobs, other):
        (folder / "0f").write_bytes(one_png())
    (snapshot / "img/0.png").symlink_to("../../../blobs/0f")
    (snapshot / "img/1.png").symlink_to(other / "0f")
    (blobs / "data").write_text(json.dumps([entry(0, image="img/0.png"), entry(1, image="img/1.png")]))
    (snapshot / "data.jsonl").symlink_to("../../blobs/data")
    for root in (None, snapshot, tmp_path / "datasets--me--a"):
        [record], rejected = read_source(snapshot / "data.jsonl", root=root)
        assert record.image_path == blobs / "0f"
        assert reasons(rejected)[0].startswith("path leaves its root: 'img/1.png' leads by a link to")
    assert len(read_source(snapshot / "data.jsonl", root=tmp_path)[0]) == 2


def test_a_linked_folder_of_images_needs_a_root_that_holds_both(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "scratch/0.png").write_bytes(one_png())
    (tmp_path / "data/img").symlink_to(tmp_path / "scratch")
    path = write(
        tmp_path / "data", [entry(0, image="img/0.png"), entry(1, image="../../etc/hostname"), ROW | {"id": 9}]
    )
    assert [record.id for record in read_source(path)[0]] == ["9"]
    assert "leads by a link to" in reasons(read_source(path)[1])[0]
    records, rejected = read_source(path, root=tmp_path)
    assert [record.id for record in records] == ["0", "9"] and "path leaves its root" in reasons(rejected)[0]
