"""Continuous batching: answers decoded side by side, of questions that enter as others leave.

A round is admit -> step -> collect. Questions that fit into the cache are prefilled, with their image if it is not
there yet, and draw their first tokens; all unfinished answers get some more tokens, without the host; then the host
looks, gives out what has ended, and frees its slots.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hermesflow.engine.answer_sampler import ENDED, FAILED, GOES_ON, Answers, AnswerSampler, SamplingParams
from hermesflow.engine.device_graph import DeviceGraph, captures
from hermesflow.engine.nan_cause import NotFiniteError, likely_cause
from hermesflow.engine.phases import phase
from hermesflow.engine.prompt_spans import Asked, PromptSpans
from hermesflow.engine.slot_allocator import SlotAllocator
from hermesflow.kernels.span_tree import SpanTree

Key = tuple[int, ...]
"""Of a span: () of a root that all images follow, (image,), (image, question) or (image, question, sample); a key
without its last entry is its parent's."""


class Pace(NamedTuple):
    """How often the batch is looked at and changed.

    steps_to_look: from look to look. share: of the rows, must have ended for the batch to change before all have.
    round_rows: whether the batch is filled up to one of few sizes, so that a device graph serves more than one batch.
    """

    steps_to_look: int
    share: float
    round_rows: bool


_PACE = {"cpu": Pace(1, 0.0, False), "cuda": Pace(8, 0.25, True)}
"""On CUDA a look makes the device wait for the host, and a change may take a new graph; on the CPU a row is work."""
_ENOUGH = 0.25
"""Share of the cache that questions must fill to enter while others are unfinished: each time is a pass of its own."""


class _Step:
    """A step of fixed rows over a fixed structure: a device graph."""

    def __init__(self, sampler: AnswerSampler, tree: SpanTree, rows: Answers) -> None:
        self.tree, self.rows = tree, rows
        self.run = DeviceGraph(functools.partial(sampler.advance, tree, rows), rows.seed.device)

    def load_(self, tree: SpanTree, rows: Answers) -> bool:
        """Other rows and another structure of the same shapes, in place of these; False if the shapes differ."""
        if rows.seed.shape != self.rows.seed.shape or not self.tree.load_(tree):
            return False
        for mine, other in zip(self.rows, rows, strict=True):
            mine.copy_(other)
        return True


def _rounded(num_rows: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""
    power = 1 << (num_rows - 1).bit_length()
    return power * 3 // 4 if num_rows <= power * 3 // 4 else power


class AnswerStream:
    """Draws the answers of one list of questions within a cache of fixed capacity."""

    def __init__(
        self, sampler: AnswerSampler, prompts: PromptSpans, sampling: Sequence[SamplingParams], seeds: Tensor
    ) -> None:
        """
        Args:
            sampler: the model, with a cache in which any one question fits with its image and its answers, with room
                once more for the longest of question and answers (see _admit), and one slot more.
            prompts: images and questions.
            sampling: S settings.
            seeds: int64 [B, Q, S].
        """
        self.sampler, self.prompts, self.sampling = sampler, prompts, sampling
        self.device = sampler.cache.keys.device
        self.seeds = seeds.to(self.device)
        self.pace = _PACE["cpu" if self.device.type == "cpu" else "cuda"]
        self.capacity = sampler.cache.capacity - 1  # the last slot is that of the rows which fill up a batch
        self.waiting: list[Asked] = []
        self.tree, self.spans = SpanTree.build([], self.device, fixed=captures(self.device)), []
        self.rows, self.row_keys = Answers.new(self.seeds.flatten(0, 1)[:0], sampling), []
        self.goes_on = np.zeros(0, dtype=bool)
        self.most_to_draw = 0
        self.first_slots: dict[Key, int] = {}
        self.finished: dict[Asked, dict[int, list[int]]] = {}
        self.step: _Step | None = None
        self.steps: dict[int, _Step] = {}

    def answers(self, pairs: Sequence[Asked]) -> Iterator[tuple[Asked, list[list[int]]]]:
        """(pair, token ids [S] without eot), each as soon as all its samples have ended.

        Args:
            pairs: (image, question), those of an image one after the other.
        Raises: RuntimeError naming the answer and the step if the model's logits hold NaN.
        """
        self.waiting = list(pairs)
        while self.waiting or self.goes_on.any():
            if self._should_change():
                self._drop_ended()
                if self._admit():
                    yield from self._collect()
                    self._drop_ended()
                if not self.row_keys:
                    continue
                self._arrange()
            for _ in range(min(self.most_to_draw, self.pace.steps_to_look)):
                self.step.run()
            yield from self._collect()

    def _should_change(self) -> bool:
        num_ended = int((~self.goes_on).sum())
        return num_ended == len(self.goes_on) or num_ended > self.pace.share * len(self.goes_on)

    def _drop_ended(self) -> None:
        """Ended rows leave, and with them every span that nobody needs any more."""
        kept = np.flatnonzero(self.goes_on)
        self.rows, self.row_keys = self.rows.select(kept), [self.row_keys[row] for row in kept]
        self.goes_on = self.goes_on[kept]
        needed = {key[:depth] for key in self.row_keys for depth in (0, 1, 2, 3)}
        needed |= {pair[:depth] for pair in self.waiting[:1] for depth in (0, 1)}
        spans = [span for span, key in enumerate(self.spans) if key in needed]
        self.tree, self.spans = self.tree.keep(spans), [self.spans[span] for span in spans]

    def _admit(self) -> bool:
        """Prefills the questions that fit, in order, and draws their first tokens; False if none enters.

        While others are unfinished, questions wait until there are enough for a pass of their own. Else the next
        always fits: the tree is empty, or holds the next one's image alone, and of the two gaps beside it the first
        wastes less than the longest piece.
        """
        prompts = self.prompts
        slots = SlotAllocator(self.capacity, self.tree.starts, self.tree.regions)
        cached, entering = set(self.spans), {}
        num_pairs = num_slots = 0
        for pair in self.waiting:
            lengths = {(): len(prompts.root), pair[:1]: prompts.image_length}
            sizes = {key: size for key, size in lengths.items() if size and key not in cached and key not in entering}
            sizes[pair] = len(prompts.question(*pair))
            sizes |= {(*pair, sample): params.max_new_tokens for sample, params in enumerate(self.sampling)}
            placed = slots.place(list(sizes.values()), from_end=[len(key) > 1 for key in sizes])
            if placed is None:
                break
            entering |= zip(sizes, placed, strict=True)
            num_pairs, num_slots = num_pairs + 1, num_slots + sum(sizes.values())
        pairs, waiting = self.waiting[:num_pairs], self.waiting[num_pairs:]
        if not pairs or (self.row_keys and waiting and num_slots < _ENOUGH * self.capacity):
            assert self.row_keys, "a question with its answers fits into the cache"
            return False
        self.waiting, self.first_slots = waiting, entering
        self._prefill(pairs)
        return True

    def _prefill(self, pairs: list[Asked]) -> None:
        """Computes the entering images and questions, each once, and draws a first token for every sample."""
        prompts, num_samples = self.prompts, len(self.sampling)
        roots, images = ([key for key in self.first_slots if len(key) == depth] for depth in (0, 1))
        number = {key: span for span, key in enumerate([*self.spans, *roots, *images, *pairs])}
        spans = [*(prompts.roots if roots else []), *(prompts.image(image, number.get((), -1)) for (image,) in images)]
        spans += [(prompts.question(*pair), number[pair[:1]], "causal") for pair in pairs]
        starts = np.array([self.first_slots[key] for key in (*roots, *images, *pairs)])
        self.tree, self.spans = self.tree.extend(spans, starts=starts), list(number)

        embeds = prompts.embeds([image for (image,) in images], with_root=bool(roots))
        ends = (self.tree.packed_starts + self.tree.num_new)[-len(pairs) :] - 1
        ends = torch.from_numpy(ends).to(self.device)
        with phase("prefill"):
            hidden = self.sampler.transformer(self.tree, self.sampler.cache, embeds, ends)
        rows = Answers.new(self.seeds[tuple(zip(*pairs, strict=True))], self.sampling)
        with phase("head"):
            self.sampler.draw(self.sampler.logits(hidden).repeat_interleave(num_samples, dim=0), rows)
        self.rows = self.rows.join(rows)
        self.row_keys = [*self.row_keys, *((*pair, sample) for pair in pairs for sample in range(num_samples))]
        self.goes_on = np.concatenate([self.goes_on, np.ones(len(rows.seed), dtype=bool)])

    def _arrange(self) -> None:
        """The structure in which all rows decode, with spans for those that entered."""
        entered = self.row_keys[len(self.row_keys) - sum(key in self.first_slots for key in self.row_keys) :]
        number = {key: span for span, key in enumerate([*self.spans, *entered])}
        # The device holds the tokens; here they only take their place.
        spans = [([0], number[key[:2]], "causal") for key in entered]
        reserve = [self.sampling[key[2]].max_new_tokens - 1 for key in entered]
        starts = np.array([self.first_slots[key] for key in entered], dtype=np.int64)
        self.tree, self.spans, self.first_slots = self.tree.extend(spans, reserve, starts), list(number), {}

        num_rows = _rounded(len(self.row_keys)) if self.pace.round_rows else len(self.row_keys)
        num_filling = num_rows - len(self.row_keys)
        filling = self.rows.select(np.zeros(num_filling, dtype=np.int64))
        filling.status.fill_(ENDED), filling.length.fill_(1)
        rows = self.rows.join(filling)
        tree = self.tree.extend([([0], -1, "causal")] * num_filling, starts=np.full(num_filling, self.capacity))
        leaves = [number[key] for key in self.row_keys] + list(range(self.tree.num_spans, tree.num_spans))
        tree = tree.decode(leaves, rows.last_token(), rows.length)
        self.step = self.steps.get(num_rows)
        if self.step is None or not self.step.load_(tree, rows):
            self.step = self.steps[num_rows] = _Step(self.sampler, tree, rows)
        self.rows = self.step.rows

    def _collect(self) -> Iterator[tuple[Asked, list[list[int]]]]:
        """Looks at the rows, which waits for the device, and gives out the questions whose answers have all ended."""
        rows = self.rows
        counts = torch.stack([rows.status, rows.length, rows.limit - rows.length], dim=1)
        looked = torch.cat([counts, rows.tokens], dim=1)[: len(self.row_keys)].cpu().numpy()
        (status, length, to_draw), tokens = looked[:, :3].T, looked[:, 3:]
        failed = np.flatnonzero(status == FAILED)
        if len(failed):
            raise self._no_distribution(*min((self.row_keys[row], int(length[row])) for row in failed))
        ended = np.flatnonzero(self.goes_on & (status == ENDED))
        self.goes_on = status == GOES_ON
        self.most_to_draw = int(to_draw[self.goes_on].max(initial=0))
        for row in ended:
            *pair, sample = self.row_keys[row]
            samples = self.finished.setdefault(tuple(pair), {})
            samples[sample] = tokens[row, : length[row]].tolist()
            if len(samples) == len(self.sampling):
                del self.finished[tuple(pair)]
                yield tuple(pair), [samples[sample] for sample in range(len(self.sampling))]

    def _no_distribution(self, key: Key, step: int) -> NotFiniteError:
        image, question, sample = key
        return NotFiniteError(
            f"TextDecoder: the model gives no distribution (NaN) for image {image}, question {question}, "
            f"sample {sample}, step {step}; {likely_cause(self.sampler.transformer)}"
        )
