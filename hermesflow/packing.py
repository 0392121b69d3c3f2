"""Pairs as packed span trees: what a pass of Pair-DPO computes, and what each side must predict in it.

    generation      prompt -> win image, lose image (once a mask, which both share)
    understanding   image -> question -> win caption, lose caption
    replay          image -> questions with their right answers

Each token is stored and computed once; there are no pads. Masks and dropped prompts are pure functions of the seed, of
the pair and of its visit (how often it was trained on before), so that a resumed run and a cached reference meet the
same ones.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from hermesflow.engine.mask_schedule import mask_ratio
from hermesflow.engine.span_tree import Span, SpanTree

from .config import TrainConfig
from .distributed import rank, world_size
from .files import InputError
from .models import Model
from .pairs import SIDES, each_row
from .prompting import answer_ids, caption_prompt, image_prompt, question_prompt

REPLAY = "replay"
"""What is learnt beside the two sides of a pair: it has no lose and no reference."""
_COLUMNS = {
    "generation": ("win_codes", "lose_codes"),
    "understanding": ("record_codes", "win_caption_ids", "lose_caption_ids"),
}
# The settings that change what a visit's tokens are and which of them it must predict.
_DRAWN_BY = ("condition_dropout", "masks_per_pair", "complementary_masks", "boundary_labels")


class PairVisit(NamedTuple):
    """A pair of the table at one of its turns."""

    pair: int
    visit: int


@dataclass(frozen=True)
class Side:
    """What one side of a pass must predict; tokens lie pair after pair.

    rows, targets: int64 [T], packed rows of the tree and the token ids that they predict.
    segment: int64 [T], 2 p for the win tokens of pair p, 2 p + 1 for its lose tokens.
    token_weight: fp32 [T], of each log-probability in its pair's sum.
    pair_weight: fp32 [P], 1 for the pairs that have this side, else 0.
    """

    rows: Tensor
    targets: Tensor
    segment: Tensor
    token_weight: Tensor
    pair_weight: Tensor


@dataclass(frozen=True)
class PairBatch:
    """One pass: the forest of its pairs and what each side predicts in it; sides without tokens are left out.

    visits_of: by side, the visits that have it; on the host, so that nothing waits for the device.
    """

    visits: Sequence[PairVisit]
    tree: SpanTree
    sides: dict[str, Side]
    visits_of: dict[str, list[PairVisit]]

    @property
    def num_pairs(self) -> int:
        """P."""
        return len(self.visits)

    @property
    def rows(self) -> Tensor:
        """Rows of all sides, int64 [T], in the order of `sides`."""
        return torch.cat([side.rows for side in self.sides.values()])

    @property
    def targets(self) -> Tensor:
        """Targets of all sides, int64 [T]."""
        return torch.cat([side.targets for side in self.sides.values()])

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Values [T] of all sides, side by side."""
        parts = values.split([len(side.rows) for side in self.sides.values()])
        return dict(zip(self.sides, parts, strict=True))


class ImageMask(NamedTuple):
    """What one mask hides of an image.

    hidden: int64 [k], positions in ascending order.
    weight: of each hidden token's log-probability.
    """

    hidden: np.ndarray
    weight: float


class PairPacker:
    """Makes the passes of a training run from a table of pairs."""

    def __init__(self, model: Model, pairs: pa.Table, config: TrainConfig, seed: int) -> None:
        """
        Args:
            model: its layout, text tokenizer and prompts are used.
            pairs: a table of hermesflow.pairs, which check_pairs and trained_pairs have seen.
            config: how masks are drawn and what is scored; a side of weight 0 is not packed.
            seed: of masks, dropped prompts and the order of pairs.
        """
        self.model, self.pairs, self.config, self.seed = model, pairs, config, seed
        self._packed_sides = _trained_sides(config) + ([REPLAY] if config.replay_weight else [])
        self.question_ids = caption_prompt(model)
        self._captions, self._sides = pairs["caption"].to_pylist(), pairs["sides"].to_pylist()
        self._tokens = {name: _token_rows(pairs[name]) for side in SIDES for name in _COLUMNS[side]}
        self._prompt = functools.cache(lambda text: model.layout.text_prompt(image_prompt(model, text)))
        self._questions, self._answers = (pairs[name].to_pylist() for name in ("questions", "answers"))
        self._asked = functools.cache(lambda question, answer: answered_question(model, question, answer))

    def only(self, *sides: str) -> PairPacker:
        """The same packer, which leaves out all but these sides of every pair."""
        packer = copy.copy(self)
        packer._packed_sides = [name for name in self._packed_sides if name in sides]
        return packer

    def visits(self, step: int) -> list[PairVisit]:
        """The pairs of a step: consecutive entries of an endless row of shuffled epochs."""
        num_pairs, count = len(self.pairs), self.config.pairs_per_step
        positions = range(step * count, (step + 1) * count)
        epochs = {position // num_pairs for position in positions}
        order = {epoch: np.random.default_rng([self.seed, 0, epoch]).permutation(num_pairs) for epoch in epochs}
        return [
            PairVisit(int(order[position // num_pairs][position % num_pairs]), position // num_pairs)
            for position in positions
        ]

    def passes(self, visits: Sequence[PairVisit]) -> list[tuple[list[PairVisit], bool]]:
        """This process's passes over all processes' visits, and whether each counts.

        Each holds config.tokens_per_pass tokens at most, or one visit. All processes have equally many, since they go
        through sharded layers together: one that has less to do takes a pass that does not count.
        """
        if not visits:
            return []
        sizes = [self.num_tokens(visit) for visit in visits]
        plan = plan_passes(sizes, self.config.tokens_per_pass, world_size())[rank() :: world_size()]
        return [([visits[item] for item in items] or [visits[0]], bool(items)) for items in plan]

    def num_tokens(self, visit: PairVisit) -> int:
        """Packed tokens of a visit."""
        layout, sides, total = self.model.layout, self._sides_of(visit.pair), 0
        lengths = {name: len(rows[visit.pair]) for name, rows in self._tokens.items()}
        if "generation" in sides:
            images = 2 * len(layout.image(())) + lengths["win_codes"] + lengths["lose_codes"]
            total += len(self._prompt_of(visit)) + self.config.masks_per_pair * images
        if "understanding" in sides or REPLAY in sides:
            total += len(layout.image_prefix(())) + lengths["record_codes"]
        if "understanding" in sides:
            total += len(layout.question(self.question_ids))
            total += lengths["win_caption_ids"] + lengths["lose_caption_ids"]
        if REPLAY in sides:
            total += sum(len(prefix) + len(answer) for prefix, answer in self._replayed(visit))
        return total

    def pack(self, visits: Sequence[PairVisit], device: torch.device | str | None = None) -> PairBatch:
        """One pass over these visits; device None is the CPU."""
        builder = _ForestBuilder()
        for index, visit in enumerate(visits):
            sides = self._sides_of(visit.pair)
            if "generation" in sides:
                self._add_images(builder, index, visit)
            if "understanding" in sides or REPLAY in sides:
                prefix = self.model.layout.image_prefix(self._tokens["record_codes"][visit.pair])
                image = builder.add(prefix, -1, "full")
            if "understanding" in sides:
                self._add_captions(builder, index, visit.pair, image)
            if REPLAY in sides:
                self._add_answers(builder, index, visit, image)
        return builder.build(visits, device)

    def fingerprint(self) -> str:
        """Of all that the visits' passes depend on: the pairs' tokens, what is asked, the seed and the settings."""
        drawn_by = [getattr(self.config, name) for name in _DRAWN_BY]
        texts = [self.question_ids, self._captions, self._sides, self._packed_sides, self.seed, drawn_by]
        digest = hashlib.blake2b(json.dumps(texts).encode(), digest_size=16)
        for rows in self._tokens.values():
            digest.update(np.array([len(row) for row in rows], dtype=np.int32))
            for row in rows:
                digest.update(row.astype(np.int32))
        return digest.hexdigest()

    def num_pairs(self, visits: Iterable[PairVisit]) -> dict[str, int]:
        """How many of the visits have each side; sides that are not packed and sides that none has are left out."""
        found = Counter(side for visit in visits for side in self._sides_of(visit.pair))
        return {side: found[side] for side in (*SIDES, REPLAY) if found[side]}

    def _sides_of(self, pair: int) -> list[str]:
        """Those of the pair's sides that are packed, and the replay if it has questions."""
        has = ["generation", "understanding"] if self._sides[pair] == "both" else [self._sides[pair]]
        has += [REPLAY] if self._questions[pair] else []
        return [side for side in self._packed_sides if side in has]

    def _replayed(self, visit: PairVisit) -> list[tuple[list[int], list[int]]]:
        """Questions about the real image in the model's layout, with their answers."""
        questions, answers = self._questions[visit.pair], self._answers[visit.pair]
        order = np.random.default_rng([self.seed, 4, *visit]).permutation(len(questions))
        return [self._asked(questions[number], answers[number]) for number in order[: self.config.replayed_questions]]

    def _prompt_of(self, visit: PairVisit) -> list[int]:
        """The condition that win and lose share: the caption, or the empty text."""
        # A stream of its own, so that the masks stay the same.
        is_dropped = np.random.default_rng([self.seed, 3, *visit]).random() < self.config.condition_dropout
        return self._prompt("" if is_dropped else self._captions[visit.pair])

    def _add_images(self, builder: _ForestBuilder, index: int, visit: PairVisit) -> None:
        layout, config = self.model.layout, self.config
        rng = np.random.default_rng([self.seed, 1, *visit])
        prompt = builder.add(self._prompt_of(visit), -1, "causal")
        images = [np.array(layout.image(self._tokens[name][visit.pair])) for name in ("win_codes", "lose_codes")]
        last = len(images[0]) - 1
        for hidden, weight in draw_masks(last - 1, config, rng):
            rows, weights = 1 + hidden, np.full(len(hidden), weight)
            if config.boundary_labels:
                rows = np.concatenate([[0], rows, [last]])
                weights = np.pad(weights, 1, constant_values=_mask_share(config))
            for lose, image in enumerate(images):
                builder.predict("generation", 2 * index + lose, rows, image[rows], weights)
                masked = image.copy()
                masked[1 + hidden] = layout.mask_id
                builder.add(masked, prompt, "full")

    def _add_captions(self, builder: _ForestBuilder, index: int, pair: int, image: int) -> None:
        """Next tokens, and eot where a caption ended by itself."""
        layout = self.model.layout
        question = builder.add(layout.question(self.question_ids), image, "causal")
        last_of_question = builder.packed - 1
        for lose, name in enumerate(("win_caption_ids", "lose_caption_ids")):
            caption = self._tokens[name][pair]
            targets = np.append(caption, layout.eot)[: self.model.prompts.max_caption_tokens]
            rows = np.append(last_of_question - builder.packed, np.arange(len(caption)))[: len(targets)]
            builder.predict("understanding", 2 * index + lose, rows, targets, np.ones(len(targets)))
            if len(caption):
                builder.add(caption, question, "causal")

    def _add_answers(self, builder: _ForestBuilder, index: int, visit: PairVisit, image: int) -> None:
        """Next tokens of the right answers, and eot."""
        for prefix, answer in self._replayed(visit):
            targets = np.array([*answer, self.model.layout.eot])
            rows = len(prefix) - 1 + np.arange(len(targets))
            builder.predict(REPLAY, 2 * index, rows, targets, np.ones(len(targets)))
            builder.add([*prefix, *answer], image, "causal")


def answered_question(model: Model, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of a question in the model's layout, and of its answer. Raises: InputError on an unknown word."""
    return model.layout.question(question_prompt(model, question)), answer_ids(model, answer)


def check_pairs(pairs: pa.Table, model: Model) -> None:
    """Raise InputError, which names the record, unless what the pairs' sides need is there and can be this model's."""
    for row in each_row(pairs):
        try:
            _check_row(row, model)
        except ValueError as error:
            reason = str(error).partition("; ")[0]
            raise InputError(
                f"record {row['record_id']}: {reason}; give pairs that this model drew, or the model that drew them"
            ) from error


def _check_row(row: dict, model: Model) -> None:
    layout, sides = model.layout, row["sides"]
    if sides not in ("both", *SIDES):
        raise ValueError(f"sides is {sides!r}, expected both, {' or '.join(SIDES)}")
    needed = [name for side in SIDES if sides in ("both", side) for name in _COLUMNS[side]]
    if sides != "understanding":
        needed.append("caption")
    if row["questions"] and "record_codes" not in needed:  # the replay asks about the real image
        needed.append("record_codes")
    for name in needed:
        if row[name] is None:
            raise ValueError(f"{name} is missing, which sides {sides!r} needs")
        if name == "caption":
            model.encode_text(row[name])
        elif name.endswith("_codes"):
            if len(row[name]) != layout.num_image_tokens:
                raise ValueError(f"{name} has {len(row[name])} tokens, the model's image {layout.num_image_tokens}")
            _check_range(name, row[name], layout.codebook_size, "codebook")
        else:
            _check_range(name, row[name], layout.text_vocab_size, "text vocabulary")
    questions, answers = row["questions"] or [], row["answers"] or []
    if len(questions) != len(answers) or None in (*questions, *answers):
        raise ValueError(f"questions and answers do not match: there are {len(questions)} and {len(answers)}")
    for question, answer in zip(questions, answers, strict=True):
        answered_question(model, question, answer)


def _check_range(name: str, ids: list[int | None], size: int, what: str) -> None:
    for token in ids:
        if token is None or not 0 <= token < size:
            raise ValueError(f"{name} holds {token}, the model's {what} has {size}")


def trained_pairs(pairs: pa.Table, config: TrainConfig) -> pa.Table:
    """The pairs that have a side of weight above 0, in the table's order.

    Raises: InputError if there are pairs, but none of them has one.
    """
    sides = _trained_sides(config)
    kept = pairs.filter(pc.is_in(pairs["sides"], pa.array(["both", *sides])))
    if len(pairs) and not len(kept):
        (missing,) = set(SIDES) - set(sides)
        raise InputError(
            f"no pairs to train on: all {len(pairs)} have the {missing} side alone, and train.{missing}_weight is 0; "
            "raise it, or take other pairs"
        )
    return kept


def draw_masks(num_codes: int, config: TrainConfig, rng: np.random.Generator) -> list[ImageMask]:
    """The masks of one visit of a pair of images.

    A mask hides the cosine schedule's share of the image at a uniform time. The weighted log-probabilities of what all
    masks hide add up to the image's: to the mean of the masks' sums, or with elbo_weighting to an unbiased estimate of
    the evidence lower bound of decoding in any order, which is the sum over k = 1..N of
    (1 / k) E[sum over k hidden tokens, drawn uniformly]: a mask that hides k with probability P(k) weighs 1 / (k P(k)).

    Args:
        num_codes: N, tokens of an image.
        config: masks_per_pair, complementary_masks and elbo_weighting are used, and whether tokens are averaged.
        rng: the visit's.
    Returns: masks_per_pair masks. Of complementary ones every second hides what the one before it shows, or all where
        that one shows nothing; it comes with the probability of the one before it.
    Source: MaskGIT (arXiv 2202.04200), section 3.3, for the schedule; autoregressive diffusion (arXiv 2110.02037),
        section 3, for the bound.
    """
    probability, masks = mask_count_probability(num_codes), []
    for _ in range(config.masks_per_pair // (2 if config.complementary_masks else 1)):
        ratio = mask_ratio(torch.tensor(rng.random(), dtype=torch.float64), "cosine").item()
        order, count = rng.permutation(num_codes), max(round(ratio * num_codes), 1)
        for part in (order[:count], order[count:])[: 2 if config.complementary_masks else 1]:
            hidden = np.sort(part if len(part) else order)
            weight = 1 / (len(hidden) * probability[count - 1]) if config.elbo_weighting else 1.0
            masks.append(ImageMask(hidden, weight * _mask_share(config)))
    return masks


def mask_count_probability(num_codes: int) -> np.ndarray:
    """Probability fp64 [N] that a mask at a uniform time hides 1, ..., N tokens: max(round(cos(pi t / 2) N), 1)."""
    # The times at which the rounded count falls below k.
    least = np.arange(1, num_codes + 1) - 0.5
    until = np.arccos(least / num_codes) * 2 / np.pi
    until[0] = 1.0
    return until - np.append(until[1:], 0.0)


def plan_passes(sizes: Sequence[int], budget: int, multiple_of: int = 1) -> list[list[int]]:
    """Shares the items of a step out among few passes, evenly.

    Args:
        sizes: tokens of each item.
        budget: the most tokens of a pass; an item that is larger makes one by itself.
        multiple_of: the number of passes is a multiple of this, of processes that work side by side.
    Returns: item numbers of each pass; some are empty where there are more passes than items.
    """
    least = -(-sum(min(size, budget) for size in sizes) // budget) or 1
    passes = _fill_passes(sizes, budget, least, multiple_of)
    # Passes that were opened late hold small items alone; open from the start, as many may come out even.
    even = _fill_passes(sizes, budget, len(passes), multiple_of)
    return even if len(even) == len(passes) else passes


def _fill_passes(sizes: Sequence[int], budget: int, count: int, multiple_of: int) -> list[list[int]]:
    """The largest items first, each into the emptiest pass; where it has no room there, more passes are opened."""
    count += -count % multiple_of
    passes: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        if loads[0][0] and loads[0][0] + sizes[item] > budget:
            for number in range(len(passes), len(passes) + multiple_of):
                passes.append([])
                heapq.heappush(loads, (0, number))
        load, number = loads[0]
        passes[number].append(item)
        heapq.heapreplace(loads, (load + sizes[item], number))
    return [sorted(items) for items in passes]


def _trained_sides(config: TrainConfig) -> list[str]:
    return [side for side in SIDES if getattr(config, f"{side}_weight")]


def _mask_share(config: TrainConfig) -> float:
    """Of one mask in an image's log-probability; a mean over all masks' tokens needs no weights."""
    return 1.0 if config.length_normalize or config.loss_type == "simpo" else 1 / config.masks_per_pair


def _token_rows(column: pa.ChunkedArray) -> list[np.ndarray]:
    """A column of token ids, a view a row; empty where it is null."""
    lists = column.combine_chunks()
    offsets = lists.offsets.to_numpy()
    # Sides that a pair does not have may hold anything.
    return np.split(pc.fill_null(lists.values, 0).to_numpy()[: offsets[-1]], offsets[:-1])[1:]


class _ForestBuilder:
    """Collects spans and, side by side, what they must predict."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.packed = 0
        self._found: dict[str, list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]] = {
            side: [] for side in (*SIDES, REPLAY)
        }

    def add(self, ids: Sequence[int], parent: int, mode: str) -> int:
        """Appends a span; returns its index."""
        self.spans.append((ids, parent, mode))
        self.packed += len(ids)
        return len(self.spans) - 1

    def predict(self, side: str, segment: int, offsets: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> None:
        """The rows at these offsets from the next span's first token predict targets, as part of a segment."""
        found = (segment, self.packed + offsets, targets.astype(np.int64), weights.astype(np.float32))
        self._found[side].append(found)

    def build(self, visits: Sequence[PairVisit], device: torch.device | str | None) -> PairBatch:
        """The finished batch."""
        found = {side: parts for side, parts in self._found.items() if parts}
        sides = {side: self._side(parts, len(visits), device) for side, parts in found.items()}
        visits_of = {
            side: [visits[pair] for pair in sorted({segment // 2 for segment, *_ in parts})]
            for side, parts in found.items()
        }
        return PairBatch(tuple(visits), SpanTree.build(self.spans, device), sides, visits_of)

    def _side(self, found: list, num_pairs: int, device: torch.device | str | None) -> Side:
        numbers, rows, targets, weights = zip(*found, strict=True)
        pair_weight = np.zeros(num_pairs, dtype=np.float32)
        pair_weight[np.array(numbers) // 2] = 1.0
        segment = np.repeat(np.array(numbers, dtype=np.int64), [len(part) for part in rows])
        arrays = (np.concatenate(rows), np.concatenate(targets), segment, np.concatenate(weights), pair_weight)
        return Side(*(torch.from_numpy(array).to(device) for array in arrays))
