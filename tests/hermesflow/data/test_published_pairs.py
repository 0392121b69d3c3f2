"""Pairs out to the published layout and back, and a reason for every published entry that cannot be used."""

import json
import os
import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from hermesflow import cli
from hermesflow.config import load_config
from hermesflow.data.entries import read_entries
from hermesflow.data.pairs import PAIRS_SCHEMA, REJECTED_SCHEMA, read_pairs
from hermesflow.data.published_pairs import read_published_pairs, write_published_pairs
from hermesflow.models.images import read_image
from hermesflow.runs import Run, import_pairs
from hermesflow.runtime.files import InputError, read_parquet
from hermesflow.selfplay import curate_round, run_selfplay, train_round

KEYS = [
    "id", "img_path", "prompt", "caption", "caption_win", "caption_lose", "bert_score_win", "bert_score_lose",
    "image_win", "image_lose", "vqa_score_win", "vqa_score_lose",
]  # fmt: skip


@pytest.fixture
def pairs(shared_tiny_model, make_pair):
    sides = ["both", "generation", "understanding"] * 4
    return pa.Table.from_pylist([make_pair(shared_tiny_model, *item) for item in enumerate(sides)], PAIRS_SCHEMA)


def test_what_is_written_is_the_published_layout(shared_tiny_model, pairs, tmp_path):
    path = write_published_pairs(shared_tiny_model, pairs, tmp_path / "out")
    assert path == tmp_path / "out/pair_dpo_data.json"
    entries = json.loads(path.read_text())
    assert [list(entry) for entry in entries] == [KEYS] * 12
    assert [entry["id"] for entry in entries] == pairs["record_id"].to_pylist()
    for entry, row in zip(entries, pairs.to_pylist(), strict=True):
        assert (entry["caption_win"], entry["bert_score_lose"]) == (row["win_caption"], row["lose_caption_score"])
        for key, column in {"img_path": "record_codes", "image_win": "win_codes", "image_lose": "lose_codes"}.items():
            assert (entry[key] is None) == (row[column] is None)
            if entry[key] is not None:
                assert (tmp_path / "out" / entry[key]).resolve().is_relative_to(tmp_path / "out/images")
                expected = shared_tiny_model.decode_images(torch.tensor([row[column]]))[0].astype(int)
                # Convolutions round by batch size, which may move a pixel by one level.
                assert abs(read_image(tmp_path / "out" / entry[key], 64) - expected).max() <= 1


@pytest.mark.parametrize("form", ["valid", "as the scripts write it"])
def test_pairs_come_back(form, shared_tiny_model, pairs, tmp_path):
    path = write_published_pairs(shared_tiny_model, pairs, tmp_path)
    if form != "valid":
        path.write_text("".join(json.dumps(entry, indent=4) + ",\n" for entry in json.loads(path.read_text())))
    back, rejected = read_published_pairs(shared_tiny_model, path)
    assert back.schema == PAIRS_SCHEMA and rejected.schema == REJECTED_SCHEMA and len(rejected) == 0
    entries = json.loads(path.read_text()) if form == "valid" else read_entries(path)
    images = {"record_codes": "img_path", "win_codes": "image_win", "lose_codes": "image_lose"}
    for row, expected, entry in zip(back.to_pylist(), pairs.to_pylist(), entries, strict=True):
        for column in PAIRS_SCHEMA.names:
            if column in images and expected[column] is not None:
                pixels = read_image(tmp_path / entry[images[column]], 64)
                assert row[column] == shared_tiny_model.encode_images(pixels[None])[0].tolist()
            else:
                assert row[column] == expected[column], column


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for name in ("real", "win", "lose"):
        Image.fromarray(rng.integers(0, 256, (100, 80, 3), dtype=np.uint8)).save(tmp_path / f"images/{name}.png")
    (tmp_path / "images/cut.png").write_bytes((tmp_path / "images/win.png").read_bytes()[:300])
    return tmp_path


def entry(number=1, **changes):
    values = (
        number, "images/real.png", "circle", "a red circle", "a red circle", "a blue circle", 0.9, 0.5,
        "images/win.png", "images/lose.png", 0.75, 0.5,
    )  # fmt: skip
    return {key: value for key, value in (dict(zip(KEYS, values, strict=True)) | changes).items() if value is not ...}


def write(folder, entries):
    (folder / "pairs.json").write_text(json.dumps(entries))
    return folder / "pairs.json"


BAD = {
    "no object": (7, "wrong type: 7 is no object"),
    "no id": (entry(id=...), "no id"),
    "duplicate id": (entry(0), "duplicate id"),
    "no caption": (entry(caption=None), "no caption"),
    "no image": (entry(img_path=...), "no img_path"),
    "one side cut": (entry(image_win=...), "no image_win"),
    "no sides": (entry(**dict.fromkeys(KEYS[4:])), "no sides"),
    "inverted images": (entry(vqa_score_lose=0.8), "win not above lose: vqa_score_win is 0.75, vqa_score_lose 0.8"),
    "inverted captions": (entry(bert_score_lose=0.95), "win not above lose: bert_score_win is 0.9, bert"),
    "equal scores": (entry(vqa_score_lose=0.75), "win not above lose: vqa_score_win is 0.75"),
    "below the threshold": (entry(vqa_score_win=0.6), "best image not above threshold: it scores 0.6"),
    "the same image": (entry(image_lose="images/win.png"), "win and lose alike: vqa_score"),
    "the same caption": (entry(caption_lose="a red circle"), "win and lose alike: bert_score"),
    "score NaN": (entry(bert_score_win=float("nan")), "wrong type: bert_score_win is 'nan', expected a finite number"),
    "score of no type": (entry(vqa_score_win="high"), "wrong type: vqa_score_win is 'high'"),
    "score true": (entry(vqa_score_win=True), "wrong type: vqa_score_win is 'True'"),
    "missing image": (entry(image_win="images/none.png"), "missing image: there is no file 'images/none.png'"),
    "path upwards": (entry(image_win="../win.png"), "path leaves its root: '../win.png' is outside"),
    "absolute path": (entry(img_path="/etc/hostname"), "path leaves its root"),
    "link": (entry(img_path="images/link/hostname"), "path leaves its root"),
    "damaged image": (entry(image_lose="images/cut.png"), "damaged image: .*cut.png: not an image that can be read"),
    "unknown word": (entry(caption_lose="a mauve circle"), "unknown word: the model does not know the word 'mauve'"),
    "unknown word in the caption": (entry(caption="a mauve circle"), "unknown word: .* 'mauve'"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD.values(), ids=BAD.keys())
def test_an_entry_that_cannot_be_used_is_rejected_and_stops_nothing(bad, reason, shared_tiny_model, folder):
    os.symlink("/etc", folder / "images/link")
    pairs, rejected = read_published_pairs(shared_tiny_model, write(folder, [entry(0), bad, entry(2)]))
    assert pairs["record_id"].to_pylist() == ["0", "2"]
    rows = rejected.to_pylist()
    assert [row["side"] for row in rows] == ["generation", "understanding"]
    assert all(re.match(reason, row["reason"]) and "\n" not in row["reason"] for row in rows), rows


def test_a_file_of_bad_entries_says_why(shared_tiny_model, folder):
    path = write(folder, [entry(1, vqa_score_lose=0.9), entry(2, caption="")])
    with pytest.raises(InputError, match=r"pairs.json: no pair can be used \(1 no caption, 1 win not above lose"):
        read_published_pairs(shared_tiny_model, path)


def test_images_are_opened_a_batch_at_a_time(shared_tiny_model, folder, images_in_memory):
    pairs, _ = read_published_pairs(shared_tiny_model, write(folder, [entry(n) for n in range(10)]))
    assert len(pairs) == 10 and images_in_memory.count(1) == 30 and max(np.cumsum(images_in_memory)) == 6


SETTINGS = (
    "data.num_records=6", "curation.num_images=3", "curation.num_steps=2", "curation.threshold=0", "curation.margin=0",
    "curation.keep=any", "curation.caption_top_k=[4]", "train.num_steps=3", "train.pairs_per_step=2",
)  # fmt: skip


@pytest.fixture
def settings(shared_tiny_model, tmp_path):
    shared_tiny_model.save(tmp_path / "model")
    return [*SETTINGS, f"model.name={tmp_path / 'model'}", f"run.folder={tmp_path}"]


def test_one_run_exports_and_another_trains_on_it(settings, tmp_path, capsys):
    curate_round(Run(load_config(None, [*settings, "run.name=one"])), 1)
    assert cli.main(["pairs", "export", str(tmp_path / "one"), "--round", "1", "-o", str(tmp_path / "out")]) == 0
    file = tmp_path / "out/pair_dpo_data.json"
    assert capsys.readouterr().out.strip() == str(file)
    small = ["run.name=two", "selfplay.num_rounds=1", "eval.num_prompts=3", "eval.num_understanding=3"]
    overrides = [item for setting in (*settings, *small) for item in ("--set", setting)]
    assert cli.main(["pairs", "import", str(file), *overrides]) == 0
    mine, theirs = (read_pairs(tmp_path / name / "round-1/pairs.parquet") for name in ("two", "one"))
    rejected = read_parquet(tmp_path / "two/round-1/rejected.parquet", REJECTED_SCHEMA.names)
    assert len(theirs) and {*mine["record_id"].to_pylist(), *rejected["record_id"].to_pylist()} == {
        *theirs["record_id"].to_pylist()
    }
    config = load_config(None, [*settings, *small])
    train_round(Run(config), 1)
    assert (tmp_path / "two/round-1/model/model.safetensors").exists()
    # Self-play takes the round as done, and makes no candidates of records that the pairs are not of.
    summary = run_selfplay(config)
    assert summary["rounds"][0]["pairs"]["kept"] == len(mine) and not (tmp_path / "two/round-1/candidates").exists()


def test_pairs_of_a_round_are_not_replaced(settings, folder):
    config = load_config(None, [*settings, "run.name=two"])
    import_pairs(config, 1, write(folder, [entry()]))
    with pytest.raises(InputError, match="pairs.parquet: round 1 has pairs already; choose another run.name"):
        import_pairs(config, 1, write(folder, [entry()]))


@pytest.mark.parametrize(("run", "message"), [("none", "config.toml: no such file"), ("two", "pairs.parquet: no such")])
def test_export_names_what_is_missing(run, message, settings, folder, tmp_path, capsys):
    import_pairs(load_config(None, [*settings, "run.name=two", "selfplay.num_rounds=2"]), 1, write(folder, [entry()]))
    assert cli.main(["pairs", "export", str(tmp_path / run), "--round", "2"]) == 2
    assert message in capsys.readouterr().err
