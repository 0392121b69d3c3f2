"""Images as features that a transformer regresses: a fixed run of tokens behind a prompt, and what is made of it.

The tokens are known beforehand, so that all of an image is one pass, which the candidates of a prompt share. They
differ by noise, as samples of a Gaussian around the features: z = f + temperature * L eps, eps a function of the seed.
log p(z) = -|L^-1 (f - z)|^2 / 2 up to a constant, in the directions that the noise has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hermesflow.engine.decoders.masked import Progress
from hermesflow.engine.decoders.passes import MemoryBound, split_evenly
from hermesflow.engine.latents import pack_latents
from hermesflow.engine.nan_cause import NotFiniteError, likely_cause
from hermesflow.engine.phases import phase
from hermesflow.engine.token_layout import Layout
from hermesflow.engine.transformer import Transformer
from hermesflow.kernels.philox import RandomKey, normal
from hermesflow.kernels.span_tree import SpanTree


@dataclass(frozen=True, kw_only=True)
class FeatureSamplingParams:
    """temperature: how much noise a candidate has; 0 makes those of a prompt alike."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"FeatureSamplingParams: expected a temperature from 0 to 100, got {self.temperature}")


class FeatureNoise(nn.Module):
    """L: what samples add to features [n, F], in r directions, or in all of them."""

    def __init__(self, scales: Tensor, directions: Tensor | None = None) -> None:
        """
        Args:
            scales: fp32 [r], standard deviations; [1] of white noise.
            directions: fp32 [r, n F], orthonormal; None: white noise.
        """
        super().__init__()
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("directions", directions, persistent=False)

    def draw(self, seeds: Tensor, shape: tuple[int, int]) -> Tensor:
        """Noise fp32 [S, n, F] of seeds int64 [S]."""
        key = RandomKey(seeds, *torch.zeros(2, len(seeds), dtype=torch.int64, device=seeds.device))
        if self.directions is None:
            return normal(key, shape[0] * shape[1]).unflatten(1, shape) * self.scales
        return ((normal(key, len(self.scales)) * self.scales) @ self.directions).unflatten(1, shape)

    def coordinates(self, features: Tensor) -> Tensor:
        """fp32 [..., n, F] -> [..., k], in standard deviations."""
        flat = features.flatten(-2)
        return flat / self.scales if self.directions is None else flat @ self.directions.T / self.scales

    def logprob(self, features: Tensor, samples: Tensor) -> Tensor:
        """Of samples around features, fp32 [..., n, F] each -> [...], up to a constant; differentiable."""
        return -self.coordinates(features - samples).square().sum(-1) / 2


class FeatureTransformer(Transformer):
    """A transformer whose hidden states of an image's tokens give features."""

    noise: FeatureNoise

    def features(self, hidden: Tensor) -> Tensor:
        """Hidden states [S, n, D] of images' tokens -> fp32 [S, n, F]; differentiable."""
        raise NotImplementedError(f"{type(self).__name__}: does not say what its hidden states give")


class FeatureDecoder:
    """Draws features. A candidate's are a function of the model, its prompt, its seed and the temperature alone."""

    params = FeatureSamplingParams
    keeps_known_codes = False

    def __init__(self, transformer: FeatureTransformer, layout: Layout, backend: str | None = None) -> None:
        self.transformer, self.layout, self.backend = transformer, layout, backend
        self._memory = MemoryBound("FeatureDecoder", lambda: False, torch.cuda.empty_cache)

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        seeds: Tensor,
        params: FeatureSamplingParams,
        *,
        known_codes: Any = None,
        max_sequences: int = 64,
        progress: Progress = iter,
    ) -> Tensor:
        """Draw the candidates of each prompt.

        Args:
            prompt_ids: P prompts of plain text ids.
            seeds: int64 [P, n], one a candidate.
            params: how to draw.
            known_codes: None.
            max_sequences: prompts that one pass may compute. Where memory runs out it is halved, for later calls too.
            progress: is given the passes, and gives them back one by one, as a progress bar does.
        Returns: packed features int64 [P, n, layout.code_length] on the model's device.
        Raises: RuntimeError naming the prompt if the model gives no finite features.
        """
        shape = self.layout.num_image_tokens, self.layout.latent_size
        drawn = self.features(prompt_ids, max_sequences, progress)[:, None]
        noise = self.transformer.noise.draw(seeds.to(drawn.device).flatten(), shape).unflatten(0, seeds.shape)
        return pack_latents(drawn + params.temperature * noise)

    def features(
        self, prompt_ids: Sequence[Sequence[int]], max_sequences: int = 64, progress: Progress = iter
    ) -> Tensor:
        """Of each prompt, without noise, fp32 [P, n, F]. Raises: as generate."""
        device, layout = self.transformer.embed.weight.device, self.layout
        found = torch.empty(len(prompt_ids), layout.num_image_tokens, layout.latent_size, device=device)
        image = layout.image([0] * layout.num_image_tokens)

        def draw(rows: list[int]) -> None:
            spans = [([*layout.text_prompt(prompt_ids[row]), *image], -1, "causal") for row in rows]
            tree = SpanTree.build(spans, device)
            first = torch.from_numpy(tree.packed_starts + tree.lengths).to(device) - len(image)
            places = first[:, None] + torch.from_numpy(layout.code_positions).to(device)
            with phase("step"):
                hidden = self.transformer(tree, rows=places.flatten())
                found[torch.tensor(rows, device=device)] = self.transformer.features(hidden.view(*places.shape, -1))

        for rows in progress(list(split_evenly(list(range(len(prompt_ids))), max(1, max_sequences)))):
            self._memory.call(rows, draw, 1)
        failed = (~found.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        if failed:
            raise NotFiniteError(
                f"FeatureDecoder: the model gives no finite features for prompt {failed[0]}; "
                f"{likely_cause(self.transformer)}"
            )
        return found

    def release(self) -> None:
        """Nothing is kept."""
