"""Records: to Parquet and back without loss, and one clear line for a table that is none of records."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hermesflow.data.records import (
    Question,
    Record,
    RecordFile,
    records_from_table,
    records_to_table,
    write_records,
)
from hermesflow.models.images import decode_image
from hermesflow.runtime.files import InputError

ABSENT = Question("is there a square ?", ("yes", "no"), "no", "object", "square")
QUESTION = Question("what color is the circle ?", ("red", "blue"), "red", "color", "red")


def _record(id="a", codes=(3, 1, 2), image=True):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8) if image else None
    ids = None if codes is None else np.array(codes, dtype=np.int32)
    balanced = (QUESTION, ABSENT) if image else ()
    return Record(id, "a red circle", "colors", (QUESTION, QUESTION), ids, pixels, balanced_questions=balanced)


def _assert_same(left, right):
    for name in ("id", "caption", "category", "questions", "balanced_questions", "image_questions"):
        assert getattr(left, name) == getattr(right, name)
    assert (left.codes is None) == (right.codes is None)
    if left.codes is not None:
        np.testing.assert_array_equal(left.codes, right.codes)
        assert left.codes.dtype == right.codes.dtype
    assert (left.image is None) == (right.image is None)
    if left.image is not None:
        np.testing.assert_array_equal(left.image, decode_image(right.image, "its image", np.asarray))


def test_file_gives_back_records_with_their_images(tmp_path):
    records = [_record("a"), _record("b", codes=None, image=False), _record("c", codes=(), image=False)]
    write_records(tmp_path / "records.parquet", records, include_images=True)
    back = RecordFile(tmp_path / "records.parquet")
    write_records(tmp_path / "again.parquet", back, include_images=True)
    for some in (back, RecordFile(tmp_path / "again.parquet")):
        assert len(some) == 3
        for left, right in zip(records, some, strict=True):
            _assert_same(left, right)


def test_images_stay_out_unless_asked_for():
    table = records_to_table([_record()])
    assert table.column_names == ["id", "caption", "category", "questions", "codes", "balanced_questions"]
    assert table.schema.field("codes").type == pa.list_(pa.int32())
    assert records_from_table(table)[0].image is None


def test_no_records_make_an_empty_table():
    table = records_to_table([])
    assert table.num_rows == 0
    assert records_from_table(table) == []


def test_codes_are_optional_and_other_columns_are_passed_over():
    table = records_to_table([_record()]).drop_columns(["codes"]).append_column("note", pa.array(["mine"]))
    assert records_from_table(table)[0].codes is None


def test_without_balanced_questions_the_record_s_own_are_asked():
    table = records_to_table([_record()]).drop_columns(["balanced_questions"])  # a file of before
    [record] = records_from_table(table)
    assert record.balanced_questions == () and record.image_questions == (QUESTION, QUESTION)


def test_question_refuses_an_answer_that_is_no_choice():
    with pytest.raises(ValueError, match="expected an answer among the choices .* got 'green'"):
        Question("what color is the circle ?", ("red", "blue"), "green", "color", "green")


def _without(name):
    return records_to_table([_record()]).drop_columns([name])


def _with(name, values):
    table = records_to_table([_record()], include_images=True)
    return table.set_column(table.column_names.index(name), name, values)


BAD_QUESTION = {"question": None, "choices": ["a"], "answer": "a", "element_type": "color", "element": "a"}
WRONG_ANSWER = {**BAD_QUESTION, "question": "what ?", "answer": "b"}


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: _without("caption"), "expected a column 'caption'"),
        (lambda: _with("questions", pa.array([7])), "expected columns .*questions: list"),
        (lambda: _with("codes", pa.array([[2**40]])), "expected columns .*codes: list"),
        (lambda: _with("caption", pa.array([None], type=pa.string())), "got null in record 'a'"),
        (lambda: _with("questions", pa.array([[BAD_QUESTION]])), "expected questions without nulls"),
        (lambda: _with("questions", pa.array([[WRONG_ANSWER]])), "expected an answer among the choices"),
    ],
    ids=["missing", "type", "range", "null", "null_question", "wrong_answer"],
)
def test_a_table_that_is_none_of_records_is_refused_with_its_file(make, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        records_from_table(make())
    path = tmp_path / "mine.parquet"
    pq.write_table(make(), path)
    with pytest.raises(InputError, match=f"mine.parquet: is no table of records .*{match}") as error:
        list(RecordFile(path))
    assert "\n" not in str(error.value)


def test_damaged_file_is_named(tmp_path):
    path = tmp_path / "records.parquet"
    write_records(path, [_record()])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="records.parquet"):
        list(RecordFile(path))


def test_a_slice_of_a_file_reads_its_own_records(tmp_path):
    write_records(tmp_path / "records.parquet", (_record(str(number)) for number in range(3000)))
    records = RecordFile(tmp_path / "records.parquet")
    names = [str(number) for number in range(3000)]
    assert [record.id for record in records] == names
    for part in (slice(1000, 2100), slice(0, 0), slice(2990, None), slice(None, None, 700)):
        assert len(records[part]) == len(names[part])
        assert [record.id for record in records[part]] == names[part]
    assert records[1000:2100][50:60][0].id == "1050" and records[-1].id == "2999"
    with pytest.raises(IndexError):
        records[1000:2100][1100]


def test_records_that_break_off_leave_no_file(tmp_path):
    def broken():
        yield _record()
        raise InputError("too few")

    with pytest.raises(InputError, match="too few"):
        write_records(tmp_path / "records.parquet", broken())
    assert list(tmp_path.iterdir()) == []
