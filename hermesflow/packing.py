"""Pairs as packed span trees: what a pass of Pair-DPO computes, and what each side must predict in it.

    generation      prompt -> win image, lose image (once a mask, which both share)
    understanding   image -> question -> win caption, lose caption

Each token is stored and computed once; there are no pads. Masks and dropped prompts are pure functions of the seed, of
the pair and of its visit (how often it was trained on before), so that a resumed run and a cached reference meet the
same ones.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from hermesflow.engine.mask_schedule import mask_ratio
from hermesflow.engine.span_tree import Span, SpanTree

from .config import TrainConfig
from .distributed import rank, world_size
from .models import Model
from .pairs import SIDES
from .prompting import caption_prompt, image_prompt


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
    """One pass: the forest of its pairs and what each side predicts in it; sides without tokens are left out."""

    visits: Sequence[PairVisit]
    tree: SpanTree
    sides: dict[str, Side]

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

    def visits_of(self, side: str) -> list[PairVisit]:
        """The visits that have this side."""
        has_side = self.sides[side].pair_weight.tolist()
        return [visit for visit, weight in zip(self.visits, has_side, strict=True) if weight]

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Values [T] of all sides, side by side."""
        parts = values.split([len(side.rows) for side in self.sides.values()])
        return dict(zip(self.sides, parts, strict=True))


class PairPacker:
    """Makes the passes of a training run from a table of pairs."""

    def __init__(self, model: Model, pairs: pa.Table, config: TrainConfig, seed: int) -> None:
        """
        Args:
            model: its layout, text tokenizer and prompts are used.
            pairs: a table of hermesflow.pairs.
            config: how masks are drawn and what is scored; a side of weight 0 is not packed.
            seed: of masks, dropped prompts and the order of pairs.
        """
        self.model, self.pairs, self.config, self.seed = model, pairs, config, seed
        self.question_ids = caption_prompt(model)

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
        return len(self.pack([visit]).tree.token_ids)

    def pack(self, visits: Sequence[PairVisit], device: torch.device | str | None = None) -> PairBatch:
        """One pass over these visits; device None is the CPU."""
        builder = _ForestBuilder()
        for index, visit in enumerate(visits):
            pair = self._row(visit.pair)
            if pair["sides"] != "understanding" and self.config.generation_weight:
                self._add_images(builder, index, pair, np.random.default_rng([self.seed, 1, *visit]))
            if pair["sides"] != "generation" and self.config.understanding_weight:
                self._add_captions(builder, index, pair)
        return builder.build(visits, device)

    def fingerprint(self) -> str:
        """Of the pairs' tokens and of what is asked."""
        digest = hashlib.blake2b(json.dumps(self.question_ids).encode(), digest_size=16)
        columns = ("win_codes", "lose_codes", "win_caption_ids", "lose_caption_ids")
        for name in ("caption", "sides", "record_codes", *columns):
            digest.update(json.dumps(self.pairs[name].to_pylist()).encode())
        return digest.hexdigest()

    def num_pairs(self, visits: Iterable[PairVisit]) -> dict[str, int]:
        """How many of the visits have each side; sides of weight 0 and sides that none has are left out."""
        found = [self.pairs["sides"][visit.pair].as_py() for visit in visits]
        counts = {side: sum(sides in ("both", side) for sides in found) for side in SIDES}
        weights = {side: getattr(self.config, f"{side}_weight") for side in SIDES}
        return {side: count for side, count in counts.items() if count and weights[side]}

    def _row(self, pair: int) -> dict:
        return self.pairs.slice(pair, 1).to_pylist()[0]

    def _add_images(self, builder: _ForestBuilder, index: int, pair: dict, rng: np.random.Generator) -> None:
        layout = self.model.layout
        root = builder.add(layout.text_prompt(image_prompt(self.model, pair["caption"])), -1, "causal")
        num_codes = len(pair["win_codes"])
        ratio = mask_ratio(torch.tensor(rng.random(), dtype=torch.float64), "cosine").item()
        masked = np.sort(rng.permutation(num_codes)[: max(round(ratio * num_codes), 1)])
        for lose, name in enumerate(("win_codes", "lose_codes")):
            ids = np.array(layout.image(pair[name]))
            targets = ids[1 + masked]
            ids[1 + masked] = layout.mask_id
            builder.predict("generation", 2 * index + lose, 1 + masked, targets)
            builder.add(ids.tolist(), root, "full")

    def _add_captions(self, builder: _ForestBuilder, index: int, pair: dict) -> None:
        """Next tokens, and eot where a caption ended by itself."""
        layout = self.model.layout
        image = builder.add(layout.image_prefix(pair["record_codes"]), -1, "full")
        question = builder.add(layout.question(self.question_ids), image, "causal")
        last_of_question = builder.packed - 1
        for lose, name in enumerate(("win_caption_ids", "lose_caption_ids")):
            caption = list(pair[name])
            targets = [*caption, layout.eot][: self.model.prompts.max_caption_tokens]
            rows = np.concatenate([[last_of_question - builder.packed], np.arange(len(caption))]).astype(np.int64)
            builder.predict("understanding", 2 * index + lose, rows[: len(targets)], targets)
            if caption:
                builder.add(caption, question, "causal")


def plan_passes(sizes: Sequence[int], budget: int, multiple_of: int = 1) -> list[list[int]]:
    """Shares the items of a step out among as few passes as hold them, evenly.

    Args:
        sizes: tokens of each item.
        budget: the most tokens of a pass; an item that is larger makes one by itself.
        multiple_of: the number of passes is a multiple of this, of processes that work side by side.
    Returns: item numbers of each pass; some are empty where there are more passes than items.
    """
    count = -(-sum(sizes) // (budget * multiple_of)) * multiple_of or multiple_of
    while True:
        loads, passes = [(0, number) for number in range(count)], [[] for _ in range(count)]
        for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
            load, number = heapq.heappop(loads)
            passes[number].append(item)
            heapq.heappush(loads, (load + sizes[item], number))
        if all(len(items) <= 1 or sum(sizes[item] for item in items) <= budget for items in passes):
            return [sorted(items) for items in passes]
        count += multiple_of


class _ForestBuilder:
    """Collects spans and, side by side, what they must predict."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.packed = 0
        self._found: dict[str, list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]] = {side: [] for side in SIDES}

    def add(self, ids: Sequence[int], parent: int, mode: str) -> int:
        """Appends a span; returns its index."""
        self.spans.append((ids, parent, mode))
        self.packed += len(ids)
        return len(self.spans) - 1

    def predict(
        self, side: str, segment: int, offsets: np.ndarray, targets: Sequence[int], weight: float = 1.0
    ) -> None:
        """The rows at these offsets from the next span's first token predict targets, as part of a segment."""
        weights = np.full(len(offsets), weight, dtype=np.float32)
        self._found[side].append((segment, self.packed + offsets, np.asarray(targets, dtype=np.int64), weights))

    def build(self, visits: Sequence[PairVisit], device: torch.device | str | None) -> PairBatch:
        """The finished batch."""
        sides = {side: self._side(found, len(visits), device) for side, found in self._found.items() if found}
        return PairBatch(tuple(visits), SpanTree.build(self.spans, device), sides)

    def _side(self, found: list, num_pairs: int, device: torch.device | str | None) -> Side:
        numbers, rows, targets, weights = zip(*found, strict=True)
        pair_weight = np.zeros(num_pairs, dtype=np.float32)
        pair_weight[np.array(numbers) // 2] = 1.0
        segment = np.repeat(np.array(numbers, dtype=np.int64), [len(part) for part in rows])
        arrays = (np.concatenate(rows), np.concatenate(targets), segment, np.concatenate(weights), pair_weight)
        return Side(*(torch.from_numpy(array).to(device) for array in arrays))
