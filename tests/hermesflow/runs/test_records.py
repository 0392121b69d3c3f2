"""A run's records, made in blocks: the same for any blocks, any processes, after kills and with what was mended."""

import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from hermesflow.config import load_config
from hermesflow.data.records import RecordFile
from hermesflow.runs import Run, records
from hermesflow.runtime.files import InputError, read_parquet

QUESTIONS = [{"question": "is there a circle ?", "choices": ["yes", "no"], "answer": "yes"}]
BAD = (2, 3, 7, 11, 12, 18)


@pytest.fixture
def data(tmp_path):
    """Twenty images, of which six have captions that the model does not know."""
    rng, rows = np.random.default_rng(0), []
    for number in range(20):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        caption = "a unicorn" if number in BAD else "a red circle"
        rows.append({"id": number, "caption": caption, "image": f"{number}.png", "questions": QUESTIONS})
    return write(tmp_path, rows)


def write(folder, rows):
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "data.jsonl"


def run_of(data, name="t", count=10, *more):
    settings = (f"data.source={data}", f"run.folder={data.parent}", f"run.name={name}", "model.device=cpu")
    return Run(load_config(None, (*settings, f"data.num_records={count}", "selfplay.num_rounds=1", *more)))


@pytest.fixture
def encoded(shared_tiny_model, monkeypatch):
    """How many images were encoded; those of a call after `stop` of them raise KeyboardInterrupt."""
    counts, encode = Counter(), type(shared_tiny_model).encode_images

    def counting(model, images):
        if counts["stop"] and counts["images"] >= counts["stop"]:
            raise KeyboardInterrupt
        counts["images"] += len(images)
        return encode(model, images)

    monkeypatch.setattr(type(shared_tiny_model), "encode_images", counting)
    return counts


@pytest.mark.parametrize("block", [1, 3, 1024])
def test_of_any_blocks_the_records_are_the_same_and_none_too_many_is_looked_at(block, data, encoded, monkeypatch):
    monkeypatch.setattr(records, "_MOST_BLOCK", block)
    run = run_of(data)
    good = [str(number) for number in range(20) if number not in BAD]
    assert [record.id for record in run.records] == good[:10] and encoded["images"] == 10
    rejected = read_parquet(run.folder / "rejected.parquet").to_pylist()
    assert [row["record_id"] for row in rejected] == [str(number) for number in BAD if number <= int(good[9])]
    assert not (run.folder / "records").exists()


def test_what_was_encoded_before_a_kill_is_not_encoded_again(data, encoded, monkeypatch):
    monkeypatch.setattr(records, "_MOST_BLOCK", 2)
    encoded["stop"] = 4
    run = run_of(data)
    with pytest.raises(KeyboardInterrupt):
        _ = run.records
    run._lock.close()
    parts = sorted(path.name for path in (run.folder / "records").glob("part-*"))
    assert parts[0] == "part-000000000-000000002.parquet" and not (run.folder / "records.parquet").exists()
    encoded["stop"] = 0
    again = run_of(data)
    assert len(again.records) == 10 and encoded["images"] == 10 and not (run.folder / "records").exists()
    again._lock.close()
    assert read_parquet(run.folder / "records.parquet").equals(read_parquet(run_of(data, "other").records._rows.path))


def test_after_a_failure_the_data_may_be_mended_and_other_settings_given(data, encoded, monkeypatch):
    """Blocks of the old data are not taken."""
    monkeypatch.setattr(records, "_MOST_BLOCK", 4)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    run = run_of(data, count=15)
    with pytest.raises(InputError, match=r"has 14 usable records, 15 are needed; lower .*rejected were 6 unknown word"):
        _ = run.records
    run._lock.close()
    assert (run.folder / "records").exists()
    run = run_of(write(data.parent, [row | {"caption": "a blue circle"} for row in rows]), count=15)
    assert {record.caption for record in run.records} == {"a blue circle"} and len(run.records) == 15
    run._lock.close()
    with pytest.raises(InputError, match="has 20 records, 21 are needed"):
        _ = run_of(data, "other", count=21).records


def test_more_records_keep_those_that_are_there(data, monkeypatch):
    monkeypatch.setattr(records, "_MOST_BLOCK", 4)
    run = run_of(data, count=5)
    first = [(record.id, record.codes.tolist()) for record in run.records]
    run._lock.close()
    run = run_of(data, count=12)
    assert [(record.id, record.codes.tolist()) for record in run.records][:5] == first and len(run.records) == 12
    run._lock.close()
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    write(data.parent, [rows[1] | {"caption": "a blue circle"}, *rows])
    with pytest.raises(InputError, match="changed since the run began"):
        _ = run_of(data, count=14).records


def test_images_stay_for_models_that_do_not_see_codes(data, monkeypatch, shared_tiny_model):
    monkeypatch.setattr(type(shared_tiny_model), "views_codes", False)
    [first, *_] = run_of(data, count=3).records
    assert Image.open(io.BytesIO(first.image)).size == (64, 64)


def test_the_built_in_world_in_blocks(tmp_path, monkeypatch):
    settings = (f"run.folder={tmp_path}", "data.num_records=10", "selfplay.num_rounds=1", "model.device=cpu")
    whole = list(Run(load_config(None, (*settings, "run.name=a"))).records)
    monkeypatch.setattr(records, "_MOST_BLOCK", 3)
    parts = RecordFile(Run(load_config(None, (*settings, "run.name=b"))).records._rows.path)
    assert [(each.id, each.caption, each.questions, each.codes.tolist()) for each in whole] == [
        (each.id, each.caption, each.questions, each.codes.tolist()) for each in parts
    ]
