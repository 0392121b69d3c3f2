"""Passes of preference training for models that draw latents by a flow.

Win and lose are two leaves of one prompt, noised alike: by draws of a time t and noise eps, of which each visit has
masks_per_pair. A latent row's log-probability is -1/2 of the mean square of its velocity's error, and an image's the
mean over its rows and draws, so that the loss of pairs is Diffusion-DPO's (arXiv 2311.12908):

    x_t = (1 - t) x + t eps        l = -1/2 mean (v(x_t, t) - (eps - x))^2        t = shifted sigmoid of a normal number

Draws are pure functions of seed, pair and visit, so that the reference can be computed before training, and a resumed
run repeats them. With complementary_masks every second draw has the time of the one before it, and its noise negated.
elbo_weighting weighs draws so that the sum over an image's numbers bounds its log-likelihood (see flow_weight).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from hermesflow.algorithms.batch import PairBatch, PairVisit
from hermesflow.algorithms.losses import find_loss
from hermesflow.algorithms.packing import PairPacker, TreeBuilder, mask_share
from hermesflow.config import TrainConfig
from hermesflow.engine.flow_schedule import shifted
from hermesflow.engine.latents import FlowTransformer, NoisedImages, unpack_latents
from hermesflow.kernels.linear_logprob import linear_logprob
from hermesflow.models.model import Model

BETA = 500.0
"""Of images, unless train.generation_beta says another: published ones are 100 (Flow-GRPO) to 5000 (Diffusion-DPO)."""
ERRORS = tuple(f"generation/error_t{quarter}" for quarter in (1, 2, 3, 4))
_WIDEST = 3.0
"""Standard deviations of the normal number behind a time, beyond which its density counts as it is there."""


class FlowDraw(NamedTuple):
    """A time, noise fp32 [N, C], and the weight of the log-probability of a row."""

    time: float
    noise: Tensor
    weight: float


@dataclass(frozen=True, kw_only=True)
class LatentBatch(PairBatch):
    """One pass; the rows of its generation side are latents, R in all.

    noised, velocities: fp32 [R, C], what stands in them and what they are to give. times: fp32 [R]. grid: an image's.
    """

    noised: Tensor
    velocities: Tensor
    times: Tensor
    grid: tuple[int, int]

    def further_metrics(self, logprob: Tensor) -> dict[str, Tensor]:
        """generation/error_t1 to _t4: what times of each quarter add to the mean square error of the step's rows."""
        if "generation" not in self.sides:
            return {}
        errors = -2 * self.split(logprob)["generation"]
        quarter = (self.times * 4).long().clamp(max=3)
        sums = errors.new_zeros(4).index_add(0, quarter, errors)
        rows_in_step = self.totals["generation"] * self.num_tokens_of["generation"][0]
        return dict(zip(ERRORS, sums / rows_in_step, strict=True))

    def logprobs(self, transformer: FlowTransformer) -> Tensor:
        """fp32 [T] of all sides: of latent rows -1/2 of the mean square error, of others log-probabilities."""
        parts, head = self.split(self.rows), transformer.head
        latent_rows = parts.pop("generation", None)
        rows = torch.cat(list(parts.values())) if parts else self.rows[:0]
        if latent_rows is None:
            hidden = transformer(self.tree, embeds=self.embeds, rows=rows)
        else:
            velocities, hidden = transformer.forward_images(
                self.tree, self._images(latent_rows), embeds=self.embeds, rows=rows
            )
        hidden_of = dict(zip(parts, hidden.split([len(part) for part in parts.values()]), strict=True))
        found = []
        for name, side in self.sides.items():
            if name == "generation":
                error = velocities.flatten(0, 1) - self.velocities
                found.append(-error.square().mean(dim=1) / 2)
            else:
                found.append(linear_logprob(hidden_of[name], head.weight, side.targets, bias=head.bias))
        return torch.cat(found)

    def _images(self, rows: Tensor) -> NoisedImages:
        """The generation side's, whose latents stand in these rows int64 [R]."""
        shape = (-1, self.grid[0] * self.grid[1])
        times = self.times.view(shape)[:, 0]
        return NoisedImages(self.noised.unflatten(0, shape), times, self.grid, rows.view(shape))


class LatentPacker(PairPacker):
    """See PairPacker."""

    def __init__(self, model: Model, pairs: pa.Table, config: TrainConfig, seed: int) -> None:
        """Arguments are PairPacker's."""
        config = replace(config, generation_beta=config.generation_beta or BETA)
        super().__init__(model, pairs, config, seed)

    def further_metric_names(self, visits: Sequence[PairVisit]) -> list[str]:
        """Errors by time, where a visit has images."""
        return list(ERRORS) if self.num_pairs(visits).get("generation") else []

    def pack(
        self,
        visits: Sequence[PairVisit],
        device: torch.device | str | None = None,
        totals: Mapping[str, int] | None = None,
    ) -> LatentBatch:
        """See PairPacker. Leaves of latents come after all other spans."""
        builder, prompts = TreeBuilder(), {}
        for index, visit in enumerate(visits):
            sides = self._sides_of(visit.pair)
            if "generation" in sides:
                prompt = self._prompt_of(visit)
                prompts[index] = builder.add(prompt, -1, "causal") if prompt else -1
            self._add_asked(builder, index, visit, [side for side in sides if side != "generation"])
        found = [rows for index, prompt in prompts.items() for rows in self._add_leaves(builder, index, visits, prompt)]
        nothing = (torch.zeros(0, self.model.layout.latent_size),) * 2 + (torch.zeros(0),)
        columns = [torch.cat(parts) for parts in zip(*found, strict=True)] if found else nothing
        batch = builder.build_batch(visits, device, totals or {})
        shared = {item.name: getattr(batch, item.name) for item in fields(PairBatch)}
        noised, velocities, times = (part.to(device) for part in columns)
        grid = self.model.layout.image_grid
        return LatentBatch(**shared, noised=noised, velocities=velocities, times=times, grid=grid)

    def _add_leaves(
        self, builder: TreeBuilder, index: int, visits: Sequence[PairVisit], prompt: int
    ) -> list[tuple[Tensor, ...]]:
        """Win and lose under each draw; what LatentBatch holds of each leaf."""
        layout, visit = self.model.layout, visits[index]
        codes = [
            torch.from_numpy(self._tokens[name][visit.pair].astype(np.int64)) for name in ("win_codes", "lose_codes")
        ]
        images = [unpack_latents(each, layout.latent_size) for each in codes]
        ids, found = np.array(layout.image([0] * layout.num_image_tokens)), []
        rng = np.random.default_rng([self.seed, 1, *visit])
        for draw in draw_flow(images[0].shape, self.config, rng, self.model.flow_shift):
            for lose, image in enumerate(images):
                rows = builder.packed + layout.code_positions
                weights = np.full(len(rows), draw.weight)
                builder.predict("generation", index, 2 * index + lose, rows, np.zeros(len(rows)), weights)
                builder.add(ids, prompt, "full", layout.image_place)
                times = torch.full((len(rows),), draw.time)
                found.append((torch.lerp(image, draw.noise, draw.time), draw.noise - image, times))
        return found


def draw_flow(shape: Sequence[int], config: TrainConfig, rng: np.random.Generator, shift: float) -> list[FlowDraw]:
    """The draws of one visit of a pair of images.

    Args:
        shape: (N, C) of an image's latents.
        config: masks_per_pair, complementary_masks and elbo_weighting are used, and whether tokens are averaged.
        rng: the visit's.
        shift: of times towards the noise, as the model was trained.
    Returns: masks_per_pair draws, whose weighted rows add up to the mean over rows and draws.
    """
    is_mean = config.length_normalize or find_loss(config.loss_type).means_over_tokens
    share = 1.0 if is_mean else mask_share(config) / shape[0]
    draws, number = [], 2 if config.complementary_masks else 1
    for _ in range(config.masks_per_pair // number):
        normal = rng.standard_normal()
        time = float(shifted(torch.tensor(1 / (1 + math.exp(-normal)), dtype=torch.float64), shift))
        noise = torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))
        weight = flow_weight(time, normal) * math.prod(shape) if config.elbo_weighting else 1.0
        draws += [FlowDraw(time, sign * noise, share * weight) for sign in (1, -1)[:number]]
    return draws


def flow_weight(time: float, normal: float) -> float:
    """How much a draw's mean square error counts in the evidence lower bound, a number of the image.

    -log p(x) <= integral over t of (1 - t) / t |v - (eps - x)|^2 + a constant, so that a draw of density p(t) weighs
    2 (1 - t) / (t p(t)) times its -1/2 |error|^2. With t the shifted sigmoid of a normal number z, p(t) is
    phi(z) / (t (1 - t)). Source: the variational bound of diffusion models (arXiv 2107.00630) in terms of a flow.
    """
    density = math.exp(-(min(abs(normal), _WIDEST) ** 2) / 2) / math.sqrt(2 * math.pi)
    return 2 * (1 - time) ** 2 / density
