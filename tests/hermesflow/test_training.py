"""Pair-DPO training: batches, the published code's defects, resume to the last bit, and that it learns its pairs."""

import copy
import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from hermesflow.checkpointing import checkpoints
from hermesflow.config import TrainConfig
from hermesflow.files import InputError
from hermesflow.training import learning_rate, pair_batch, pair_losses, step_indices, train_pairs

QUESTION = [3, 4, 5]


def make_pairs(model, count=6, sides=("both",)):
    rng = np.random.default_rng(0)
    tokens, codebook = model.layout.num_image_tokens, model.layout.codebook_size
    words = ["red", "green", "blue", "circle", "square", "a"]
    rows = []
    for index in range(count):
        win, lose = ([words[i] for i in rng.integers(len(words), size=n)] for n in (4, 3))
        rows.append(
            {
                "record_id": f"r{index}",
                "category": "colors",
                "caption": "a red circle",
                "sides": sides[index % len(sides)],
                "record_codes": rng.integers(codebook, size=tokens).tolist(),
                "win_codes": rng.integers(codebook, size=tokens).tolist(),
                "lose_codes": rng.integers(codebook, size=tokens).tolist(),
                "win_caption_ids": model.encode_text(" ".join(win)),
                "lose_caption_ids": model.encode_text(" ".join(lose)),
                "prompt_ids": model.encode_text("a red circle"),
            }  # fmt: skip
        )
    return rows


@pytest.fixture
def model(tiny_model):
    return copy.deepcopy(tiny_model)


def naive_side_sums(transformer, layout, pair, batch, index):
    """Summed log-probabilities of win image, lose image, win caption and lose caption, each by one dense pass."""

    def logprobs(ids, full_from, full_to):
        length = len(ids)
        allowed = torch.ones(length, length, dtype=torch.bool).tril()
        allowed[full_from:full_to, :full_to] = True
        return torch.log_softmax(dense_forward(transformer, torch.tensor(ids), allowed), -1)

    side = batch.sides["generation"]
    sums = []
    for lose, name in enumerate(("win_codes", "lose_codes")):
        prompt = layout.text_prompt(pair["prompt_ids"])
        wanted = side.segment == 2 * index + lose
        image = layout.image(pair[name])
        start = int(side.rows[wanted].min())
        tree_ids = batch.tree.token_ids
        span = next(
            i
            for i in range(batch.tree.num_spans)
            if batch.tree.span_rows(i).start <= start < batch.tree.span_rows(i).stop
        )
        rows = batch.tree.span_rows(span)
        logp = logprobs([*prompt, *tree_ids[rows].tolist()], len(prompt), len(prompt) + len(image))
        offsets = side.rows[wanted] - rows.start
        assert side.targets[wanted].tolist() == [image[o] for o in offsets]
        sums.append(sum(float(logp[len(prompt) + o, image[o]]) for o in offsets))
    prefix = layout.image_prefix(pair["record_codes"])
    for name in ("win_caption_ids", "lose_caption_ids"):
        ids = [*prefix, *layout.question(QUESTION), *pair[name]]
        logp = logprobs(ids, 0, len(prefix))
        first = len(ids) - len(pair[name]) - 1
        sums.append(sum(float(logp[first + i, t]) for i, t in enumerate([*pair[name], layout.eot])))
    return sums


def dense_forward(transformer, ids, allowed):
    """The transformer on one dense sequence, with its attention replaced by an explicit masked softmax."""
    from hermesflow.engine.transformer import rotary_table, rotate

    config = transformer.config
    x = transformer.embed(ids)
    rotary = rotary_table(torch.arange(len(ids)), config.rotary_dim, config.rope_theta)
    for block in transformer.blocks:
        attention, normed = block.attention, block.attention_norm(x)
        heads = attention.qkv(normed).view(len(ids), -1, config.head_dim)
        q, k, v = heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        q, k = rotate(attention.q_norm(q), rotary), rotate(attention.k_norm(k), rotary)
        k, v = (t.repeat_interleave(config.num_heads // config.num_kv_heads, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * config.head_dim**-0.5
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
        attended = attention.out(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        if block.mlp_norm is None:
            x = x + attended + block.mlp(normed)
        else:
            x = x + attended
            x = x + block.mlp(block.mlp_norm(x))
    return transformer.head(transformer.norm(x))


def test_packed_sums_equal_one_sequence_at_a_time(model):
    rows = make_pairs(model, 3)
    batch = pair_batch(rows, model.layout, QUESTION, 64, np.random.default_rng(0))
    from hermesflow.engine.sequence_logprob import span_logprobs

    with torch.no_grad():
        for index, pair in enumerate(rows):
            packed = []
            for side in batch.sides.values():
                logp = span_logprobs(model.transformer, batch.tree, side.rows, side.targets)
                packed += [logp[side.segment == 2 * index + lose].sum().item() for lose in (0, 1)]
            assert packed == pytest.approx(
                naive_side_sums(model.transformer, model.layout, pair, batch, index), abs=1e-3
            )


def test_win_and_lose_share_condition_and_mask(model):
    rows = make_pairs(model, 4)
    batch = pair_batch(rows, model.layout, QUESTION, 64, np.random.default_rng(1))
    tree = batch.tree
    for index in range(4):
        masked, parents = [], []
        for lose in (0, 1):
            found = batch.sides["generation"].rows[batch.sides["generation"].segment == 2 * index + lose]
            span = np.searchsorted(tree.packed_starts, int(found[0]), side="right") - 1
            masked.append((found - tree.packed_starts[span]).tolist())
            parents.append(tree.parents[span])
            assert (tree.token_ids[found] == model.layout.mask_id).all()
        assert masked[0] == masked[1] and parents[0] == parents[1]


def test_captions_are_conditioned_on_the_record_s_own_image(model):
    rows = make_pairs(model, 2)
    tree = pair_batch(rows, model.layout, QUESTION, 64, np.random.default_rng(1)).tree
    images = [
        tree.token_ids[tree.span_rows(i)].tolist()
        for i in range(tree.num_spans)
        if tree.parents[i] < 0 and tree.full[i]
    ]
    assert images == [model.layout.image_prefix(row["record_codes"]) for row in rows]


def test_one_sided_pairs_weigh_nothing_on_the_other_side(model):
    rows = make_pairs(model, 3, sides=("both", "generation", "understanding"))
    batch = pair_batch(rows, model.layout, QUESTION, 64, np.random.default_rng(0))
    assert batch.sides["generation"].pair_weight.tolist() == [1, 1, 0]
    assert batch.sides["understanding"].pair_weight.tolist() == [1, 0, 1]
    loss, metrics = pair_losses(model.transformer, copy.deepcopy(model.transformer), batch, TrainConfig())
    assert loss.item() == pytest.approx(2 * np.log(2), abs=1e-5)
    assert metrics["generation/margin"] == pytest.approx(0, abs=1e-5)


def test_training_prefers_the_wins(model, tmp_path):
    config = TrainConfig(num_steps=30, pairs_per_step=6, lr=3e-3, warmup_steps=2, checkpoint_every=100)
    means = train_pairs(model, pa.Table.from_pylist(make_pairs(model)), config, seed=0, folder=tmp_path)
    assert means["generation/accuracy"] > 0.9 and means["understanding/accuracy"] > 0.9
    assert means["loss"] < 2 * np.log(2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(30))


def test_resume_is_bit_identical(model, tmp_path, monkeypatch):
    pairs = pa.Table.from_pylist(make_pairs(model))
    config = TrainConfig(num_steps=9, pairs_per_step=4, lr=1e-3, checkpoint_every=2, keep_checkpoints=2)
    whole, broken, resumed = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    train_pairs(whole, pairs, config, seed=3, folder=tmp_path / "whole")

    import hermesflow.training as training

    calls, original = iter(range(100)), training.pair_losses

    def killed(*args):
        if next(calls) == 7:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(training, "pair_losses", killed)
    with pytest.raises(KeyboardInterrupt):
        train_pairs(broken, pairs, config, seed=3, folder=tmp_path / "broken")
    monkeypatch.setattr(training, "pair_losses", original)
    assert [path.name for path in checkpoints(tmp_path / "broken")] == ["step-000004", "step-000006"]
    train_pairs(resumed, pairs, config, seed=3, folder=tmp_path / "broken")
    for name, tensor in whole.transformer.state_dict().items():
        assert torch.equal(tensor, resumed.transformer.state_dict()[name]), name
    records = [
        [
            {k: v for k, v in json.loads(line).items() if k != "tokens_per_second"}
            for line in path.read_text().splitlines()
        ]
        for path in (tmp_path / "whole/metrics.jsonl", tmp_path / "broken/metrics.jsonl")
    ]
    assert records[0] == records[1]


def test_a_damaged_checkpoint_is_named(model, tmp_path):
    (tmp_path / "step-000002").mkdir()
    (tmp_path / "step-000002/state.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="step-000002: damaged checkpoint file .torch cannot read it"):
        train_pairs(model, pa.Table.from_pylist(make_pairs(model)), TrainConfig(), seed=0, folder=tmp_path)


def test_no_pairs_is_an_error(model, tmp_path):
    with pytest.raises(InputError, match="no pairs to train on"):
        train_pairs(model, pa.Table.from_pylist(make_pairs(model)).slice(0, 0), TrainConfig(), seed=0, folder=tmp_path)


def test_a_loss_that_is_not_finite_names_the_step(model, tmp_path):
    with torch.no_grad():
        model.transformer.head.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="at step 0; lower train.lr"):
        train_pairs(model, pa.Table.from_pylist(make_pairs(model)), TrainConfig(), seed=0, folder=tmp_path)


def test_every_epoch_visits_every_pair_once():
    seen = [index for step in range(5) for index in step_indices(10, 4, step, seed=1)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_learning_rate_warms_up_and_falls_to_zero():
    config = TrainConfig(num_steps=100, warmup_steps=10, lr=1.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0) and rates[-1] < 1e-3
