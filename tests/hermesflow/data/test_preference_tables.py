"""Pairs as tables of the datasets library: rows of each side, images that are shown as such."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hermesflow.data.pairs import PAIRS_SCHEMA
from hermesflow.data.preference_tables import write_preference_tables

SIDES = ["both", "generation", "understanding"] * 4


def pixels(image):
    return np.asarray(Image.open(io.BytesIO(image["bytes"])))


@pytest.fixture
def written(shared_tiny_model, make_pair, tmp_path):
    rows = [make_pair(shared_tiny_model, number, sides) for number, sides in enumerate(SIDES)]
    folder = write_preference_tables(shared_tiny_model, pa.Table.from_pylist(rows, PAIRS_SCHEMA), tmp_path / "out")
    return rows, {name: pq.read_table(folder / f"{name}.parquet") for name in ("generation", "understanding")}, folder


def test_each_side_becomes_a_row(shared_tiny_model, written):
    rows, tables, _ = written
    drawn, said = (tables[name].to_pylist() for name in ("generation", "understanding"))
    assert [row["id"] for row in drawn] == [row["record_id"] for row in rows if row["sides"] != "understanding"]
    assert [row["id"] for row in said] == [row["record_id"] for row in rows if row["sides"] != "generation"]
    assert {row["category"] for row in drawn + said} == {"other"}
    by_id = {row["record_id"]: row for row in rows}
    for row in drawn:
        expected = shared_tiny_model.decode_images(
            torch.tensor([by_id[row["id"]][key] for key in ("win_codes", "lose_codes")])
        )
        assert (pixels(row["chosen"]) == expected[0]).all() and (pixels(row["rejected"]) == expected[1]).all()
        assert (row["prompt"], row["chosen_score"], row["rejected_score"]) == ("a red circle", 0.75, 0.5)
    for row in said:
        [image] = row["images"]
        [own] = shared_tiny_model.decode_images(torch.tensor([by_id[row["id"]]["record_codes"]]))
        assert (pixels(image) == own).all() and row["prompt"] == shared_tiny_model.prompts.caption_question
        assert (row["chosen"], row["rejected"], row["rejected_score"]) == ("a red circle", "a blue circle", 0.25)


def test_the_datasets_library_is_told_of_images_and_finds_the_tables(written):
    _, tables, folder = written
    kinds = {
        name: json.loads(table.schema.metadata[b"huggingface"])["info"]["features"] for name, table in tables.items()
    }
    assert kinds["generation"]["chosen"] == kinds["generation"]["rejected"] == {"_type": "Image"}
    assert kinds["understanding"]["images"] == {"feature": {"_type": "Image"}, "_type": "List"}
    assert all(set(kinds[name]) == set(table.column_names) for name, table in tables.items())
    card = (folder / "README.md").read_text()
    assert "config_name: generation\n  data_files: generation.parquet" in card


def test_a_side_that_no_pair_has_is_an_empty_table(shared_tiny_model, make_pair, tmp_path):
    rows = [make_pair(shared_tiny_model, 0, "generation")]
    write_preference_tables(shared_tiny_model, pa.Table.from_pylist(rows, PAIRS_SCHEMA), tmp_path)
    assert pq.read_table(tmp_path / "understanding.parquet").num_rows == 0
