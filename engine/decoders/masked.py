"""Images from prompts by parallel decoding (MaskGIT): a step draws all masked tokens and keeps the most confident.

Prompts are prefilled once and shared by their candidates; a step computes the image spans alone, the conditional and
the unconditional ones in one pass. Where the layout is bidirectional nothing but the first step can be
shared, and a step computes prompts too. Guidance is applied to hidden states, since it commutes with the linear head,
and the head runs on the masked positions and on the image codes only. Codes that are known from the start are kept
(inpainting); they stand in both branches.

All steps after the first work on tensors that stay where they are and never wait for the device, so that on CUDA they
are one graph, which the next batches of the same shapes replay. A pass that computes for longer than its kernels take
to launch has none: it would cost memory, and a plan of the largest size.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from hermesflow.engine import device_graph
from hermesflow.engine.decoders.passes import MemoryBound, split_evenly
from hermesflow.engine.mask_schedule import Schedule, mask_temperatures, num_to_mask
from hermesflow.engine.nan_cause import NotFiniteError, likely_cause
from hermesflow.engine.phases import phase
from hermesflow.engine.token_layout import Layout, check_grid
from hermesflow.engine.transformer import Transformer
from hermesflow.kernels.linear_sample import linear_sample
from hermesflow.kernels.mask_topk import mask_topk
from hermesflow.kernels.matmul import linear
from hermesflow.kernels.philox import RandomKey
from hermesflow.kernels.span_tree import SpanTree

Prompt = tuple[int, ...]
Progress = Callable[[list], Iterable]
"""Gives back the items of a list, in order and all of them."""
Start = tuple[Prompt, tuple[int, ...]]
"""What an image starts from: its prompt, and its codes, -1 where one is to be drawn."""
Step = tuple[int, int, int, float]
"""(step, tokens masked before it, tokens masked after it, temperature of the re-masking noise)."""

_HIDES_LAUNCHES = 4e11
"""Tokens of a pass times parameters of a block, beyond which a block takes a millisecond of an H100 and its kernels are
launched in less (a prediction, not measured)."""
_ROWS_PER_HEAD = 4096
"""Whose logits of all codes an MLCache computes at once."""
MOST = 1e6
"""Of temperatures and guidance: beyond it, and below its inverse, logits leave what fp32 can hold."""


@dataclass(frozen=True)
class ImageRollout:
    """Images and how they were drawn, on the model's device; num_steps S is that of the parameters.

    codes: int64 [P, n, N].
    kept_at: int64 [P, n, N], the step that drew a code for good, which was not masked again; -1 where it was known.
    logprob: fp32 [P, n, N], the log-probability with which it was drawn then, guided and tempered; 0 where known.
    drawn: int32 [P, n, S, N], what each step drew, kept or not; -1 where it drew nothing.
    """

    codes: Tensor
    kept_at: Tensor
    logprob: Tensor
    drawn: Tensor


@dataclass(frozen=True, kw_only=True)
class MLCache:
    """Lumina-DiMOO's approximation (arXiv 2510.06308) for bidirectional layouts: steps compute some tokens of each
    sequence alone, and read the others' keys, values and hidden states as they were.

    Those are left whose largest logit of a code is highest, cache_ratio of the sequence. All are computed in the steps
    up to warmup_ratio of all, and in every refresh_interval-th one after that.
    """

    cache_ratio: float = 0.9
    warmup_ratio: float = 0.3
    refresh_interval: int = 5

    def __post_init__(self) -> None:
        if not (0 <= self.cache_ratio < 1 and 0 <= self.warmup_ratio <= 1 and self.refresh_interval >= 1):
            raise ValueError(
                "MLCache: expected cache_ratio in [0, 1), warmup_ratio in [0, 1] and refresh_interval of at least 1, "
                f"got {self.cache_ratio}, {self.warmup_ratio} and {self.refresh_interval}"
            )

    def computes_all(self, step: int, num_steps: int) -> bool:
        """Whether a step computes all tokens."""
        warmup = int(num_steps * self.warmup_ratio)
        return step <= warmup or (step - warmup) % self.refresh_interval == 0


@dataclass(frozen=True, kw_only=True)
class ImageSamplingParams:
    """How images are drawn.

    guidance_scale g: logits (1 + g) * conditional - g * unconditional; 0 needs no unconditional half.
    temperature divides the logits (0: argmax); mask_temperature scales the noise on the confidences and decays by
    mask_decay; schedule says how many tokens stay masked, of the image's or, with schedule_unknown, of those that are
    unknown at the start. They are explained in mask_schedule.py. grid is an image's rows and columns of codes; None:
    the layout's. ml_cache: an approximation; None is exact.
    """

    num_steps: int
    guidance_scale: float
    mask_temperature: float
    temperature: float = 1.0
    schedule: Schedule = "cosine"
    mask_decay: str = "linear"
    schedule_unknown: bool = False
    grid: tuple[int, int] | None = None
    ml_cache: MLCache | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "mask_temperature"):
            value = getattr(self, name)
            if not (value == 0 or 1 / MOST <= value <= MOST):
                raise ValueError(f"ImageSamplingParams: expected {name} of 0 or {1 / MOST:g} to {MOST:g}, got {value}")
        if not abs(self.guidance_scale) <= MOST:
            raise ValueError(
                f"ImageSamplingParams: expected a guidance_scale of at most {MOST:g}, got {self.guidance_scale}"
            )
        if self.grid is not None:
            check_grid("ImageSamplingParams", self.grid)
        num_to_mask(1, self.num_steps, self.schedule)
        mask_temperatures(self.mask_temperature, self.num_steps, self.mask_decay)


class ImageDecoder:
    """Draws images. A candidate's tokens are a function of the model, its prompt, its seed and the parameters alone."""

    params = ImageSamplingParams
    keeps_known_codes = True

    def __init__(self, transformer: Transformer, layout: Layout, backend: str | None = None) -> None:
        """Raises: ValueError if the layout has no masked codes."""
        if layout.mask_id is None or layout.image_mode != "full":
            raise ValueError(
                f"ImageDecoder: draws masked codes of full images, the layout has mask_id {layout.mask_id} and "
                f"image_mode {layout.image_mode!r}; give the model another image_decoder"
            )
        self.transformer, self.layout, self.backend = transformer, layout, backend
        self._session: _Session | None = None
        self._last_key: Hashable = None
        self._memory = MemoryBound("ImageDecoder", lambda: self._session is not None, self.release)

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        seeds: Tensor,
        params: ImageSamplingParams,
        *,
        unguided_ids: Sequence[Sequence[int]] | None = None,
        known_codes: Tensor | None = None,
        max_sequences: int = 256,
        progress: Progress = iter,
    ) -> Tensor:
        """Draw the candidates of each prompt.

        Args:
            prompt_ids: P prompts of plain text ids; they may be equal or empty.
            seeds: int64 [P, n], one a candidate.
            params: how to draw.
            unguided_ids: P prompts of the unconditional half, likewise; None: empty ones. Not read without guidance.
            known_codes: int64 [P, num_image_tokens], codes that each prompt's images keep, -1 where one is drawn; None
                draws all.
            max_sequences: image spans that one pass may compute; a guided candidate is two. Where memory runs out it
                is halved, for later calls too.
            progress: is given the steps of each pass, on CUDA the passes, and gives them back one by one, as a
                progress bar does.
        Returns: codes int64 [P, n, num_image_tokens] on the model's device.
        Raises: RuntimeError naming the candidate and the step if the model's logits hold NaN.
        """
        options = {"unguided_ids": unguided_ids, "known_codes": known_codes, "max_sequences": max_sequences}
        return self._generate(prompt_ids, seeds, params, ("codes",), progress=progress, **options)["codes"]

    def rollout(
        self,
        prompt_ids: Sequence[Sequence[int]],
        seeds: Tensor,
        params: ImageSamplingParams,
        *,
        max_sequences: int = 256,
        progress: Progress = iter,
    ) -> ImageRollout:
        """The images of generate, with how they were drawn; arguments and errors are those of generate.

        Raises: ValueError with an ml_cache, whose draws are not of the model's own law.
        """
        if params.ml_cache:
            raise ValueError("ImageDecoder.rollout: ml_cache draws by another law than the model's; leave it out")
        names = tuple(item.name for item in fields(ImageRollout))
        found = self._generate(prompt_ids, seeds, params, names, max_sequences=max_sequences, progress=progress)
        return ImageRollout(**found)

    def _generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        seeds: Tensor,
        params: ImageSamplingParams,
        names: Sequence[str],
        *,
        unguided_ids: Sequence[Sequence[int]] | None = None,
        known_codes: Tensor | None = None,
        max_sequences: int,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The named fields of ImageRollout."""
        num_prompts, num_images = seeds.shape
        layout = self.layout.of_sampling(params)
        if params.ml_cache and not layout.is_bidirectional:
            raise ValueError(
                "ImageDecoder: ml_cache is for models that attend to everything; others cache what precedes an image"
            )
        if known_codes is None:
            known_codes = torch.full((num_prompts, layout.num_image_tokens), -1)
        known = [tuple(codes) for codes in known_codes.tolist()]
        unguided_ids = [()] * num_prompts if unguided_ids is None else unguided_ids
        starts, unguided = (
            [(tuple(ids), known[row]) for row, ids in enumerate(prompts) for _ in range(num_images)]
            for prompts in (prompt_ids, unguided_ids if params.guidance_scale else ())
        )
        flat_seeds = seeds.to(self.transformer.embed.weight.device).flatten()
        codes = known_codes.to(flat_seeds.device, torch.int64).repeat_interleave(num_images, 0)
        found = {"codes": codes} | {name: _blank(name, codes, params.num_steps) for name in names if name != "codes"}
        failed_steps = torch.full_like(flat_seeds, params.num_steps)
        halves = 2 if params.guidance_scale else 1
        length = layout.image_length
        if layout.is_bidirectional:
            length += max((len(layout.text_prompt(prompt)) for prompt, _ in starts), default=0)
        # The bound counts images of the model's own grid, without prompts; longer sequences are fewer.
        max_sequences = min(max_sequences, max_sequences * self.layout.image_length // length)
        batches = self._batches(starts, max(1, max_sequences // halves))
        takes_graph = self._takes_graph(length * halves * max(map(len, batches), default=0))
        graphs = takes_graph and not params.ml_cache

        def draw(rows: list[int]) -> None:
            of_rows = ([of_all[row] for row in rows] if of_all else [] for of_all in (starts, unguided))
            batch = _Batch(self.transformer, layout, *of_rows, fixed=graphs)
            session = self._session_of(layout, batch, params)
            # Indexed by a tensor: a list would wait for the device in between.
            index = torch.tensor(rows, device=codes.device)
            session.draw(batch, codes[index], flat_seeds[index], iter if graphs else progress)
            failed_steps[index] = session.failed_steps
            for name, values in found.items():
                values[index] = session.state[name]
            self._keep(session)

        for rows in progress(batches) if graphs else batches:
            self._memory.call(rows, draw, halves)
        if not graphs:
            self.release()
        for row, step in enumerate(failed_steps.tolist()):
            if step < params.num_steps:
                raise NotFiniteError(
                    f"ImageDecoder: the model gives no distribution (NaN) for prompt {row // num_images}, "
                    f"image {row % num_images}, step {step}; {likely_cause(self.transformer)}"
                )
        return {name: values.unflatten(0, (num_prompts, num_images)) for name, values in found.items()}

    def release(self) -> None:
        """Gives back the memory that is kept for the next batch."""
        self._session = None
        if self.transformer.embed.weight.is_cuda:
            torch.cuda.empty_cache()

    def _takes_graph(self, tokens: int) -> bool:
        """Whether the steps of a pass over image spans of so many tokens are captured."""
        parameters = sum(weight.numel() for weight in self.transformer.blocks[0].parameters())
        return device_graph.captures(self.transformer.embed.weight.device) and tokens * parameters < _HIDES_LAUNCHES

    @staticmethod
    def _batches(starts: list[Start], most: int) -> list[list[int]]:
        """Rows that are drawn together; each has as many tokens to draw."""
        rows_of: dict[int, list[int]] = {}
        for row, (_, known) in enumerate(starts):
            rows_of.setdefault(known.count(-1), []).append(row)
        rows_of.pop(0, None)  # nothing to draw
        return [part for rows in rows_of.values() for part in split_evenly(rows, most)]

    def _session_of(self, layout: Layout, batch: _Batch, params: ImageSamplingParams) -> _Session:
        """The kept session if its shapes are the batch's, otherwise a new one."""
        weights = tuple((weight.data_ptr(), weight.dtype, weight.device) for weight in self.transformer.parameters())
        key = (len(batch.starts), batch.num_unknown, params, weights)
        if self._session is not None and self._session.key == key and self._session.takes(batch):
            return self._session
        return _Session(self, layout, batch, params, key)

    def _keep(self, session: _Session) -> None:
        """For the next batch; a shape that comes once, as a last batch does, does not replace one that comes again."""
        if self._session is None or not self._session.was_reused or session.key == self._last_key:
            self._session = session
        self._last_key = session.key


class _Batch:
    """What a batch of images starts from: its prompts, to be prefilled, and the tree of its image spans.

    Equal starts share a span, of either half. first_rows [S, N] and code_rows [B or 2 B, N] are the packed rows of
    their codes in the two trees.
    """

    def __init__(
        self, transformer: Transformer, layout: Layout, starts: list[Start], unguided: list[Start], *, fixed: bool
    ) -> None:
        """
        Args:
            transformer, layout: the model.
            starts: of B images.
            unguided: those of their unconditional halves, with the same codes; empty without guidance.
            fixed: whether a graph is captured. Prompts differ from batch to batch, and it must find tensors of the same
                sizes.
        """
        device = transformer.embed.weight.device
        self.starts, self.num_unknown = starts, starts[0][1].count(-1)
        of_start = _indices(starts + unguided)
        if layout.is_bidirectional:
            images = {
                start: ([*layout.text_prompt(start[0]), *layout.image(start[1])], -1, "full") for start in of_start
            }
            self.prefill = SpanTree.build(list(images.values()), device)
            self.tree = SpanTree.build([images[start] for start in starts + unguided], device, fixed=fixed)
        else:
            of_prompt = _indices([prompt for prompt, _ in of_start])
            spans = [(layout.text_prompt(prompt), -1, "causal") for prompt in of_prompt]
            images = {start: (layout.image(start[1]), of_prompt[start[0]], layout.image_mode) for start in of_start}
            self.prefill = SpanTree.build([*spans, *images.values()], device)
            self.tree = SpanTree.build(spans, device, fixed=fixed).extend(
                [images[start] for start in starts + unguided]
            )
        self.first_rows = _code_rows(self.prefill, len(images), layout)
        self.code_rows = _code_rows(self.tree, len(starts + unguided), layout)
        self.rows = torch.tensor([of_start[start] for start in starts], device=device)
        self.unguided = torch.tensor([of_start[start] for start in unguided], device=device)


class _Session:
    """The state of images under way, in tensors that stay where they are from batch to batch.

    state is the batch's ImageRollout, by name; its codes are -1 where none is known. masked is bool [B, N], seeds and
    failed_steps int64 [B]; the prompts are in the cache, the image spans are computed anew at each step.
    """

    def __init__(
        self, decoder: ImageDecoder, layout: Layout, batch: _Batch, params: ImageSamplingParams, key: Hashable
    ) -> None:
        self.transformer, self.layout, self.backend = decoder.transformer, layout, decoder.backend
        self.params, self.key, self.tree = params, key, batch.tree
        self.was_reused = False
        device = self.transformer.embed.weight.device
        num_rows, num_tokens = len(batch.starts), self.layout.num_image_tokens
        codes = torch.full((num_rows, num_tokens), -1, device=device)
        self.state = {item.name: _blank(item.name, codes, params.num_steps) for item in fields(ImageRollout)}
        self.codes = self.state["codes"]
        self.masked = torch.empty(num_rows, num_tokens, dtype=torch.bool, device=device)
        self.seeds, self.failed_steps = (torch.empty(num_rows, dtype=torch.int64, device=device) for _ in range(2))
        self.tokens, self.code_rows = batch.tree.token_ids.clone(), batch.code_rows.clone()
        self.halves = 2 if params.guidance_scale else 1
        self.step_numbers = torch.arange(params.num_steps, device=device)
        self.steps = _changing_steps(num_tokens, batch.num_unknown, params)
        # Room for longer prompts than this batch's.
        room = -(-batch.tree.capacity // 1024) * 1024
        self.cache = None if self.layout.is_bidirectional else self.transformer.new_cache(room)
        self.stale = _Stale(self, batch.tree) if params.ml_cache else None
        # By a weak reference, since memory must be free as soon as the session is dropped, not after a collection.
        later_steps = weakref.WeakMethod(self._later_steps)

        def run() -> None:
            later_steps()()

        self.run_later_steps = device_graph.DeviceGraph(run, device) if batch.tree.fixed else run

    def takes(self, batch: _Batch) -> bool:
        """Whether the batch fits in here; its tree then stands in place of the last one's."""
        has_room = self.cache is None or batch.tree.capacity <= self.cache.capacity
        self.was_reused = has_room and self.tree.load_(batch.tree)
        return self.was_reused

    def draw(self, batch: _Batch, codes: Tensor, seeds: Tensor, progress: Progress) -> None:
        """Draws the images into state, and into failed_steps the first step at which one had no distribution, or
        num_steps."""
        for name, values in self.state.items():
            values.copy_(_blank(name, codes, self.params.num_steps))
        self.tokens.copy_(batch.tree.token_ids)
        self.code_rows.copy_(batch.code_rows)
        self.masked.copy_(codes < 0)
        self.seeds.copy_(seeds)
        self.failed_steps.fill_(self.params.num_steps)
        steps = iter(progress(self.steps))
        if self.stale is not None:
            self.stale.begin()
        else:
            self._step(next(steps), lambda positions: self._first_hidden(batch, positions))
        self._later = steps
        self.run_later_steps()

    def _later_steps(self) -> None:
        for step in self._later:
            self._step(step, functools.partial(self._hidden, step[0]))

    def _step(self, step: Step, hidden_of: Callable[[Tensor], Tensor]) -> None:
        """Draws the masked tokens and masks the least confident of them again; hidden_of [B, U] gives [B * U, D]."""
        number, num_unknown, num_masked, mask_temperature = step
        # As many tokens are masked in every row, so the host knows the shape of positions [B, num_unknown].
        positions = (~self.masked).byte().argsort(dim=1, stable=True)[:, :num_unknown]
        step_number = self.step_numbers[number]
        weight, bias = self.layout.code_ids.rows(self.transformer.head)
        hidden = hidden_of(positions)
        with phase("head"):
            drawn = linear_sample(
                hidden,
                weight,
                bias,
                temperature=self.params.temperature,
                backend=self.backend,
                key=RandomKey(self.seeds.repeat_interleave(num_unknown), step_number, positions.flatten()),
            )
        token, logprob = (values.view(positions.shape) for values in drawn)
        self.codes.scatter_(1, positions, token)
        # A code that is masked again is drawn again: the last draw is the one that was kept.
        self.state["kept_at"].scatter_(1, positions, number)
        self.state["logprob"].scatter_(1, positions, logprob)
        self.state["drawn"][:, number].scatter_(1, positions, token.int())
        failed = (token < 0).any(1)
        self.failed_steps.copy_(torch.where(failed, self.failed_steps.clamp(max=number), self.failed_steps))
        if num_masked:
            masked = mask_topk(
                torch.zeros_like(self.codes, dtype=torch.float32).scatter(1, positions, logprob),
                ~self.masked,
                torch.full_like(self.seeds, num_masked),
                temperature=mask_temperature,
                key=RandomKey(self.seeds, step_number, torch.zeros_like(self.seeds)),
                backend=self.backend,
            )
            self.masked.copy_(masked)

    def _hidden(self, number: int, positions: Tensor) -> Tensor:
        """Guided hidden states [B * U, D] of positions [B, U] in a step."""
        # A masked code may be -1, which is no number of an id.
        image = torch.where(self.masked, self.layout.mask_id, self.layout.code_ids.of(self.codes.clamp(min=0)))
        tokens = self.tokens.index_copy(0, self.code_rows.flatten(), image.repeat(self.halves, 1).flatten())
        rows = self.code_rows.gather(1, positions.repeat(self.halves, 1)).flatten()
        tree = self.tree.with_tokens(tokens)
        with phase("step"):
            hidden = (
                self.transformer(tree, self.cache, rows=rows) if self.stale is None else self.stale(number, tree)[rows]
            )
        if self.halves == 1:
            return hidden
        guided, unguided = hidden.chunk(2)
        return torch.lerp(unguided, guided, 1 + self.params.guidance_scale)

    def _first_hidden(self, batch: _Batch, positions: Tensor) -> Tensor:
        """Before the first draw the images of one start are equal, so each start has one, which its images share."""
        rows = batch.first_rows
        with phase("prefill"):
            hidden = self.transformer(batch.prefill, self.cache, rows=rows.flatten()).view(*rows.shape, -1)
        guided = hidden[batch.rows[:, None], positions].flatten(0, 1)
        if self.halves == 1:
            return guided
        unguided = hidden[batch.unguided[:, None], positions].flatten(0, 1)
        return torch.lerp(unguided, guided, 1 + self.params.guidance_scale)


class _Stale:
    """What an MLCache keeps of sequences: keys, values, hidden states [T, D] and the largest logit of a code [T]."""

    def __init__(self, session: _Session, tree: SpanTree) -> None:
        self._params, self._transformer = session.params, session.transformer
        self._code_ids = session.layout.code_ids
        self._cache = self._transformer.new_cache(tree.capacity)
        self._lengths, settings = tree.lengths, self._params.ml_cache
        # Of L logits those at or below the (1 - ratio) quantile, which is interpolated.
        self._counts = ((self._lengths - 1) * (1 - settings.cache_ratio)).astype(np.int64) + 1
        self._hidden = self._largest = torch.empty(0)
        self._is_empty = True

    def begin(self) -> None:
        """Forgets what was kept: the next step computes all."""
        self._is_empty = True

    def __call__(self, number: int, tree: SpanTree) -> Tensor:
        """Hidden states [T, D] of all tokens of the tree, in a step."""
        if self._is_empty or self._params.ml_cache.computes_all(number, self._params.num_steps):
            self._is_empty = False
            self._hidden = self._transformer(tree, self._cache)
            self._largest = self._largest_logits(self._hidden)
            return self._hidden
        starts = (self._lengths.cumsum() - self._lengths).tolist()
        parts = zip(starts, self._largest.split(self._lengths.tolist()), self._counts.tolist(), strict=True)
        rows = torch.cat([start + part.topk(count, largest=False).indices for start, part, count in parts])
        hidden = self._transformer(tree.only(self._counts, rows), self._cache)
        self._hidden = self._hidden.index_copy(0, rows, hidden)
        self._largest = self._largest.index_copy(0, rows, self._largest_logits(hidden))
        return self._hidden

    def _largest_logits(self, hidden: Tensor) -> Tensor:
        weight, bias = self._code_ids.rows(self._transformer.head)
        parts = [linear(part, weight, bias).amax(1).float() for part in hidden.split(_ROWS_PER_HEAD)]
        return torch.cat(parts)


def _code_rows(tree: SpanTree, num_images: int, layout: Layout) -> Tensor:
    """Packed rows int64 [num_images, N] of the codes of images, which end the tree's last spans."""
    first = (tree.packed_starts + tree.num_new)[-num_images:] - layout.image_length
    return torch.from_numpy(first[:, None] + layout.code_positions).to(tree.token_ids.device)


def _blank(name: str, codes: Tensor, num_steps: int) -> Tensor:
    """A field of ImageRollout before the first step, for codes [B, N], -1 where none is known."""
    if name == "codes":
        return codes
    if name == "drawn":
        return torch.full((len(codes), num_steps, codes.shape[1]), -1, dtype=torch.int32, device=codes.device)
    return torch.zeros_like(codes, dtype=torch.float32) if name == "logprob" else torch.full_like(codes, -1)


def _changing_steps(num_tokens: int, num_unknown: int, params: ImageSamplingParams) -> list[Step]:
    """The steps without those that would draw the one unknown token and mask it again."""
    of_all = num_unknown if params.schedule_unknown else num_tokens
    counts = num_to_mask(of_all, params.num_steps, params.schedule, num_unknown)
    temperatures = mask_temperatures(params.mask_temperature, params.num_steps, params.mask_decay)
    steps = zip(range(params.num_steps), [num_unknown, *counts], counts, temperatures, strict=False)
    return [step for step in steps if step[1] != step[2]]


def _indices(items: Iterable[Hashable]) -> dict[Hashable, int]:
    """Number of each distinct item, in order of appearance."""
    return {item: index for index, item in enumerate(dict.fromkeys(items))}
