"""Images from prompts code by code: a step draws the next code of every image.

Prompts and their unconditional twins are prefilled once and shared by their candidates; a candidate's codes are a
causal leaf with reserved slots. All images move in step, so that one structure and one plan of the
attention serve every step, and on CUDA one graph. Guidance is applied before the head's last layer, since it commutes
with it, and the head runs on the image codes only. Ids between rows of codes, and codes that are known from the start,
are forced; a code depends on those before it alone, so that known codes act as a condition only where they come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hermesflow.engine import device_graph
from hermesflow.engine.decoders.masked import MOST, ImageRollout, Progress
from hermesflow.engine.decoders.passes import MemoryBound, split_evenly
from hermesflow.engine.nan_cause import NotFiniteError, likely_cause
from hermesflow.engine.phases import phase
from hermesflow.engine.token_layout import Layout, check_grid
from hermesflow.engine.transformer import Transformer
from hermesflow.kernels.linear_sample import linear_sample
from hermesflow.kernels.matmul import linear
from hermesflow.kernels.philox import RandomKey
from hermesflow.kernels.span_tree import SpanTree
from hermesflow.kernels.token_sample import token_sample


@dataclass(frozen=True, kw_only=True)
class CodeSamplingParams:
    """How images are drawn code by code.

    guidance_scale g: logits (1 + g) * conditional - g * unconditional, so that a published scale w is g + 1; 0 needs no
    unconditional half. Then temperature divides the logits (0: argmax), top_k keeps the most probable codes (0: all),
    top_p those of which the more probable hold less than it. grid is an image's rows and columns of codes; None: the
    layout's.
    """

    guidance_scale: float
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or 1 / MOST <= self.temperature <= MOST):
            raise ValueError(
                f"CodeSamplingParams: expected temperature of 0 or {1 / MOST:g} to {MOST:g}, got {self.temperature}"
            )
        if type(self.top_k) is not int:
            raise ValueError(f"CodeSamplingParams: expected top_k as a whole number, got {self.top_k!r:.80}")
        ranges = {"top_k": (0, 2**31), "top_p": (0, 1), "guidance_scale": (-MOST, MOST)}
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(
                    f"CodeSamplingParams: expected {name} in [{low:g}, {high:g}], got {getattr(self, name)}"
                )
        if self.grid is not None:
            check_grid("CodeSamplingParams", self.grid)


class AutoregressiveDecoder:
    """Draws images. A candidate's codes are a function of the model, its prompt, its seed and the parameters alone."""

    params = CodeSamplingParams
    keeps_known_codes = True

    def __init__(self, transformer: Transformer, layout: Layout, backend: str | None = None) -> None:
        """Raises: ValueError if the layout's images are not causal."""
        if layout.image_mode != "causal":
            raise ValueError(
                f"AutoregressiveDecoder: draws causal images, the layout's image_mode is {layout.image_mode!r}; give "
                "the model another image_decoder"
            )
        self.transformer, self.layout, self.backend = transformer, layout, backend
        self._memory = MemoryBound("AutoregressiveDecoder", lambda: False, self.release)

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        seeds: Tensor,
        params: CodeSamplingParams,
        *,
        known_codes: Tensor | None = None,
        max_sequences: int = 256,
        progress: Progress = iter,
    ) -> Tensor:
        """Draw the candidates of each prompt.

        Args:
            prompt_ids: P prompts of plain text ids; they may be equal or empty.
            seeds: int64 [P, n], one a candidate.
            params: how to draw.
            known_codes: int64 [P, N], N codes of an image, which each prompt's images keep, -1 where one is drawn; None
                draws all.
            max_sequences: image spans of one pass; a guided candidate is two. Where memory runs out it is halved, for
                later calls too.
            progress: is given the codes' numbers of each pass, and gives them back one by one, as a progress bar does.
        Returns: codes int64 [P, n, N] on the model's device.
        Raises: RuntimeError naming the candidate and the code if the model's logits hold NaN; ValueError on a grid in a
            family that draws one alone.
        """
        return self._draw(prompt_ids, seeds, params, known_codes, max_sequences, progress)[0]

    def rollout(
        self,
        prompt_ids: Sequence[Sequence[int]],
        seeds: Tensor,
        params: CodeSamplingParams,
        *,
        max_sequences: int = 256,
        progress: Progress = iter,
    ) -> ImageRollout:
        """The images of generate, with how they were drawn, each code in a step of its own that keeps it; arguments and
        errors are those of generate. drawn is the codes again, [P, n, 1, N]."""
        codes, logprob = self._draw(prompt_ids, seeds, params, None, max_sequences, progress)
        kept_at = torch.arange(codes.shape[-1], device=codes.device).expand_as(codes)
        return ImageRollout(codes, kept_at, logprob, codes.int().unsqueeze(2))

    def release(self) -> None:
        """Empties torch's cache of CUDA memory; the decoder keeps nothing between calls."""
        if self.transformer.embed.weight.is_cuda:
            torch.cuda.empty_cache()

    def _draw(
        self,
        prompt_ids: Sequence[Sequence[int]],
        seeds: Tensor,
        params: CodeSamplingParams,
        known_codes: Tensor | None,
        max_sequences: int,
        progress: Progress,
    ) -> tuple[Tensor, Tensor]:
        """Codes and their log-probabilities under the law that drew them, [P, n, N] each."""
        num_prompts, num_images = seeds.shape
        device = self.transformer.embed.weight.device
        layout = self.layout.of_sampling(params)
        if known_codes is None:
            known_codes = torch.full((num_prompts, layout.num_image_tokens), -1)
        codes = known_codes.to(device, torch.int64).repeat_interleave(num_images, 0)
        logprob = torch.zeros(codes.shape, device=device)
        failed_at = torch.full((len(codes),), codes.shape[1], device=device)
        flat_seeds = seeds.to(device).flatten()
        halves = 2 if params.guidance_scale else 1

        def draw(rows: list[int]) -> None:
            index = torch.tensor(rows, device=device)
            prompts = [tuple(prompt_ids[row // num_images]) for row in rows]
            images = _Images(self, layout, prompts, params, codes[index], flat_seeds[index])
            images.draw(progress)
            codes[index], logprob[index], failed_at[index] = images.codes, images.logprob, images.failed_at

        undrawn = (codes < 0).any(1).nonzero()[:, 0].tolist()
        # The bound counts images of the model's own grid; larger ones are fewer.
        max_sequences = min(max_sequences, max_sequences * self.layout.image_length // layout.image_length)
        for rows in split_evenly(undrawn, max(1, max_sequences // halves)):
            self._memory.call(rows, draw, halves)
        for row, number in enumerate(failed_at.tolist()):
            if number < codes.shape[1]:
                raise NotFiniteError(
                    f"AutoregressiveDecoder: the model gives no distribution (NaN) for prompt {row // num_images}, "
                    f"image {row % num_images}, code {number}; {likely_cause(self.transformer)}"
                )
        return codes.unflatten(0, (num_prompts, num_images)), logprob.unflatten(0, (num_prompts, num_images))


class _Images:
    """Images that are being drawn, in fixed tensors, since CUDA graphs read them.

    codes int64 [B, N], -1 where none is known; logprob fp32 [B, N]; failed_at int64 [B], the first code that had no
    distribution, or N. hidden [B or 2 B, D] predicts the next code, the guided half first.
    """

    def __init__(
        self,
        decoder: AutoregressiveDecoder,
        layout: Layout,
        prompts: list[tuple[int, ...]],
        params: CodeSamplingParams,
        codes: Tensor,
        seeds: Tensor,
    ) -> None:
        self.transformer, self.backend = decoder.transformer, decoder.backend
        self.params, self.layout, self.seeds = params, layout, seeds
        self.known, self.codes = codes.clone(), codes.clone()
        self.logprob = torch.zeros(codes.shape, device=codes.device)
        self.failed_at = torch.full((len(codes),), codes.shape[1], device=codes.device)
        self.number = torch.zeros((), dtype=torch.int64, device=codes.device)
        self.nowhere = torch.zeros(len(codes), dtype=torch.int64, device=codes.device)
        self.filters = _filters(params, len(codes), codes.device)
        self.code_head = self.transformer.code_head(layout.code_ids)
        self.row_end = torch.tensor(layout.row_end, device=codes.device)
        self._prefill(prompts)

    def _prefill(self, prompts: list[tuple[int, ...]]) -> None:
        """Computes each distinct prompt once, and lays out the leaves."""
        layout, device = self.layout, self.codes.device
        roots = [layout.text_prompt(ids) for ids in prompts]
        roots += [layout.unguided_prompt(ids) for ids in prompts] if self.params.guidance_scale else []
        roots = [(*root, *layout.before_image) for root in roots]
        number = {root: span for span, root in enumerate(dict.fromkeys(roots))}
        parents = [number[root] for root in roots]
        tree = SpanTree.build([(root, -1, "causal") for root in number], device, fixed=device_graph.captures(device))
        rows, columns = layout.image_grid
        room = rows * columns + (rows - 1) * len(layout.row_end)  # the last code is never fed
        leaves = tree.extend([([0], parent, "causal") for parent in parents], reserve=[room - 1] * len(parents))
        self.cache = self.transformer.new_cache(leaves.capacity)
        last = torch.from_numpy(tree.packed_starts + tree.num_new - 1).to(device)
        with phase("prefill"):
            hidden = self.transformer(tree, self.cache, rows=last)
        self.hidden = hidden[torch.tensor(parents, device=device)]
        self.num_visible = torch.zeros(len(parents), dtype=torch.int64, device=device)
        self.tokens = torch.zeros(len(parents), dtype=torch.int64, device=device)
        self.num_fed = 0
        spans = range(tree.num_spans, leaves.num_spans)
        self.leaves = leaves.decode(list(spans), self.tokens, self.num_visible + 1)

    def draw(self, progress: Progress) -> None:
        """Draws all codes."""
        device, columns = self.codes.device, self.layout.image_grid[1]
        next_code = device_graph.DeviceGraph(self._next_code, device)
        next_row = device_graph.DeviceGraph(self._next_row, device)
        numbers = iter(progress(list(range(self.codes.shape[1]))))
        next(numbers)
        self._draw_code()
        for number in numbers:
            (next_row if number % columns == 0 and len(self.row_end) else next_code)()

    def _next_code(self) -> None:
        self._feed(self.tokens)
        self._draw_code()

    def _next_row(self) -> None:
        self._feed(self.tokens)
        for token in self.row_end:
            self._feed(token.expand_as(self.tokens))
        self._draw_code()

    def _feed(self, tokens: Tensor) -> None:
        self.num_visible += 1
        self.num_fed += 1
        # One captured graph serves every number of tokens, so it has no bound.
        most = None if self.leaves.fixed else self.num_fed
        leaves = self.leaves.with_tokens(tokens, self.num_visible, most)
        with phase("step"):
            self.hidden.copy_(self.transformer(leaves, self.cache))

    def _draw_code(self) -> None:
        with phase("head"):
            drawn, logprob = self._sampled()
        at = self.number.expand(len(drawn), 1)
        known = self.known.gather(1, at)[:, 0]
        code = torch.where(known < 0, drawn, known)
        self.failed_at.copy_(torch.where(code < 0, self.failed_at.clamp(max=self.number), self.failed_at))
        code = code.clamp(min=0)
        self.codes.scatter_(1, at, code[:, None])
        self.logprob.scatter_(1, at, logprob.masked_fill(known >= 0, 0.0)[:, None])
        self.tokens.copy_(self.layout.code_ids.of(code).repeat(len(self.tokens) // len(code)))
        self.number += 1

    def _sampled(self) -> tuple[Tensor, Tensor]:
        """A code of each image and its log-probability, [B] each."""
        head, guidance = self.code_head, self.params.guidance_scale
        key = RandomKey(self.seeds, self.number, self.nowhere)
        hidden = head.inputs(self.hidden)
        if guidance:
            guided, unguided = hidden.chunk(2)
            hidden = torch.lerp(unguided, guided, 1 + guidance)
        if self.filters is None:
            temperature = self.params.temperature
            options = {"temperature": temperature, "key": key, "backend": self.backend}
            return linear_sample(hidden, head.weight, head.bias, **options)
        logits = linear(hidden, head.weight, head.bias)
        return token_sample(logits, **self.filters, key=key, backend=self.backend)


def _filters(params: CodeSamplingParams, num_rows: int, device: torch.device) -> dict[str, Tensor] | None:
    """token_sample's settings of all rows; None where nothing is filtered."""
    if params.top_k == 0 and params.top_p == 1:
        return None
    return {
        "temperature": torch.full((num_rows,), float(params.temperature), device=device),
        "top_k": torch.full((num_rows,), params.top_k, device=device),
        "top_p": torch.full((num_rows,), float(params.top_p), device=device),
        "min_p": torch.zeros(num_rows, device=device),
    }
