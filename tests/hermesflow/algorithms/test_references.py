"""The frozen reference: cached, live and with adapters off it says the same, and a strange file is not believed."""

import dataclasses

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hermesflow.algorithms.algorithm import batch_logprobs
from hermesflow.algorithms.packing import PairPacker, referenced_sides
from hermesflow.algorithms.references import LiveReference, NoReference, cached_reference
from hermesflow.config import TrainConfig
from hermesflow.runtime.files import InputError

CONFIG = TrainConfig(pairs_per_step=3, num_steps=5, condition_dropout=0.3, tokens_per_pass=150)


@pytest.fixture
def packer(shared_tiny_model, random_pairs, asked):
    pairs = random_pairs(shared_tiny_model, 4, ("both", "generation"), asked)
    return PairPacker(shared_tiny_model, pairs, CONFIG, seed=1)


def visits_of(packer):
    return [visit for step in range(CONFIG.num_steps) for visit in packer.visits(step)]


def cached(packer, path, made_from=("a",), logprobs=None):
    def in_inference_mode(batch):
        with torch.inference_mode():
            return batch_logprobs(packer.model.transformer, batch)

    return cached_reference(path, made_from, packer, visits_of(packer), logprobs or in_inference_mode)


def test_cached_and_live_agree(packer, tmp_path):
    live, stored = LiveReference(packer.model.transformer), cached(packer, tmp_path / "reference.parquet")
    for step in range(CONFIG.num_steps):
        batch = packer.pack(packer.visits(step))
        expected, found = live.logprobs(batch), stored.logprobs(batch)
        assert found.dtype == torch.float32 and not found.requires_grad and not found.is_inference()
        found, expected = batch.split(found), batch.split(expected)
        assert found.keys() == batch.sides.keys()
        for side in found:
            assert (found[side] - expected[side]).abs().max() <= 1e-5
            assert expected[side].abs().max() > 1


def test_a_live_reference_does_not_follow_the_policy(tiny_model, random_pairs):
    packer = PairPacker(tiny_model, random_pairs(tiny_model), CONFIG, seed=1)
    reference, batch = LiveReference(tiny_model.transformer), packer.pack(packer.visits(0))
    before = reference.logprobs(batch)
    with torch.no_grad():
        tiny_model.transformer.head.weight.mul_(2)
    assert torch.equal(reference.logprobs(batch), before)
    assert not torch.equal(batch_logprobs(tiny_model.transformer, batch), before)


def test_the_file_is_made_once_and_again_for_something_else(packer, tmp_path):
    path, calls = tmp_path / "reference.parquet", []

    def counting(batch):
        calls.append(len(batch.visits))
        return torch.zeros(len(batch.rows))

    cached(packer, path, ("a",), counting)
    passes = len(calls)
    assert passes > 1
    cached(packer, path, ("a",), counting)
    assert len(calls) == passes
    cached(packer, path, ("b",), counting)
    assert len(calls) > passes


@pytest.mark.parametrize(
    ("settings", "sides"),
    [
        ({"replay_target": "answers"}, {"generation", "understanding"}),
        ({"loss_type": "simpo"}, {"replay"}),
        ({"replay_weight": 0.0}, {"generation", "understanding"}),
    ],
    ids=["right answers replayed", "simpo", "no replay"],
)
def test_sides_without_a_reference_get_zeros(shared_tiny_model, random_pairs, asked, tmp_path, settings, sides):
    pairs = random_pairs(shared_tiny_model, 4, ("both", "generation"), asked)
    packer = PairPacker(shared_tiny_model, pairs, dataclasses.replace(CONFIG, **settings), seed=1)
    assert set(referenced_sides(packer.config)) == sides
    reference = cached(packer, tmp_path / "reference.parquet")
    for step in range(CONFIG.num_steps):
        batch = packer.pack(packer.visits(step))
        for side, values in batch.split(reference.logprobs(batch)).items():
            assert values.all() if side in sides else not values.any()
    assert {row["side"] for row in pq.read_table(tmp_path / "reference.parquet").to_pylist()} == sides


@pytest.mark.parametrize("tokens_per_pass", [1, 10_000], ids=["visit by visit", "one pass"])
@pytest.mark.parametrize("some", [True, False], ids=["some pairs have questions", "no pair has"])
def test_visits_without_anything_to_compare_are_left_out(
    shared_tiny_model, random_pairs, asked, tmp_path, some, tokens_per_pass
):
    """Of simpo the replay alone has a reference, and imported pairs have no questions."""
    config = dataclasses.replace(CONFIG, loss_type="simpo", tokens_per_pass=tokens_per_pass)
    pairs = random_pairs(shared_tiny_model, 4, asked=asked if some else ())
    packer = PairPacker(shared_tiny_model, pairs, config, seed=1)
    reference = cached(packer, tmp_path / "reference.parquet")
    for step in range(CONFIG.num_steps):
        batch = packer.pack(packer.visits(step))
        assert reference.logprobs(batch).any() == some


def test_captions_are_computed_once_a_pair(packer, tmp_path):
    computed = []

    def noting(batch):
        computed.extend((*visit, side) for side in batch.sides for visit in batch.visits_of[side])
        return batch_logprobs(packer.model.transformer, batch).detach()

    cached(packer, tmp_path / "reference.parquet", logprobs=noting)
    table = pq.read_table(tmp_path / "reference.parquet").to_pylist()
    keys = [(row["pair"], row["visit"], row["side"]) for row in table]
    assert keys == sorted(computed) and len(keys) == len(set(keys))
    assert {side for *_, side in keys} == {"generation", "understanding", "replay"}
    visits = [tuple(visit) for visit in visits_of(packer)]
    assert max(visit for _, visit in visits) > 1
    assert [key[:2] for key in keys if key[2] == "generation"] == sorted(visits)
    assert [key[:2] for key in keys if key[2] == "understanding"] == [(0, 0), (2, 0)]
    assert [key[:2] for key in keys if key[2] == "replay"] == sorted(visit for visit in visits if visit[0])


DAMAGES = {
    "a missing pair": (lambda table: table.slice(1), "lacks pair, visit, side"),
    "too few values": (
        lambda table: table.set_column(3, "logprob", pa.array([[0.0]] * len(table), pa.list_(pa.float32()))),
        "values for [0-9]+ tokens",
    ),
    "another type": (lambda table: table.set_column(3, "logprob", pa.array(["x"] * len(table))), "damaged reference"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_strange_file_is_named(packer, tmp_path, damage, message):
    path = tmp_path / "reference.parquet"
    cached(packer, path)
    table = pq.read_table(path)
    pq.write_table(damage(table).replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(InputError, match=f"reference.parquet: damaged reference file.*{message}|{message}"):
        reference = cached(packer, path)
        for step in range(CONFIG.num_steps):
            reference.logprobs(packer.pack(packer.visits(step)))


def test_bytes_that_are_no_parquet_are_named(packer, tmp_path):
    (tmp_path / "reference.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match="reference.parquet: damaged Parquet file"):
        cached(packer, tmp_path / "reference.parquet")


def test_no_reference_is_zero(packer):
    batch = packer.pack(packer.visits(0))
    assert torch.equal(NoReference().logprobs(batch), torch.zeros(len(batch.rows)))
