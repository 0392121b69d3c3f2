"""Packed passes of Pair-DPO: what they predict, how masks are drawn and weighed, and how passes are planned."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from hermesflow.algorithms import packing
from hermesflow.algorithms.batch import PairVisit
from hermesflow.algorithms.packing import (
    PairPacker,
    check_pairs,
    draw_masks,
    mask_count_probability,
    plan_passes,
    trained_pairs,
)
from hermesflow.algorithms.references import batch_logprobs
from hermesflow.config import TrainConfig
from hermesflow.data.pairs import PAIRS_SCHEMA
from hermesflow.runtime.files import InputError

SIDES = ("both", "generation", "understanding")
ONE_MASK = {"masks_per_pair": 1, "complementary_masks": False}
# What changes a pass, each way at least once, and all of it together.
WAYS = {
    "defaults": {},
    "one mask": ONE_MASK,
    "boundary labels": ONE_MASK | {"boundary_labels": True},
    "four masks": {"masks_per_pair": 4, "complementary_masks": False},
    "complements": {"masks_per_pair": 4, "complementary_masks": True},
    "elbo": {"masks_per_pair": 2, "complementary_masks": False, "elbo_weighting": True},
    "no replay": ONE_MASK | {"replay_weight": 0.0},
    "right answers replayed": ONE_MASK | {"replay_target": "answers"},
    "one question replayed": ONE_MASK | {"replayed_questions": 1},
    "dropped prompts": ONE_MASK | {"condition_dropout": 0.5},
    "means over tokens": {"masks_per_pair": 2, "complementary_masks": False, "length_normalize": True},
    "all": {"masks_per_pair": 2, "complementary_masks": True, "elbo_weighting": True, "boundary_labels": True,
            "condition_dropout": 0.5},
}  # fmt: skip
every_way = pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS.keys())


def small_images(model, num_image_tokens):
    """The model with fewer tokens an image."""
    model.layout = replace(model.layout, num_image_tokens=num_image_tokens)
    return model


def spans_of(tree, parent):
    """The ids of a span's children, or of the roots with parent -1."""
    return [tree.token_ids[tree.span_rows(span)].tolist() for span in np.flatnonzero(tree.parents == parent)]


def image_logprobs(naive, model, condition, codes, hidden):
    """Log-probability [N + 2] of soi, each code and eoi at its own row, with hidden codes masked: one dense pass."""
    ids = np.array(model.layout.image(codes))
    shown = ids.copy()
    shown[1 + np.array(hidden)] = model.layout.mask_id
    spans = (model.layout.text_prompt(condition), "causal"), (shown.tolist(), "full")
    logits = naive.chain_logits(model.transformer, *spans)[-len(ids) :]
    return logits.log_softmax(1)[torch.arange(len(ids)), torch.from_numpy(ids)]


def answer_sum(naive, model, codes, question, answer):
    """Summed log-probability of an answer to a question, both text ids, and of its eot: one dense pass."""
    layout = model.layout
    text = [*layout.question(question), *answer]
    logits = naive.chain_logits(model.transformer, (layout.image_prefix(codes), "full"), (text, "causal"))
    targets = torch.tensor([*answer, layout.eot])
    return logits[-len(targets) :].log_softmax(1)[torch.arange(len(targets)), targets].sum().item()


@torch.no_grad()
@every_way
def test_packed_sums_equal_one_sequence_at_a_time(naive, shared_tiny_model, random_pairs, asked, settings):
    model, config = shared_tiny_model, TrainConfig(**settings)
    pairs = random_pairs(model, 3, asked=asked)
    packer = PairPacker(model, pairs, config, seed=5)
    visits = [PairVisit(1, 0), PairVisit(0, 4), PairVisit(2, 1), PairVisit(1, 2)]
    batch = packer.pack(visits)
    weighted = {
        name: logprob * batch.sides[name].token_weight
        for name, logprob in batch.split(batch_logprobs(model.transformer, batch)).items()
    }
    prompts = [ids for ids in spans_of(batch.tree, -1) if ids[0] == model.layout.special("t2i")]
    numbers = itertools.count()
    for index, (visit, prompt) in enumerate(zip(visits, prompts, strict=True)):
        row = pairs.slice(visit.pair, 1).to_pylist()[0]
        condition = prompt[2:-1]
        if not config.condition_dropout:
            assert condition == model.image_prompt(row["caption"])
        for lose, role in enumerate(("win", "lose")):
            expected = 0.0
            for hidden, weight in draw_masks(16, config, np.random.default_rng([5, 1, *visit])):
                logprobs = image_logprobs(naive, model, condition, row[f"{role}_codes"], hidden)
                expected += weight * logprobs[1 + hidden].sum().item()
                if config.boundary_labels:
                    expected += logprobs[[0, -1]].sum().item() / config.masks_per_pair
            mine = batch.sides["generation"].segment == 2 * index + lose
            assert weighted["generation"][mine].sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-3)
            expected = answer_sum(naive, model, row["record_codes"], model.caption_prompt(), row[f"{role}_caption_ids"])
            mine = batch.sides["understanding"].segment == 2 * index + lose
            assert weighted["understanding"][mine].sum().item() == pytest.approx(expected, abs=1e-3)
        if config.replay_weight:
            order = np.random.default_rng([5, 4, *visit]).permutation(len(row["questions"]))
            for number in order[: config.replayed_questions]:
                right = [row["answers"][number]]
                for answer in right if config.replay_target == "answers" else row["choices"][number]:
                    texts = (row["questions"][number], answer)
                    expected = answer_sum(naive, model, row["record_codes"], *map(model.encode_text, texts))
                    mine = batch.sides["replay"].segment == next(numbers)
                    assert weighted["replay"][mine].sum().item() == pytest.approx(expected, abs=1e-3)
    assert not config.replay_weight or next(numbers) == len(batch.sides["replay"].pair_weight)


@every_way
def test_win_and_lose_share_condition_and_mask(shared_tiny_model, random_pairs, settings):
    model, config = shared_tiny_model, TrainConfig(**settings)
    batch = PairPacker(model, random_pairs(model, 4), config, seed=1).pack([PairVisit(pair, 0) for pair in range(4)])
    tree, side = batch.tree, batch.sides["generation"]
    for index in range(4):
        found = []
        for lose in (0, 1):
            mine = side.segment == 2 * index + lose
            rows = side.rows[mine].numpy()
            spans = np.searchsorted(tree.packed_starts, rows, side="right") - 1
            assert len(np.unique(spans)) == config.masks_per_pair
            offsets = rows - tree.packed_starts[spans]
            found.append((offsets.tolist(), set(tree.parents[spans].tolist()), side.token_weight[mine].tolist()))
            inner = (offsets > 0) & (offsets < 17)
            assert (tree.token_ids[rows[inner]] == model.layout.mask_id).all()
            assert config.boundary_labels == (not inner.all())
        assert found[0] == found[1] and len(found[0][1]) == 1


def test_captions_are_conditioned_on_the_record_s_own_image(shared_tiny_model, random_pairs):
    model = shared_tiny_model
    pairs = random_pairs(model, 3)
    tree = PairPacker(model, pairs, TrainConfig(generation_weight=0), 0).pack([PairVisit(2, 0), PairVisit(0, 0)]).tree
    codes, wins, loses = (pairs[name].to_pylist() for name in ("record_codes", "win_caption_ids", "lose_caption_ids"))
    assert spans_of(tree, -1) == [model.layout.image_prefix(codes[pair]) for pair in (2, 0)]
    for image, pair in ((0, 2), (4, 0)):
        assert spans_of(tree, image) == [model.layout.question(model.caption_prompt())]
        assert spans_of(tree, image + 1) == [wins[pair], loses[pair]]


@pytest.mark.parametrize(
    ("length", "ends"), [(0, True), (1, True), (63, True), (64, False)], ids=["empty", "one", "room", "cut"]
)
def test_only_a_caption_that_ended_by_itself_is_scored_with_its_end(shared_tiny_model, random_pairs, length, ends):
    model = shared_tiny_model
    assert model.prompts.max_caption_tokens == 64
    row = random_pairs(model, 1).to_pylist()[0] | {"lose_caption_ids": [7] * length}
    packer = PairPacker(model, pa.Table.from_pylist([row], PAIRS_SCHEMA), TrainConfig(), 0)
    batch = packer.pack([PairVisit(0, 0)])
    side = batch.sides["understanding"]
    mine = side.segment == 1
    assert side.targets[mine].tolist() == [7] * length + [model.layout.eot] * ends
    question = len(batch.tree.token_ids) - length - len(row["win_caption_ids"]) - 1
    first = len(batch.tree.token_ids) - length
    assert side.rows[mine].tolist() == [question, *range(first, first + length - (not ends))]
    assert packer.num_tokens(PairVisit(0, 0)) == len(batch.tree.token_ids)


def test_one_sided_pairs_weigh_nothing_on_the_other_side(shared_tiny_model, random_pairs):
    model = shared_tiny_model
    packer = PairPacker(model, random_pairs(model, 3, SIDES), TrainConfig(), 0)
    visits = [PairVisit(pair, 0) for pair in range(3)]
    batch = packer.pack(visits)
    assert batch.sides["generation"].pair_weight.tolist() == [1, 1, 0]
    assert batch.sides["understanding"].pair_weight.tolist() == [1, 0, 1]
    assert batch.visits_of["understanding"] == [visits[0], visits[2]]
    assert packer.num_pairs([*visits, visits[1]]) == {"generation": 3, "understanding": 2}
    assert list(packer.pack(visits[1:2]).sides) == ["generation"] == list(packer.num_pairs(visits[1:2]))


@pytest.mark.parametrize("side", ["generation", "understanding"])
def test_a_side_of_weight_0_is_not_packed(shared_tiny_model, random_pairs, side):
    model, (other,) = shared_tiny_model, {"generation", "understanding"} - {side}
    packer = PairPacker(model, random_pairs(model, 1), TrainConfig(**{f"{other}_weight": 0}), 0)
    batch = packer.pack([PairVisit(0, 0)])
    assert list(batch.sides) == [side] and list(packer.num_pairs(batch.visits)) == [side]
    root = {"generation": "t2i", "understanding": "mmu"}[side]
    assert [ids[0] for ids in spans_of(batch.tree, -1)] == [model.layout.special(root)]


@pytest.mark.parametrize("side", ["generation", "understanding"])
def test_pairs_without_a_trained_side_are_left_out(shared_tiny_model, random_pairs, side):
    (other,) = {"generation", "understanding"} - {side}
    pairs = random_pairs(shared_tiny_model, 6, SIDES)
    assert trained_pairs(pairs, TrainConfig()) == pairs
    config = TrainConfig(**{f"{other}_weight": 0})
    kept = trained_pairs(pairs, config)
    assert kept["record_id"].to_pylist() == [f"r{row}" for row in range(6) if row % 3 in (0, SIDES.index(side))]
    packer = PairPacker(shared_tiny_model, kept, config, 0)
    assert all(packer.num_tokens(PairVisit(pair, 0)) for pair in range(len(kept)))
    assert len(trained_pairs(pairs.slice(0, 0), config)) == 0
    message = f"all 6 have the {other} side alone, and train.{other}_weight is 0; raise it"
    with pytest.raises(InputError, match=message):
        trained_pairs(random_pairs(shared_tiny_model, 6, (other,)), config)


@every_way
@pytest.mark.parametrize("sides", SIDES)
def test_num_tokens_is_the_tree_s(shared_tiny_model, random_pairs, asked, settings, sides):
    pairs = random_pairs(shared_tiny_model, 3, (sides,), asked)
    packer = PairPacker(shared_tiny_model, pairs, TrainConfig(**settings), 0)
    for visit in (PairVisit(pair, visit) for pair in range(3) for visit in range(4)):
        assert packer.num_tokens(visit) == len(packer.pack([visit]).tree.token_ids)


@every_way
def test_a_visit_predicts_the_same_in_any_pass(shared_tiny_model, random_pairs, asked, settings):
    """A cached reference keeps each visit's values, to be put together for any pass."""
    pairs = random_pairs(shared_tiny_model, 3, ("both", "understanding", "both"), asked)
    packers = [PairPacker(shared_tiny_model, pairs, TrainConfig(**settings), seed=2) for _ in range(2)]
    visits = [PairVisit(2, 1), PairVisit(1, 0), PairVisit(0, 3)]
    together, alone = packers[0].pack(visits), [packers[1].pack([visit]) for visit in visits]
    for name, side in together.sides.items():
        parts = [batch.sides[name] for batch in alone if name in batch.sides]
        for field in ("targets", "token_weight"):
            assert torch.equal(getattr(side, field), torch.cat([getattr(part, field) for part in parts]))
        # Pairs are numbered by their visits, answers one after the other.
        sizes = [len(part.pair_weight) if name == "replay" else 2 for part in parts]
        having = [index for index, batch in enumerate(alone) if name in batch.sides]
        firsts = np.cumsum([0, *sizes]) if name == "replay" else 2 * np.array(having)
        segments = [part.segment + int(first) for part, first in zip(parts, firsts, strict=False)]
        assert torch.equal(side.segment, torch.cat(segments))
        assert together.num_tokens_of[name] == [len(part.rows) for part in parts]
        assert together.visits_of[name] == [visits[index] for index in having]
        ids = [batch.tree.token_ids[batch.sides[name].rows] for batch in alone if name in batch.sides]
        assert torch.equal(together.tree.token_ids[side.rows], torch.cat(ids))


def test_masks_and_dropped_prompts_are_of_seed_pair_and_visit(shared_tiny_model, random_pairs):
    pairs = random_pairs(shared_tiny_model, 2)

    def packed(seed, pair, visit, **settings):
        config = TrainConfig(understanding_weight=0, condition_dropout=0.5, **settings)
        ids = PairPacker(shared_tiny_model, pairs, config, seed).pack([PairVisit(pair, visit)]).tree.token_ids
        return ids.tolist()

    assert packed(0, 1, 2) == packed(0, 1, 2)
    for other in ((1, 1, 2), (0, 1, 3)):
        masks = [
            [token == shared_tiny_model.layout.mask_id for token in packed(*draw)[-18:]] for draw in ((0, 1, 2), other)
        ]
        assert masks[0] != masks[1]


def test_condition_dropout_is_the_share_of_empty_prompts(shared_tiny_model, random_pairs):
    model = shared_tiny_model
    pairs, visits = random_pairs(model, 2), [PairVisit(1, visit) for visit in range(1000)]

    def trees(share):
        config = TrainConfig(condition_dropout=share, understanding_weight=0)
        packer = PairPacker(model, pairs, config, 0)
        return [packer.pack([visit]).tree for visit in visits]

    prompts = {share: [spans_of(tree, -1)[0] for tree in trees(share)] for share in (0.0, 0.1, 1.0)}
    empty, full = model.layout.text_prompt([]), model.layout.text_prompt(model.image_prompt("a red circle"))
    assert prompts[0.0] == [full] * 1000 and prompts[1.0] == [empty] * 1000
    dropped = prompts[0.1].count(empty)
    assert abs(dropped - 100) < 4 * math.sqrt(1000 * 0.1 * 0.9) and prompts[0.1].count(full) == 1000 - dropped
    # The masks do not depend on it.
    for plain, other in zip(trees(0.0)[:50], trees(1.0)[:50], strict=True):
        assert spans_of(plain, 0) == spans_of(other, 0)


class FixedDraws:
    """A generator that returns the values that it is given."""

    def __init__(self, time, order):
        self._time, self._order = time, order

    def random(self):
        return self._time

    def permutation(self, size):
        assert size == len(self._order)
        return np.array(self._order)


@pytest.mark.parametrize("num_codes", [1, 2, 16])
def test_every_second_mask_is_the_complement(num_codes):
    config = TrainConfig(masks_per_pair=6, complementary_masks=True)
    every = set(range(num_codes))
    for seed in range(30):
        masks = [set(mask.hidden.tolist()) for mask in draw_masks(num_codes, config, np.random.default_rng(seed))]
        assert len(masks) == 6
        for mask, complement in zip(masks[::2], masks[1::2], strict=True):
            assert complement == (every - mask or every)
    drawn = draw_masks(num_codes, config, FixedDraws(0.0, np.arange(num_codes)))
    assert all(set(mask.hidden.tolist()) == every for mask in drawn)


@pytest.mark.parametrize("num_codes", [1, 2, 3, 16, 1024])
def test_mask_count_probability(num_codes):
    """Against the shares of a fine grid of times, counted as masks are."""
    times = (np.arange(400_000) + 0.5) / 400_000
    counts = np.maximum(np.rint(np.cos(np.pi * times / 2) * num_codes), 1).astype(int)
    shares = np.bincount(counts, minlength=num_codes + 1)[1:] / len(times)
    probability = mask_count_probability(num_codes)
    assert probability == pytest.approx(shares, abs=5e-6) and probability.min() > 0
    assert probability.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "weight"),
    [
        (ONE_MASK, 1.0),
        ({"masks_per_pair": 4}, 0.25),
        ({"masks_per_pair": 4, "length_normalize": True}, 1.0),
        ({"masks_per_pair": 4, "loss_type": "simpo"}, 1.0),
    ],
    ids=["one", "four", "four, means over tokens", "four, simpo"],
)
def test_weights_without_the_bound(shared_tiny_model, random_pairs, settings, weight):
    config = TrainConfig(boundary_labels=True, **settings)
    batch = PairPacker(shared_tiny_model, random_pairs(shared_tiny_model, 1), config, 0).pack([PairVisit(0, 0)])
    assert set(batch.sides["generation"].token_weight.tolist()) == {weight}
    assert set(batch.sides["understanding"].token_weight.tolist()) == {1.0}


def times_by_count(num_codes):
    """The intervals of t that each count comes from, {count: (from, to)}, by bisection of the rounding itself."""

    def count(time):
        return max(round(math.cos(math.pi * time / 2) * num_codes), 1)

    edges = [0.0]
    for wanted in range(num_codes, 1, -1):
        low, high = edges[-1], 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if count(middle) >= wanted else (low, middle)
        edges.append(low)
    edges.append(1.0)
    return {num_codes - index: pair for index, pair in enumerate(itertools.pairwise(edges))}


@torch.no_grad()
@pytest.mark.parametrize("num_codes", [3, 4])
@pytest.mark.parametrize(
    "settings",
    [ONE_MASK, {"masks_per_pair": 2, "complementary_masks": True}, ONE_MASK | {"boundary_labels": True}],
    ids=["masks", "complements", "boundary labels"],
)
def test_elbo_weighting_is_unbiased(naive, tiny_model, random_pairs, monkeypatch, num_codes, settings):
    """Over all times and orders, with their probabilities, the packed sums' mean is the bound over all subsets."""
    model = small_images(tiny_model, num_codes)
    pairs, config = random_pairs(model, 1), TrainConfig(elbo_weighting=True, understanding_weight=0, **settings)
    packer = PairPacker(model, pairs, config, 0)
    orders, mean = list(itertools.permutations(range(num_codes))), np.zeros(2)
    for start, end in times_by_count(num_codes).values():
        for order in orders:
            masks = draw_masks(num_codes, config, FixedDraws((start + end) / 2, order))
            monkeypatch.setattr(packing, "draw_masks", lambda *_, masks=masks: masks)
            batch = packer.pack([PairVisit(0, 0)])
            logprob = batch_logprobs(model.transformer, batch) * batch.sides["generation"].token_weight
            sums = torch.zeros(2).index_add(0, batch.sides["generation"].segment, logprob)
            mean += (end - start) / len(orders) * sums.numpy()
    row = pairs.to_pylist()[0]
    for found, role in zip(mean, ("win", "lose"), strict=True):
        bound = 0.0
        for count, (start, end) in times_by_count(num_codes).items():
            subsets = list(itertools.combinations(range(num_codes), count))
            for hidden in subsets:
                condition = model.image_prompt(row["caption"])
                logprobs = image_logprobs(naive, model, condition, row[f"{role}_codes"], hidden)
                # Counts are uniform in the bound: (1 / N) * (N / k).
                bound += logprobs[1 + np.array(hidden)].sum().item() / count / len(subsets)
                if config.boundary_labels:
                    bound += (end - start) * logprobs[[0, -1]].sum().item() / len(subsets)
        assert found == pytest.approx(bound, rel=1e-5)


PLANS = {
    "nothing": ([], 10, 1),
    "one": ([3], 10, 1),
    "all in one": ([3, 3, 3], 10, 1),
    "even": ([2] * 7, 6, 1),
    "too large": ([25, 3, 3, 30, 3], 10, 1),
    "fewer items than processes": ([3, 4], 10, 8),
    "processes": ([3, 4, 5, 6, 7, 8, 9, 10, 1, 2], 10, 4),
    "each more than half": ([6] * 9, 10, 2),
    "hard to fill": ([5, 5, 4, 4, 3, 3, 3, 3], 15, 1),
    "random": (np.random.default_rng(0).integers(1, 100, size=500).tolist(), 250, 3),
    "many": (np.random.default_rng(0).integers(1000, 4000, size=12_000).tolist(), 16_384, 1),
    "many, six a pass": ([2600] * 12_000, 16_384, 8),
}


@pytest.mark.parametrize(("sizes", "budget", "multiple_of"), PLANS.values(), ids=PLANS.keys())
def test_plan_passes(monkeypatch, sizes, budget, multiple_of):
    fills, fill = [], packing._fill_passes
    monkeypatch.setattr(packing, "_fill_passes", lambda *args: fills.append(args) or fill(*args))
    passes = plan_passes(sizes, budget, multiple_of)
    assert len(fills) == 2
    assert sorted(item for items in passes for item in items) == list(range(len(sizes)))
    assert passes and len(passes) % multiple_of == 0
    loads = [sum(sizes[item] for item in items) for items in passes]
    assert all(load <= budget or len(items) == 1 for load, items in zip(loads, passes, strict=True))
    assert loads.count(0) < multiple_of or not sizes
    assert multiple_of > 1 or len(passes) == 1 or sum(sorted(loads)[:2]) > budget


@pytest.mark.parametrize(
    ("sizes", "budget", "loads"),
    [
        ([2] * 7, 6, [4, 4, 6]),
        ([3] * 10, 10, [6, 6, 9, 9]),
        ([1] * 9, 5, [4, 5]),
        ([7, 5, 4, 3, 3, 2], 12, [12, 12]),
        ([6, 6, 6, 1], 7, [6, 6, 7]),
    ],
)
def test_few_passes_are_even(sizes, budget, loads):
    assert sorted(sum(sizes[item] for item in items) for items in plan_passes(sizes, budget)) == loads


@pytest.mark.parametrize("num_processes", [1, 2, 8])
def test_processes_share_the_passes_out(shared_tiny_model, random_pairs, monkeypatch, num_processes):
    config = TrainConfig(pairs_per_step=16, tokens_per_pass=250, **ONE_MASK)
    packer = PairPacker(shared_tiny_model, random_pairs(shared_tiny_model, 5), config, 0)
    visits = packer.visits(0)
    assert len(visits) == 16
    monkeypatch.setattr(packing, "world_size", lambda: num_processes)
    passes = []
    for number in range(num_processes):
        monkeypatch.setattr(packing, "rank", lambda number=number: number)
        passes.append(packer.passes(visits))
    assert len({len(own) for own in passes}) == 1
    assert sorted(visit for own in passes for chosen, counts in own if counts for visit in chosen) == sorted(visits)
    for chosen, counts in itertools.chain(*passes):
        assert chosen and (counts or chosen == visits[:1])
        assert len(chosen) == 1 or sum(map(packer.num_tokens, chosen)) <= 250
    assert packer.passes([]) == []


def test_every_epoch_visits_every_pair_once(shared_tiny_model, random_pairs):
    packer = PairPacker(shared_tiny_model, random_pairs(shared_tiny_model, 10), TrainConfig(pairs_per_step=4), seed=1)
    seen = [visit for step in range(5) for visit in packer.visits(step)]
    assert [visit.visit for visit in seen] == [0] * 10 + [1] * 10
    first, second = ([visit.pair for visit in part] for part in (seen[:10], seen[10:]))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


CHANGES = {
    "caption": "a blue circle", "sides": "generation", "record_codes": [1] * 16, "win_codes": [2] * 16,
    "lose_codes": [3] * 16, "win_caption_ids": [4], "lose_caption_ids": [5, 6],
}  # fmt: skip


def other_tables(pairs):
    """The same pairs in tables whose buffers are cut up."""
    yield pa.concat_tables([pairs.slice(0, 2), pairs.slice(2)])
    yield pa.concat_tables([pairs, pairs]).slice(len(pairs))
    yield pa.concat_tables([pairs, pairs]).filter(pa.array([True, False] * len(pairs))).take([0, 3, 1, 4, 2])


def test_rows_of_any_table(shared_tiny_model, random_pairs):
    pairs = random_pairs(shared_tiny_model, 5, SIDES)
    packer = PairPacker(shared_tiny_model, pairs, TrainConfig(), 0)
    for table in other_tables(pairs):
        other = PairPacker(shared_tiny_model, table, TrainConfig(), 0)
        same = table["record_id"].to_pylist() == pairs["record_id"].to_pylist()
        assert (other.fingerprint() == packer.fingerprint()) == same
        for pair, row in enumerate(table.to_pylist()):
            for name in CHANGES.keys() - {"caption", "sides"}:
                assert other._tokens[name][pair].tolist() == (row[name] or [])


@pytest.mark.parametrize("name", CHANGES)
def test_fingerprint_sees_every_column(shared_tiny_model, random_pairs, name):
    rows = random_pairs(shared_tiny_model, 3).to_pylist()
    tables = [rows, [rows[0], rows[1] | {name: CHANGES[name]}, rows[2]]]
    one, other = (
        PairPacker(shared_tiny_model, pa.Table.from_pylist(table, PAIRS_SCHEMA), TrainConfig(), 0) for table in tables
    )
    assert one.fingerprint() != other.fingerprint()


def test_fingerprint_sees_where_rows_end_and_the_question(shared_tiny_model, random_pairs):
    rows = random_pairs(shared_tiny_model, 2).to_pylist()
    packers = []
    for first, second in (([4], [5, 6]), ([4, 5], [6])):
        table = [rows[0] | {"win_caption_ids": first}, rows[1] | {"win_caption_ids": second}]
        packers.append(PairPacker(shared_tiny_model, pa.Table.from_pylist(table, PAIRS_SCHEMA), TrainConfig(), 0))
    prints = {packer.fingerprint() for packer in packers}
    packers[0].question_ids = [*packers[0].question_ids, 3]
    assert len(prints | {packers[0].fingerprint()}) == 3


DRAWN_OTHERWISE = {
    "seed": ({}, 1),
    "sides": ({"understanding_weight": 0.0}, 0),
    "prompts": ({"condition_dropout": 0.1}, 0),
    "masks": ({"masks_per_pair": 2}, 0),
    "complementary masks": ({"complementary_masks": False}, 0),
    "replay": ({"replay_weight": 0.0}, 0),
    "boundaries": ({"boundary_labels": True}, 0),
}


def test_fingerprint_sees_how_passes_are_drawn(shared_tiny_model, random_pairs):
    pairs, ways = random_pairs(shared_tiny_model, 2), [({}, 0), *DRAWN_OTHERWISE.values()]
    packers = [PairPacker(shared_tiny_model, pairs, TrainConfig(**settings), seed) for settings, seed in ways]
    assert len({packer.fingerprint() for packer in packers}) == len(ways)
    same = TrainConfig(understanding_weight=0.5, lr=1.0, tokens_per_pass=100, beta=0.1)
    assert PairPacker(shared_tiny_model, pairs, same, 0).fingerprint() == packers[0].fingerprint()


def replayed_texts(model, batch):
    """(question, answer) of each answer that the replay predicts, in order."""
    side, tree, found = batch.sides["replay"], batch.tree, []
    ids = tree.token_ids
    for number in range(len(side.pair_weight)):
        mine = side.segment == number
        first, *rows = side.rows[mine].tolist()
        answer = side.targets[mine].tolist()
        assert answer.pop() == model.layout.eot and answer == ids[rows].tolist()
        question, span = (int(np.searchsorted(tree.packed_starts, row, "right")) - 1 for row in (first, rows[0]))
        assert tree.parents[span] == question and first == tree.span_rows(question).stop - 1
        prefix = ids[tree.span_rows(question)].tolist()
        assert prefix == model.layout.question(model.encode_text(model.decode_text(prefix)))
        found.append((model.decode_text(prefix), model.decode_text(answer)))
    return found


def test_replay_asks_each_visit_some_questions_about_the_real_image(shared_tiny_model, random_pairs, asked):
    model, config = shared_tiny_model, TrainConfig(replayed_questions=2, replay_target="answers", **ONE_MASK)
    packer = PairPacker(model, random_pairs(model, 5, ("both", "generation"), asked), config, 0)
    seen = set()
    for number in range(8):
        for pair, count in enumerate((0, 1, 2, 2, 2)):  # pair k has k questions, of which two are asked
            visit = PairVisit(pair, number)
            batch = packer.pack([visit])
            assert packer.num_tokens(visit) == len(batch.tree.token_ids)
            assert ("replay" in batch.sides) == ("replay" in packer.num_pairs([visit])) == bool(count)
            if not count:
                continue
            texts = replayed_texts(model, batch)
            assert len(texts) == count and set(texts) <= set(asked[:pair])
            seen.update(texts if pair == 4 else ())
            row = packer.pairs.slice(pair, 1).to_pylist()[0]
            parents = {int(batch.tree.parents[span]) for span in range(batch.tree.num_spans)}
            prefixes = [batch.tree.token_ids[batch.tree.span_rows(span)].tolist() for span in parents if span >= 0]
            assert model.layout.image_prefix(row["record_codes"]) in prefixes
            again = packer.pack([visit])
            assert torch.equal(again.tree.token_ids, batch.tree.token_ids)
    assert seen == set(asked)  # in turn


def test_replay_predicts_choices_that_are_one_to_the_model_once(shared_tiny_model, random_pairs, asked):
    model, config = shared_tiny_model, TrainConfig(replayed_questions=1, replay_target="reference", **ONE_MASK)
    rows = random_pairs(model, 2, asked=asked[:1]).to_pylist()
    rows[1]["choices"] = [["blue", "RED", "red", "blue "]]
    packer = PairPacker(model, pa.Table.from_pylist(rows, PAIRS_SCHEMA), config, 0)
    assert [answer for _, answer in replayed_texts(model, packer.pack([PairVisit(1, 0)]))] == ["blue", "red"]


def test_replay_asks_other_questions_at_other_visits_and_with_other_seeds(shared_tiny_model, random_pairs, asked):
    pairs = random_pairs(shared_tiny_model, 5, asked=asked)

    def drawn(seed, visit, count=2):
        config = TrainConfig(replayed_questions=count, replay_target="answers")
        packer = PairPacker(shared_tiny_model, pairs, config, seed)
        return tuple(replayed_texts(shared_tiny_model, packer.pack([PairVisit(4, visit)])))

    assert drawn(0, 0) == drawn(0, 0)
    assert len({drawn(0, visit) for visit in range(8)}) > 2 < len({drawn(seed, 0) for seed in range(8)})
    assert [len(drawn(0, 0, count)) for count in (1, 3, 4, 9)] == [1, 3, 4, 4]
    assert sorted(drawn(0, 0, 9)) == sorted(asked)
    assert drawn(0, 0, 9)[:2] == drawn(0, 0)


def test_a_reference_is_asked_for_every_choice(shared_tiny_model, random_pairs, asked):
    """Questions weigh alike, however many choices they have; without choices the right answer is asked for alone."""
    model, config = shared_tiny_model, TrainConfig(replayed_questions=3)
    pairs = random_pairs(model, 4, asked=asked)
    batch = PairPacker(model, pairs, config, 0).pack([PairVisit(3, 0)])
    row = pairs.to_pylist()[3]
    asked_for = zip(row["questions"], row["choices"], strict=True)
    every = [(text, choice) for text, choices in asked_for for choice in choices]
    assert sorted(replayed_texts(model, batch)) == sorted(every) and len(every) == 7
    assert batch.sides["replay"].pair_weight.tolist() == pytest.approx([1 / 3] * 7)
    bare = pa.Table.from_pylist([row | {"choices": None}], PAIRS_SCHEMA)
    check_pairs(bare, model)
    texts = replayed_texts(model, PairPacker(model, bare, config, 0).pack([PairVisit(0, 0)]))
    assert sorted(texts) == sorted(zip(row["questions"], row["answers"], strict=True))


def test_pairs_without_questions_have_no_replay(shared_tiny_model, random_pairs):
    rows = random_pairs(shared_tiny_model, 2).to_pylist()
    for none in (None, []):
        rows[1] |= {"questions": none, "answers": none, "choices": none}
        table = pa.Table.from_pylist(rows, PAIRS_SCHEMA)
        check_pairs(table, shared_tiny_model)
        with_replay, without = (
            PairPacker(shared_tiny_model, table, TrainConfig(replay_weight=weight), 0) for weight in (0.3, 0.0)
        )
        visits = [PairVisit(0, 0), PairVisit(1, 0)]
        assert list(with_replay.num_pairs(visits)) == ["generation", "understanding"]
        batch, expected = with_replay.pack(visits), without.pack(visits)
        assert list(batch.sides) == ["generation", "understanding"]
        assert torch.equal(batch.tree.token_ids, expected.tree.token_ids)
        assert [with_replay.num_tokens(visit) for visit in visits] == [without.num_tokens(visit) for visit in visits]


def test_replay_needs_the_real_image(shared_tiny_model, random_pairs, asked):
    rows = random_pairs(shared_tiny_model, 2, ("generation",), asked).to_pylist()
    rows[1]["record_codes"] = None
    with pytest.raises(InputError, match="record r1: record_codes is missing, which sides 'generation' needs"):
        check_pairs(pa.Table.from_pylist(rows, PAIRS_SCHEMA), shared_tiny_model)
    rows[1]["questions"] = rows[1]["answers"] = rows[1]["choices"] = None
    check_pairs(pa.Table.from_pylist(rows, PAIRS_SCHEMA), shared_tiny_model)


def test_only_the_named_sides_are_packed(shared_tiny_model, random_pairs, asked):
    whole = PairPacker(shared_tiny_model, random_pairs(shared_tiny_model, 2, asked=asked), TrainConfig(), 0)
    visit, every = PairVisit(1, 0), ("generation", "understanding", "replay")
    assert list(whole.pack([visit]).sides) == list(every)
    for count in (1, 2, 3):
        for sides in itertools.combinations(every, count):
            packer = whole.only(*sides)
            batch = packer.pack([visit])
            assert list(batch.sides) == list(packer.num_pairs([visit])) == list(sides)
            assert packer.num_tokens(visit) == len(batch.tree.token_ids)
    assert list(whole.pack([visit]).sides) == list(every)


def test_replay_leaves_the_pairs_as_they_are(shared_tiny_model, random_pairs, asked):
    pairs, visits = random_pairs(shared_tiny_model, 3, SIDES, asked), [PairVisit(pair, 0) for pair in range(3)]
    whole, without = (
        PairPacker(shared_tiny_model, pairs, TrainConfig(replay_weight=weight), 0) for weight in (0.3, 0.0)
    )
    for packer in (whole.only("generation", "understanding"), without):
        batch, expected = packer.pack(visits), whole.pack(visits)
        assert list(batch.sides) == ["generation", "understanding"] == list(expected.sides)[:2]
        for side in batch.sides:
            for name in ("targets", "segment", "token_weight"):
                assert torch.equal(getattr(batch.sides[side], name), getattr(expected.sides[side], name))


STRANGE = {
    "another codebook": ("win_codes", [32] * 16, "win_codes holds 32, the model's codebook has 32"),
    "below 0": ("record_codes", [-1] * 16, "record_codes holds -1, the model's codebook has 32"),
    "an empty entry": ("record_codes", [None] * 16, "record_codes holds None, the model's codebook has 32"),
    "too few codes": ("lose_codes", [0] * 4, "lose_codes has 4 tokens, the model's image 16 at model.image_size 64"),
    "another tokenizer": ("win_caption_ids", [10**6], r"win_caption_ids holds 1000000, .* text vocabulary has \d+"),
    "a missing column": ("lose_caption_ids", None, "lose_caption_ids is missing, which sides 'both' needs"),
    "an unknown word": ("caption", "a unicorn", "the model does not know the word 'unicorn' in 'a unicorn'"),
    "no caption": ("caption", None, "caption is missing, which sides 'both' needs"),
    "answers without questions": ("questions", None, "questions and answers do not match: there are 0 and 1"),
    "questions without answers": ("answers", None, "questions and answers do not match: there are 1 and 0"),
    "one answer too many": ("answers", ["red", "two"], "questions and answers do not match: there are 1 and 2"),
    "an empty question": ("questions", [None], "questions and answers do not match: there are 1 and 1"),
    "an empty answer": ("answers", [None], "questions and answers do not match: there are 1 and 1"),
    "an unknown word in a question": (
        "questions", ["is a unicorn there ?"], r"the model does not know the word 'unicorn' in 'is a unicorn there \?'"
    ),
    "an unknown word in an answer": ("answers", ["unicorn"], "the model does not know the word 'unicorn' in 'unicorn'"),
    "choices without the answer": ("choices", [["blue"]], "choices do not match: .*, which holds its answer"),
    "choices of more questions": ("choices", [["red"], ["two"]], "choices do not match: .*, which holds its answer"),
    "an empty choice": ("choices", [["red", None]], "choices do not match: .*, which holds its answer"),
    "no list of choices": ("choices", [None], "choices do not match: .*, which holds its answer"),
    "an unknown word in a choice": ("choices", [["red", "unicorn"]], "the model does not know .* 'unicorn' in .*"),
    "ids that spell another caption": (
        "win_caption", "a red circle", "win_caption_ids spells '.*', not 'a red circle'"
    ),
    "an unknown side": ("sides", "neither", "sides is 'neither', expected both, generation or understanding"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "value", "message"), STRANGE.values(), ids=STRANGE.keys())
def test_pairs_of_another_model_are_told(shared_tiny_model, random_pairs, asked, name, value, message):
    rows = random_pairs(shared_tiny_model, 3, asked=asked).to_pylist()
    rows[1] |= {name: value} | ({"choices": None} if name in ("questions", "answers") else {})
    with pytest.raises(InputError, match=f"record r1: {message}; give pairs that this model drew"):
        check_pairs(pa.Table.from_pylist(rows, PAIRS_SCHEMA), shared_tiny_model)


def test_a_side_that_a_pair_lacks_is_not_asked_for(shared_tiny_model, random_pairs):
    check_pairs(random_pairs(shared_tiny_model, 6, ("both", "generation", "understanding")), shared_tiny_model)


def test_a_side_that_a_pair_does_not_have_may_hold_anything(tiny_model, random_pairs):
    rows = random_pairs(tiny_model, 3, SIDES).to_pylist()
    plain = pa.Table.from_pylist(rows, PAIRS_SCHEMA)
    rows[1]["win_caption_ids"] = [None, 10**6]
    strange = pa.Table.from_pylist(rows, PAIRS_SCHEMA)
    check_pairs(strange, tiny_model)
    visits = [PairVisit(pair, 0) for pair in range(3)]
    packed = [PairPacker(tiny_model, table, TrainConfig(), 0).pack(visits) for table in (plain, strange)]
    assert torch.equal(packed[0].tree.token_ids, packed[1].tree.token_ids)
    assert torch.equal(packed[0].targets, packed[1].targets)
