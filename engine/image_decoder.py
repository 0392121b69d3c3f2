"""Images from prompts by parallel decoding (MaskGIT): a step draws all masked tokens and keeps the most confident.

Prompts are prefilled once and shared by their candidates; a step computes the image spans alone, the conditional and
the unconditional ones in one pass. Guidance is applied to hidden states, since it commutes with the linear head, and
the head runs on the masked positions and on the image codes only. Codes that are known from the start are kept
(inpainting); they stand in both branches.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hermesflow.kernels.linear_sample import linear_sample
from hermesflow.kernels.mask_topk import mask_topk
from hermesflow.kernels.philox import RandomKey

from .mask_schedule import mask_temperatures, num_to_mask
from .span_tree import SpanTree
from .token_layout import TokenLayout
from .transformer import Transformer

Prompt = tuple[int, ...]
Watch = Callable[[list], Iterable]
"""Gives back the items of a list, in order and all of them."""
Start = tuple[Prompt, tuple[int, ...]]
"""What an image starts from: its prompt, and its codes, -1 where one is to be drawn."""


@dataclass(frozen=True, kw_only=True)
class ImageSamplingParams:
    """How images are drawn.

    guidance_scale g: logits (1 + g) * conditional - g * unconditional; 0 needs no unconditional half.
    temperature divides the logits (0: argmax); mask_temperature scales the noise on the confidences and decays by
    mask_decay; schedule says how many tokens stay masked. Both are explained in mask_schedule.py.
    """

    num_steps: int
    guidance_scale: float
    mask_temperature: float
    temperature: float = 1.0
    schedule: str = "cosine"
    mask_decay: str = "linear"

    def __post_init__(self) -> None:
        for name in ("temperature", "mask_temperature"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"ImageSamplingParams: expected {name} of at least 0, got {getattr(self, name)}")
        if not abs(self.guidance_scale) < float("inf"):
            raise ValueError(f"ImageSamplingParams: expected a finite guidance_scale, got {self.guidance_scale}")
        num_to_mask(1, self.num_steps, self.schedule)
        mask_temperatures(self.mask_temperature, self.num_steps, self.mask_decay)


class ImageDecoder:
    """Draws images. A candidate's tokens are a function of the model, its prompt, its seed and the parameters alone."""

    def __init__(self, transformer: Transformer, layout: TokenLayout, backend: str | None = None) -> None:
        self.transformer, self.layout, self.backend = transformer, layout, backend

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], seeds: Tensor, params: ImageSamplingParams, *,
        known_codes: Tensor | None = None, max_sequences: int = 256, watch: Watch = iter,
    ) -> Tensor:  # fmt: skip
        """Draw the candidates of each prompt.

        Args:
            prompt_ids: P prompts of plain text ids; they may be equal or empty.
            seeds: int64 [P, n], one a candidate.
            params: how to draw.
            known_codes: int64 [P, num_image_tokens], codes that each prompt's images keep, -1 where one is drawn; None
                draws all.
            max_sequences: image spans that one pass may compute; a guided candidate is two.
            watch: is given the steps of each pass, and gives them back one by one: where a progress bar fits.
        Returns: codes int64 [P, n, num_image_tokens] on the model's device.
        Raises: RuntimeError naming the candidate and the step if the model's logits hold NaN.
        """
        num_prompts, num_images = seeds.shape
        if known_codes is None:
            known_codes = torch.full((num_prompts, self.layout.num_image_tokens), -1)
        known = [tuple(codes) for codes in known_codes.tolist()]
        starts = [(tuple(ids), known[row]) for row, ids in enumerate(prompt_ids) for _ in range(num_images)]
        flat_seeds = seeds.to(self.transformer.embed.weight.device).flatten()
        codes = known_codes.to(flat_seeds.device, torch.int64).repeat_interleave(num_images, 0)
        failed_steps = torch.full_like(flat_seeds, params.num_steps)
        for num_unknown, rows in self._batches(starts, max_sequences // (2 if params.guidance_scale else 1)):
            started = [starts[row] for row in rows]
            drawn = self._decode(started, codes[rows], flat_seeds[rows], num_unknown, params, watch)
            codes[rows], failed_steps[rows] = drawn
        for row, step in enumerate(failed_steps.tolist()):
            if step < params.num_steps:
                raise RuntimeError(
                    f"ImageDecoder: the model gives no distribution (NaN) for prompt {row // num_images}, "
                    f"image {row % num_images}, step {step}; check its weights"
                )
        return codes.view(num_prompts, num_images, self.layout.num_image_tokens)

    @staticmethod
    def _batches(starts: list[Start], batch: int) -> Iterator[tuple[int, list[int]]]:
        """Rows that are drawn together, with the tokens that each has to draw: as many in all, so that shapes agree."""
        rows_of: dict[int, list[int]] = {}
        for row, (_, known) in enumerate(starts):
            rows_of.setdefault(known.count(-1), []).append(row)
        rows_of.pop(0, None)  # nothing to draw
        for num_unknown, rows in rows_of.items():
            for start in range(0, len(rows), max(1, batch)):
                yield num_unknown, rows[start : start + max(1, batch)]

    def _decode(
        self, starts: list[Start], codes: Tensor, seeds: Tensor, num_unknown: int, params: ImageSamplingParams,
        watch: Watch,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Codes [B, N] and the first step [B] at which a draw failed (num_steps: none); codes: those of starts."""
        num_rows, device = len(starts), seeds.device
        batch = _Batch(self.transformer, self.layout, starts, params.guidance_scale)
        image_codes = slice(self.layout.code_offset, self.layout.code_offset + self.layout.codebook_size)
        head = self.transformer.head
        weight, bias = head.weight[image_codes], None if head.bias is None else head.bias[image_codes]

        masked = codes < 0
        failed_steps = torch.full_like(seeds, params.num_steps)
        counts = num_to_mask(codes.shape[1], params.num_steps, params.schedule, num_unknown)
        temperatures = mask_temperatures(params.mask_temperature, params.num_steps, params.mask_decay)
        for step, (num_masked, mask_temperature) in watch(list(enumerate(zip(counts, temperatures, strict=True)))):
            if num_masked == num_unknown:
                continue  # the one unknown token would be drawn and masked again: nothing changes
            # As many tokens are masked in every row, so the host knows the shape of positions [B, num_unknown].
            positions = (~masked).byte().argsort(dim=1, stable=True)[:, :num_unknown]
            hidden = batch.hidden(codes, masked, positions)
            step_number = torch.full((), step, dtype=torch.int64, device=device)
            key = RandomKey(seeds.repeat_interleave(num_unknown), step_number, positions.flatten())
            drawn = linear_sample(
                hidden.flatten(0, 1), weight, bias, temperature=params.temperature, key=key, backend=self.backend
            )
            token, logprob = (values.view(num_rows, num_unknown) for values in drawn)
            codes = codes.scatter(1, positions, token)
            failed_steps = torch.where((token < 0).any(1), failed_steps.clamp(max=step), failed_steps)
            if num_masked:
                masked = mask_topk(
                    torch.zeros(codes.shape, device=device).scatter(1, positions, logprob),
                    ~masked,
                    torch.full_like(seeds, num_masked),
                    temperature=mask_temperature,
                    key=RandomKey(seeds, step_number, torch.zeros_like(seeds)),
                    backend=self.backend,
                )
            num_unknown = num_masked
        return codes, failed_steps


class _Batch:
    """Images under way: prompts cached, image spans recomputed at each step.

    The empty prompt is the condition of every unconditional span; a caller's own empty prompt shares it.
    """

    def __init__(
        self, transformer: Transformer, layout: TokenLayout, starts: list[Start], guidance_scale: float
    ) -> None:
        self.transformer, self.layout, self.guidance_scale = transformer, layout, guidance_scale
        device = transformer.embed.weight.device
        unguided: list[Start] = [((), known) for _, known in starts] if guidance_scale else []
        of_start = _indices(starts + unguided)
        of_prompt = _indices([prompt for prompt, _ in of_start])

        spans = [(layout.text_prompt(prompt), -1, "causal") for prompt in of_prompt]
        images = {start: (layout.masked_image(start[1]), of_prompt[start[0]], "full") for start in of_start}
        self.prefill = SpanTree.build([*spans, *images.values()], device)
        self.tree = SpanTree.build(spans, device).extend([images[start] for start in starts + unguided])
        self.num_shared, self.halves = len(images), 2 if guidance_scale else 1
        self.rows = torch.tensor([of_start[start] for start in starts], device=device)
        self.unguided = torch.tensor([of_start[(), known] for _, known in of_start if unguided], device=device)
        self.soi, self.eoi = (torch.full((len(starts), 1), token, device=device) for token in (layout.soi, layout.eoi))
        self.cache = transformer.new_cache(self.tree.capacity)
        self.started = False

    def hidden(self, codes: Tensor, masked: Tensor, positions: Tensor) -> Tensor:
        """Guided hidden states [B, U, D] of positions [B, U], given codes and masked [B, N], at first as started."""
        if not self.started:
            self.started = True
            return self._first_hidden(positions)
        image = torch.where(masked, self.layout.mask_id, codes + self.layout.code_offset)
        tokens = torch.cat([self.soi, image, self.eoi], dim=1).flatten()
        hidden = self.transformer(self.tree.with_tokens(tokens.repeat(self.halves)), self.cache)
        hidden = hidden.view(self.halves, len(codes), -1, hidden.shape[1])
        rows = torch.arange(len(codes), device=codes.device)[:, None]
        selected = hidden[:, rows, positions + 1]
        return torch.lerp(selected[1], selected[0], 1 + self.guidance_scale) if self.halves == 2 else selected[0]

    def _first_hidden(self, positions: Tensor) -> Tensor:
        """Before the first draw the images of one start are equal, so each start has one, which its images share."""
        num_tokens = self.layout.num_image_tokens
        hidden = self.transformer(self.prefill, self.cache)
        hidden = hidden[-self.num_shared * (num_tokens + 2) :].view(self.num_shared, num_tokens + 2, -1)[:, 1:-1]
        if self.halves == 2:
            hidden = torch.lerp(hidden[self.unguided], hidden, 1 + self.guidance_scale)
        return hidden[self.rows[:, None], positions]


def _indices(items: Iterable[Hashable]) -> dict[Hashable, int]:
    """Number of each distinct item, in order of appearance."""
    return {item: index for index, item in enumerate(dict.fromkeys(items))}
