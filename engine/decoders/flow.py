"""Images from prompts by a flow: a step moves all latents of an image along the velocity that the model gives them.

Prompts are prefilled once and shared by their candidates. An image is a full leaf span of embeddings, which a step
computes anew; its unguided half follows the layout's unguided prompt, or is a root of its own. The guided half runs
alone outside the guidance interval. Noise is a function of seed and place, and guidance is normed image by image, so
that no image depends on others.
Source: BAGEL (arXiv 2505.14683); classifier-free guidance in an interval: arXiv 2404.07724.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hermesflow.engine.decoders.masked import Progress
from hermesflow.engine.decoders.passes import MemoryBound, split_evenly
from hermesflow.engine.flow_schedule import flow_times
from hermesflow.engine.latents import FlowTransformer, NoisedImages, pack_latents, unpack_latents
from hermesflow.engine.nan_cause import NotFiniteError, likely_cause
from hermesflow.engine.phases import phase
from hermesflow.engine.token_layout import Layout, check_grid
from hermesflow.kernels.philox import RandomKey, normal
from hermesflow.kernels.span_tree import SpanTree

RENORMS = ("none", "image", "token")


@dataclass(frozen=True, kw_only=True)
class FlowSamplingParams:
    """How images are drawn.

    num_steps n: times from 1 (noise) to 0, between which n - 1 evaluations step (Euler). shift moves them towards the
    noise. guidance_scale g: velocities (1 + g) * conditional - g * unconditional at times in (guidance_from,
    guidance_to], 0 needs no unconditional half. renorm brings their norm back towards the conditional one's, of an
    "image" or of each "token", by a factor from renorm_least to 1. grid is an image's rows and columns of latents;
    None: the layout's.
    """

    num_steps: int
    guidance_scale: float
    shift: float = 1.0
    guidance_from: float = 0.0
    guidance_to: float = 1.0
    renorm: str = "none"
    renorm_least: float = 0.0
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        flow_times(self.num_steps, self.shift)
        if not abs(self.guidance_scale) <= 1e6:
            raise ValueError(f"FlowSamplingParams: expected a guidance_scale of at most 1e6, got {self.guidance_scale}")
        if self.renorm not in RENORMS:
            raise ValueError(f"FlowSamplingParams: expected renorm as one of {list(RENORMS)}, got {self.renorm!r:.80}")
        for name in ("guidance_from", "guidance_to", "renorm_least"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"FlowSamplingParams: expected {name} in [0, 1], got {getattr(self, name)}")
        if self.grid is not None:
            check_grid("FlowSamplingParams", self.grid)

    def guides(self, time: float) -> bool:
        """Whether the step from this time is guided."""
        return bool(self.guidance_scale) and self.guidance_from < time <= self.guidance_to


class FlowDecoder:
    """Draws latents. A candidate's are a function of the model, its prompt, its seed and the parameters alone."""

    params = FlowSamplingParams
    keeps_known_codes = True

    def __init__(self, transformer: FlowTransformer, layout: Layout, backend: str | None = None) -> None:
        """Raises: ValueError if the transformer draws no latents."""
        if not isinstance(transformer, FlowTransformer):
            raise ValueError(
                f"FlowDecoder: expected a FlowTransformer, got {type(transformer).__name__}; give the model another "
                "image_decoder"
            )
        self.transformer, self.layout, self.backend = transformer, layout, backend
        self._memory = MemoryBound("FlowDecoder", lambda: False, torch.cuda.empty_cache)

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        seeds: Tensor,
        params: FlowSamplingParams,
        *,
        known_codes: Tensor | None = None,
        max_sequences: int = 64,
        progress: Progress = iter,
    ) -> Tensor:
        """Draw the candidates of each prompt.

        Args:
            prompt_ids: P prompts of plain text ids; they may be equal or empty.
            seeds: int64 [P, n], one a candidate.
            params: how to draw.
            known_codes: int64 [P, layout.code_length], latents that each prompt's images keep, packed (pack_latents),
                -1 in those that are drawn; None draws all.
            max_sequences: image spans that one pass may compute; a guided candidate is two. Where memory runs out it is
                halved, for later calls too.
            progress: is given the steps of each pass, and gives them back one by one, as a progress bar does.
        Returns: packed latents int64 [P, n, layout.code_length] on the model's device.
        Raises: as draw.
        """
        size = self.layout.latent_size
        known = None if known_codes is None else unpack_latents(known_codes, size)
        options = {"known": known, "max_sequences": max_sequences, "progress": progress}
        return pack_latents(self.draw(prompt_ids, seeds, params, **options))

    def draw(
        self,
        prompt_ids: Sequence[Sequence[int]],
        seeds: Tensor,
        params: FlowSamplingParams,
        *,
        known: Tensor | None = None,
        noise: Tensor | None = None,
        max_sequences: int = 64,
        progress: Progress = iter,
    ) -> Tensor:
        """As generate, by numbers.

        Args:
            prompt_ids, seeds, params, max_sequences, progress: those of generate.
            known: fp32 [P, N, C], latents that each prompt's images keep, NaN in those that are drawn; None draws all.
                Before each step they are noised to its time.
            noise: fp32 [P, n, N, C], what images start from; None: drawn by their seeds.
        Returns: latents fp32 [P, n, N, C] on the model's device.
        Raises: ValueError on a grid that is too large; RuntimeError naming the candidate and the step if the model
            gives no finite velocity.
        """
        layout, (num_prompts, num_images) = self.layout.of_sampling(params), seeds.shape
        count, size = layout.num_image_tokens, layout.latent_size
        device = self.transformer.embed.weight.device
        key = RandomKey(seeds.to(device).flatten(), *torch.zeros(2, seeds.numel(), dtype=torch.int64, device=device))
        if noise is None:
            noise = normal(key, count * size)
        noise = noise.to(device, torch.float32).reshape(-1, count, size)
        latents = noise.clone()
        if known is None:
            known = torch.full((num_prompts, count, size), torch.nan)
        known = known.to(device, torch.float32).repeat_interleave(num_images, 0)
        prompts = [tuple(ids) for ids in prompt_ids for _ in range(num_images)]
        failed = torch.full((len(latents),), params.num_steps, device=device)
        halves = 2 if params.guidance_scale else 1

        def draw(rows: list[int]) -> None:
            batch = _Batch(self.transformer, layout, [prompts[row] for row in rows], params)
            index = torch.tensor(rows, device=device)
            latents[index], failed[index] = batch.draw(noise[index], known[index], progress)

        for rows in split_evenly(list(range(len(latents))), max(1, max_sequences // halves)):
            self._memory.call(rows, draw, halves)
        for row, step in enumerate(failed.tolist()):
            if step < params.num_steps:
                raise NotFiniteError(
                    f"FlowDecoder: the model gives no finite velocity for prompt {row // num_images}, image "
                    f"{row % num_images}, step {step}; {likely_cause(self.transformer)}"
                )
        return latents.unflatten(0, (num_prompts, num_images))

    def release(self) -> None:
        """Nothing is kept."""


class _Batch:
    """Images that are drawn together, their prompts in a cache."""

    def __init__(
        self, transformer: FlowTransformer, layout: Layout, prompts: list[tuple[int, ...]], params: FlowSamplingParams
    ) -> None:
        self._transformer, self._params, self._grid = transformer, params, layout.image_grid
        device, halves = transformer.embed.weight.device, 2 if params.guidance_scale else 1
        framed = [tuple(layout.text_prompt(ids)) for ids in prompts]
        framed += [tuple(layout.unguided_prompt(ids)) for ids in prompts] * (halves - 1)
        number = {ids: row for row, ids in enumerate(dict.fromkeys(filter(None, framed)))}
        prefix = SpanTree.build([(ids, -1, "causal") for ids in number], device)
        image = layout.image([0] * layout.num_image_tokens)
        spans = [(image, number.get(ids, -1), "full", layout.image_place) for ids in framed]
        self._alone, self._both = prefix.extend(spans[: len(prompts)]), prefix.extend(spans)
        self._cache = transformer.new_flow_cache(self._both.capacity)
        with phase("prefill"):
            transformer.prefill(prefix, self._cache)
        first = torch.arange(len(spans), device=device)[:, None] * layout.image_length
        self._rows = first + torch.from_numpy(layout.code_positions).to(device)

    def draw(self, noise: Tensor, known: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
        """Noise [B, N, C] and what is known of the images -> latents, and the first step [B] at which a velocity was
        not finite, or num_steps."""
        latents, is_known = noise, known.isfinite()
        params, times = self._params, flow_times(self._params.num_steps, self._params.shift)
        failed = torch.full((len(latents),), params.num_steps, device=latents.device)
        for step, (time, following) in enumerate(progress(list(zip(times, times[1:], strict=False)))):
            latents = torch.where(is_known, torch.lerp(known, noise, time), latents)
            with phase("step"):
                velocity = self._velocity(latents, time)
            is_finite = velocity.isfinite().flatten(1).all(1)
            failed = torch.where(is_finite, failed, failed.clamp(max=step))
            latents = latents - velocity * (time - following)
        return torch.where(is_known, known, latents), failed

    def _velocity(self, latents: Tensor, time: float) -> Tensor:
        """fp32 [B, N, C]."""
        is_guided = self._params.guides(time)
        tree, rows = (self._both, self._rows) if is_guided else (self._alone, self._rows[: len(latents)])
        images = NoisedImages(latents, torch.tensor(time, device=latents.device), self._grid, rows)
        velocities, _ = self._transformer.forward_images(tree, images, self._cache)
        return guided_velocity(*velocities.chunk(2), self._params) if is_guided else velocities


def guided_velocity(conditional: Tensor, unconditional: Tensor, params: FlowSamplingParams) -> Tensor:
    """Velocities of images, fp32 [B, N, C] each, guided and renormed by FlowSamplingParams."""
    guided = torch.lerp(unconditional, conditional, 1 + params.guidance_scale)
    if params.renorm == "none":
        return guided
    axes = (1, 2) if params.renorm == "image" else (2,)
    norms = [torch.linalg.vector_norm(each, dim=axes, keepdim=True) for each in (conditional, guided)]
    return guided * (norms[0] / (norms[1] + 1e-8)).clamp(params.renorm_least, 1.0)
