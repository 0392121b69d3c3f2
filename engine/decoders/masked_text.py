"""Captions and answers by diffusion: a region of masks behind the question is filled block by block, in steps.

    asked | region: kept tokens, masks | after_answer           one full span of an answer: everything sees everything

A step draws every masked token up to the end of the current block and keeps the most confident; a block's masks are
shared out evenly over its steps, the remainder to the first. So no prefix can be cached, and what is exact is saved
elsewhere: the last layer and the head run on those masked rows alone, the first step is computed once for all samples
of a question, and answers of any questions share a pass, which the ended ones leave and waiting ones enter. Drawing
ends after a block that holds eot. What is approximate must be asked for: see SamplingParams.

Given answers are scored behind the same questions: the region is masked as a whole, so that one pass gives the logits
of every choice. That is exact for answers of one token, and the product of their marginals for longer ones.

Tokens are drawn by kernels/sampling.py. Its random numbers of 23 bits change the probability of an id by at most 2^-23
of that of its tile of 128 ids.
Source: mmu_generate of MMaDA, generate_text_understanding of Lumina-DiMOO, both after LLaDA (arXiv 2502.09992).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hermesflow.engine.answer_sampler import SamplingParams
from hermesflow.engine.decoders.passes import MemoryBound
from hermesflow.engine.nan_cause import NotFiniteError, likely_cause
from hermesflow.engine.phases import phase
from hermesflow.engine.prompt_spans import QuestionIds
from hermesflow.engine.token_layout import Layout
from hermesflow.engine.transformer import Transformer
from hermesflow.kernels.linear_logprob import linear_logprob
from hermesflow.kernels.matmul import linear
from hermesflow.kernels.philox import RandomKey
from hermesflow.kernels.span_tree import SpanTree
from hermesflow.kernels.token_sample import token_sample

BLOCK_LENGTH, TOKENS_PER_STEP = 32, 2
"""Defaults: Lumina-DiMOO's block length, and twice its tokens a step."""
_SETTINGS = {"temperature": torch.float32, "top_k": torch.int64, "top_p": torch.float32, "min_p": torch.float32}
_ROWS_PER_DRAW = 1024
"""Rows whose logits are held at once: 0.5 GB at 134,656 ids."""


class MaskedTextDecoder:
    """Draws and scores answers. An answer is a function of the model, its image, question, seed and settings alone."""

    def __init__(self, transformer: Transformer, layout: Layout, backend: str | None = None) -> None:
        """Raises: ValueError if the layout is not bidirectional, or has no mask."""
        if not layout.is_bidirectional or layout.mask_id is None:
            raise ValueError(
                f"MaskedTextDecoder: expected a bidirectional layout with a mask_id, got {type(layout).__name__}; give "
                "the model another text_decoder"
            )
        self.transformer, self.layout, self.backend = transformer, layout, backend
        self._memory = MemoryBound("MaskedTextDecoder", lambda: False, torch.cuda.empty_cache)
        self._text_bias: Tensor | None = None

    def extend(
        self,
        images: Tensor,
        question_ids: QuestionIds,
        sampling: Sequence[SamplingParams],
        seeds: Tensor,
        *,
        text_only: bool = True,
        max_tokens: int = 16384,
    ) -> list[list[list[list[int]]]]:
        """Answer each question once for every entry of sampling; arguments and returns are those of TextDecoder.extend.

        text_only=False draws from the joint vocabulary, as published; a mask that is drawn stays a mask, and is left
        out of the answer.
        Raises: RuntimeError naming the answer if the model's logits hold NaN.
        """
        regions = self._regions(images, question_ids, sampling, seeds)
        flat = [each for of_image in regions for of_question in of_image for each in of_question]
        self.fill(flat, text_only=text_only, max_tokens=max_tokens)
        return [[[self._answer(each) for each in of_question] for of_question in of_image] for of_image in regions]

    def rollout(
        self,
        images: Tensor,
        question_ids: QuestionIds,
        sampling: Sequence[SamplingParams],
        seeds: Tensor,
        *,
        max_tokens: int = 16384,
    ) -> list[list[list[MaskedRegion]]]:
        """The answers of extend, with how they were drawn, [b][q][s]; arguments and errors are those of extend.

        Raises: ValueError on settings that draw by another law than the model's at temperature 1.
        """
        plain = SamplingParams(temperature=1.0)
        others = ("top_k", "top_p", "min_p", "temperature", "guidance_scale", "threshold", "cache")
        wrong = [name for params in sampling for name in others if getattr(params, name) != getattr(plain, name)]
        if wrong:
            raise ValueError(
                f"MaskedTextDecoder.rollout: expected {wrong[0]} {getattr(plain, wrong[0])!r}; leave it out"
            )
        regions = self._regions(images, question_ids, sampling, seeds)
        self.fill([each for image in regions for question in image for each in question], max_tokens=max_tokens)
        return regions

    def _regions(
        self, images: Tensor, question_ids: QuestionIds, sampling: Sequence[SamplingParams], seeds: Tensor
    ) -> list[list[list[MaskedRegion]]]:
        codes, layout = images.tolist(), self.layout

        def region(image: int, question: int, sample: int) -> MaskedRegion:
            before = tuple(layout.asked(codes[image], question_ids[image][question]))
            seed = int(seeds[image, question, sample])
            name = f"question {question} of image {image}, sample {sample}"
            return MaskedRegion(
                before, sampling[sample], seed, name, mask_id=layout.mask_id, after=layout.after_answer,
                ends=lambda ids: layout.eot in ids,
            )  # fmt: skip

        return [
            [[region(image, question, sample) for sample in range(len(sampling))] for question in range(len(questions))]
            for image, questions in enumerate(question_ids)
        ]

    def fill(self, regions: Sequence[MaskedRegion], *, text_only: bool = True, max_tokens: int = 16384) -> None:
        """Draws regions to their ends, in place; text_only, max_tokens and errors are those of extend."""
        waiting, active = list(regions), []
        is_cached = any(region.params.cache for region in regions)
        cache = _RegionCache(self.transformer, regions, max_tokens) if is_cached else None

        def size(region: MaskedRegion) -> int:
            return region.num_tokens if cache is None else cache.stride

        while waiting or active:
            room = max_tokens - sum(map(size, active))
            while waiting and (not active or size(waiting[0]) <= room):
                room -= size(waiting[0])
                active.append(waiting.pop(0))
            if cache is not None:
                cache.place(active)

            def step(rows: list[int], active: list[MaskedRegion] = active) -> None:
                self._step([active[row] for row in rows], text_only, cache)

            self._memory.call(list(range(len(active))), step, 1)
            active = [region for region in active if not region.has_ended]

    def _answer(self, region: MaskedRegion) -> list[int]:
        """What stands before the first eot, without masks."""
        ids, eot = region.ids.tolist(), self.layout.eot
        return [token for token in ids[: ids.index(eot) if eot in ids else len(ids)] if token != self.layout.mask_id]

    def score_choices(
        self,
        images: Tensor,
        question_ids: QuestionIds,
        choice_ids: Sequence[QuestionIds],
        *,
        text_only: bool = True,
        max_tokens: int = 16384,
        num_masks: int = 0,
    ) -> list[list[list[float]]]:
        """Log-probability of each given answer and the eot after it; arguments and returns are those of
        TextDecoder.score_choices.

        With num_masks 0 all is masked, in a region as long as the question's longest choice and eot. Otherwise each
        choice has a region of its own, and its score is the mean over so many masks of L / k times the log-probability
        of the k of its L tokens that a mask hides: LLaDA's estimate (arXiv 2502.09992, section 2.4), for counts k that
        are spread evenly from 1 to L, and tokens that are the same for all choices of a length.
        """
        codes, layout = images.tolist(), self.layout
        scores: list[list[list[float]]] = [[[] for _ in questions] for questions in question_ids]
        places, asked = [], []
        for image, questions in enumerate(question_ids):
            for question, ids in enumerate(questions):
                if choices := choice_ids[image][question]:
                    before = layout.asked(codes[image], ids)
                    places.append((image, question))
                    asked.append(self._views(before, [[*choice, layout.eot] for choice in choices], num_masks))
        sizes = [sum(map(len, {view.ids for views in choices for view in views})) for choices in asked]

        def score(numbers: list[int]) -> None:
            found = iter(self._score([views for number in numbers for views in asked[number]], text_only))
            for number in numbers:
                image, question = places[number]
                scores[image][question] = [next(found) for _ in asked[number]]

        for numbers in _batches(sizes, max_tokens):
            self._memory.call(numbers, score, 1)
        return scores

    def _views(self, before: Sequence[int], choices: Sequence[Sequence[int]], num_masks: int) -> list[list[_View]]:
        """How each choice is looked at."""
        mask_id, after = self.layout.mask_id, self.layout.after_answer
        if not num_masks:
            ids = (*before, *[mask_id] * max(map(len, choices)), *after)
            return [[_View(ids, len(before) + np.arange(len(choice)), choice, 1.0)] for choice in choices]
        views = []
        for choice in choices:
            rng, length = np.random.default_rng([len(choice), num_masks]), len(choice)
            views.append([])
            for number in range(num_masks):
                count = 1 + int((number + 0.5) / num_masks * length)
                hidden = np.sort(rng.permutation(length)[:count])
                region = np.array(choice)
                region[hidden] = mask_id
                ids = (*before, *region.tolist(), *after)
                targets = [choice[place] for place in hidden]
                views[-1].append(_View(ids, len(before) + hidden, targets, length / count / num_masks))
        return views

    def _score(self, choices: list[list[_View]], text_only: bool) -> list[float]:
        device = self.transformer.embed.weight.device
        views = [view for of_choice in choices for view in of_choice]
        spans = list(dict.fromkeys(view.ids for view in views))
        tree = SpanTree.build([(list(span), -1, "full") for span in spans], device)
        starts = dict(zip(spans, tree.packed_starts.tolist(), strict=True))
        rows = torch.from_numpy(np.concatenate([starts[view.ids] + view.positions for view in views])).to(device)
        targets = torch.tensor([target for view in views for target in view.targets], device=device)
        with phase("judge"):
            hidden = self.transformer(tree, rows=rows)
            weight, bias = self._head(text_only)
            logprob = linear_logprob(hidden, weight, targets, bias=bias, backend=self.backend)
        # Summed on the host in fp64: the order of a device's atomic additions may change from run to run.
        weights = np.repeat([view.weight for view in views], [len(view.targets) for view in views])
        counts = np.array([sum(len(view.targets) for view in of_choice) for of_choice in choices])
        return np.add.reduceat(weights * logprob.double().cpu().numpy(), counts.cumsum() - counts).tolist()

    def _step(self, regions: list[MaskedRegion], text_only: bool, cache: _RegionCache | None) -> None:
        """One step of each region."""
        counts = [len(region.masked()) for region in regions]
        halves = [region.halves() for region in regions]
        guided, unguided = [each[0] for each in halves], [each[1] for each in halves if len(each) == 2]
        with phase("step"):
            hidden = (self._hidden if cache is None else cache.hidden)([*guided, *unguided])
        hidden, without = hidden.split([sum(counts), len(hidden) - sum(counts)])
        scales = np.repeat([region.params.guidance_scale for region in regions], counts)
        if len(without):
            scale = torch.from_numpy(1 + scales[scales != 0]).to(hidden)[:, None]
            is_guided = torch.from_numpy(scales != 0).to(hidden.device)
            hidden = hidden.masked_scatter(is_guided[:, None], torch.lerp(without, hidden[is_guided], scale))
        with phase("head"):
            token, confidence = self._draw(hidden, regions, counts, text_only)
        for region, drawn, sure in zip(regions, np.split(token, np.cumsum(counts)[:-1]),
                                       np.split(confidence, np.cumsum(counts)[:-1]), strict=True):  # fmt: skip
            if (drawn < 0).any():
                raise NotFiniteError(
                    f"MaskedTextDecoder: the model gives no distribution (NaN) for {region.name}, step {region.step}; "
                    f"{likely_cause(self.transformer)}"
                )
            region.keep(drawn, sure)

    def _hidden(self, halves: list[_Half]) -> Tensor:
        """Hidden states of the masks of each half, one after the other."""
        device = self.transformer.embed.weight.device
        # Equal ones are one span: all samples of a question are so in their first step.
        spans = list(dict.fromkeys(half.ids for half in halves))
        tree = SpanTree.build([(list(span), -1, "full") for span in spans], device)
        starts = dict(zip(spans, tree.packed_starts.tolist(), strict=True))
        rows = np.concatenate([starts[half.ids] + half.masks for half in halves])
        return self.transformer(tree, rows=torch.from_numpy(rows).to(device))

    def _draw(
        self, hidden: Tensor, regions: list[MaskedRegion], counts: list[int], text_only: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """A token a row, and its log-probability at temperature 1, without filters."""
        device = hidden.device

        def each(values: list, dtype: torch.dtype) -> Tensor:
            return torch.tensor(np.repeat(values, counts), dtype=dtype, device=device)

        settings = {
            name: each([getattr(region.params, name) for region in regions], dtype) for name, dtype in _SETTINGS.items()
        }
        seed = each([region.seed for region in regions], torch.int64)
        step = each([region.step for region in regions], torch.int64)
        position = torch.from_numpy(np.concatenate([region.masked() for region in regions])).to(device)
        weight, bias = self._head(text_only)
        tokens, confidences = [], []
        for start in range(0, len(hidden), _ROWS_PER_DRAW):
            part = slice(start, start + _ROWS_PER_DRAW)
            logits = linear(hidden[part], weight, bias).float()
            key = RandomKey(seed[part], step[part], position[part])
            of_part = {name: values[part] for name, values in settings.items()}
            token, _ = token_sample(logits, **of_part, key=key, backend=self.backend)
            sure = logits.gather(1, token.clamp(min=0)[:, None])[:, 0] - logits.logsumexp(1)
            tokens.append(token)
            confidences.append(sure)
        return torch.cat(tokens).cpu().numpy(), torch.cat(confidences).cpu().numpy()

    def _head(self, text_only: bool) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the whole head; where text alone may be drawn, other ids have -inf."""
        head = self.transformer.head
        if not text_only:
            return head.weight, head.bias
        if self._text_bias is None or self._text_bias.device != head.weight.device:
            self._text_bias = text_bias(self.layout, head.weight.device)
        bias = self._text_bias.to(head.weight.dtype)
        return head.weight, bias if head.bias is None else head.bias + bias


def text_bias(layout: Layout, device: torch.device) -> Tensor:
    """fp32 [V]: 0 for text ids, -inf for others."""
    bias = torch.full((layout.vocab_size,), float("-inf"))
    bias[torch.tensor(list(layout.text_ids))] = 0.0
    return bias.to(device)


class _View(NamedTuple):
    """A span in which some tokens of a choice are hidden: its ids, where they stand, which they are, and how much their
    log-probability counts."""

    ids: tuple[int, ...]
    positions: np.ndarray
    targets: Sequence[int]
    weight: float


class _Half(NamedTuple):
    """A region between ids, as one pass has it.

    ids: of the whole span. masks: where those masks stand that the step draws. computed: what is computed where keys
    and values are kept; None: all of it. slot: the first one of the span, there.
    """

    ids: tuple[int, ...]
    masks: np.ndarray
    computed: np.ndarray | None
    slot: int


class MaskedRegion:
    """A region of masks between given ids, and how far it is drawn.

    before, after: the ids around it. ids: int64 [L], its own. kept_at: int64 [L], the step that kept an id, of all
    blocks; -1 where none did. logprob: fp32 [L], its log-probability then, at temperature 1 and without filters. step
    counts the steps so far. slot: where its keys and values are kept, if they are.
    """

    slot: int | None = None

    def __init__(
        self,
        before: tuple[int, ...],
        params: SamplingParams,
        seed: int,
        name: str,
        *,
        mask_id: int,
        after: tuple[int, ...] = (),
        ends: Callable[[np.ndarray], bool],
    ) -> None:
        """
        Args:
            before, after: see above.
            params: how it is drawn.
            seed: of its draws.
            name: for errors.
            mask_id: the mask.
            ends: says of the ids up to the end of a block that was filled whether the region ends there.
        """
        self.before, self.after, self.params, self.seed, self.name = before, after, params, seed, name
        self.mask_id, self._ends, self.step = mask_id, ends, 0
        self.ids = np.full(params.max_new_tokens, mask_id)
        self.kept_at, self.logprob = np.full_like(self.ids, -1), np.zeros(len(self.ids), dtype=np.float32)
        self.num_tokens = (2 if params.guidance_scale else 1) * self._span_length
        self._blocks = iter(_blocks(params))
        self._start, self._end, self._counts = next(self._blocks)
        self._begins_block, self.has_ended = True, False

    @property
    def _span_length(self) -> int:
        return len(self.before) + len(self.ids) + len(self.after)

    def masked(self) -> np.ndarray:
        """Positions of the masks up to the end of the current block."""
        return np.flatnonzero(self.ids[: self._end] == self.mask_id)

    def halves(self) -> list[_Half]:
        """The region between its ids, and under guidance between masks."""
        masks, slot = len(self.before) + self.masked(), self.slot or 0
        computed = None
        if self.params.cache and not self._begins_block:
            end = self._end + len(self.before) if self.params.cache == "dual" else self._span_length
            block = np.arange(self._start + len(self.before), end)
            computed = np.union1d(masks, block)  # a mask that was drawn may stand before the block
        around = [(self.before, self.after)]
        if self.params.guidance_scale:
            around.append(((self.mask_id,) * len(self.before), (self.mask_id,) * len(self.after)))
        return [
            _Half((*before, *self.ids.tolist(), *after), masks, computed, slot + half * self._span_length)
            for half, (before, after) in enumerate(around)
        ]

    def keep(self, token: np.ndarray, confidence: np.ndarray) -> None:
        """Takes over the most confident of the tokens drawn for masked(), as many as the step keeps."""
        positions, count = self.masked(), self._counts.pop(0)
        if self.params.threshold:
            count = max(1, int((confidence >= math.log(self.params.threshold)).sum()))
            self._counts = self._counts[: len(positions) - count]
        kept = np.argsort(-confidence, kind="stable")[:count]
        places = positions[kept]
        self.ids[places], self.logprob[places], self.kept_at[places] = token[kept], confidence[kept], self.step
        self.step += 1
        self._begins_block = not self._counts
        if self._begins_block:
            following = next(self._blocks, None)
            self.has_ended = following is None or self._ends(self.ids[: self._end])
            self._start, self._end, self._counts = following or (self._start, self._end, [])


class _RegionCache:
    """Keys and values of regions under way. Each has as many slots as the longest needs."""

    def __init__(self, transformer: Transformer, regions: Sequence[MaskedRegion], max_tokens: int) -> None:
        self._transformer = transformer
        self.stride = max(region.num_tokens for region in regions)
        self._count = min(len(regions), max(1, max_tokens // self.stride))
        self._cache = transformer.new_cache(self._count * self.stride)

    def place(self, active: Sequence[MaskedRegion]) -> None:
        """Gives slots to the regions that have none, of those that no active one has."""
        taken = {region.slot for region in active}
        free = (slot for number in range(self._count) if (slot := number * self.stride) not in taken)
        for region in active:
            if region.slot is None:
                region.slot = next(free)

    def hidden(self, halves: list[_Half]) -> Tensor:
        """As MaskedTextDecoder._hidden; what a half does not compute is read as it was kept."""
        device = self._transformer.embed.weight.device
        whole = SpanTree.build([], device).extend(
            [(list(half.ids), -1, "full") for half in halves], starts=np.array([half.slot for half in halves])
        )
        computed = [np.arange(len(half.ids)) if half.computed is None else half.computed for half in halves]
        rows = [start + places for start, places in zip(whole.packed_starts, computed, strict=True)]
        tree = whole.only([len(places) for places in computed], torch.from_numpy(np.concatenate(rows)).to(device))
        wanted = [
            start + np.searchsorted(places, half.masks)
            for start, places, half in zip(tree.packed_starts, computed, halves, strict=True)
        ]
        return self._transformer(tree, self._cache, rows=torch.from_numpy(np.concatenate(wanted)).to(device))


def _blocks(params: SamplingParams) -> Iterator[tuple[int, int, list[int]]]:
    """(start, end, tokens that each step keeps) of each block; under a threshold it has a step a token at most."""
    length = params.max_new_tokens
    block = min(length, params.block_length or BLOCK_LENGTH)
    num_steps = params.num_steps or -(-length // TOKENS_PER_STEP)
    for start in range(0, length, block):
        size = min(block, length - start)
        count = size if params.threshold else max(1, min(size, num_steps * size // length))
        yield start, start + size, [size // count + (number < size % count) for number in range(count)]


def _batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Numbers in order, cut so that their lengths stay within most; one always fits."""
    numbers, total = [], 0
    for number, length in enumerate(lengths):
        if numbers and total + length > most:
            yield numbers
            numbers, total = [], 0
        numbers.append(number)
        total += length
    if numbers:
        yield numbers
