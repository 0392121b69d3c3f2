"""Passes of preference training for models that regress an image's features (engine/decoders/features.py).

A prompt and its image are computed once, for win and lose are targets alone: of the features f behind the prompt,
log p(z) = -|L^-1 (f - z)|^2 / 2, an image's whole log-probability. The ratio of policy and reference is linear in f, so
that the preference alone has no minimum: train.nll_weight, the distance to the win, gives it one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from hermesflow.algorithms.batch import PairBatch, PairVisit
from hermesflow.algorithms.packing import PairPacker, TreeBuilder
from hermesflow.config import TrainConfig
from hermesflow.engine.decoders.features import FeatureTransformer
from hermesflow.engine.latents import unpack_latents
from hermesflow.kernels.linear_logprob import linear_logprob
from hermesflow.models.model import Model
from hermesflow.runtime.files import InputError


@dataclass(frozen=True, kw_only=True)
class FeatureBatch(PairBatch):
    """One pass; its generation side has a token for each image.

    image_rows: int64 [V, n] of the visits' images. samples: fp32 [V, 2, n, F], of win and lose.
    """

    image_rows: Tensor
    samples: Tensor

    def logprobs(self, transformer: FeatureTransformer) -> Tensor:
        """fp32 [T] of all sides."""
        rows = {name: part for name, part in self.split(self.rows).items() if name != "generation"}
        wanted, sizes = [self.image_rows.flatten(), *rows.values()], [self.image_rows.numel(), *map(len, rows.values())]
        hidden = transformer(self.tree, embeds=self.embeds, rows=torch.cat(wanted))
        of_images, *others = hidden.split(sizes)
        hidden_of, found, head = dict(zip(rows, others, strict=True)), [], transformer.head
        for name, side in self.sides.items():
            if name == "generation":
                features = transformer.features(of_images.unflatten(0, self.image_rows.shape))
                found.append(transformer.noise.logprob(features[:, None], self.samples).flatten())
            else:
                found.append(linear_logprob(hidden_of[name], head.weight, side.targets, bias=head.bias))
        return torch.cat(found)


class FeaturePacker(PairPacker):
    """See PairPacker."""

    def __init__(self, model: Model, pairs: pa.Table, config: TrainConfig, seed: int) -> None:
        """Arguments are PairPacker's. Raises: InputError on a loss of images without a minimum."""
        if config.generation_weight and config.preference_weight and not config.nll_weight:
            raise InputError(
                "train.nll_weight: expected more than 0 with a model that regresses an image's features, for their "
                "preference alone has no minimum; set about train.beta"
            )
        super().__init__(model, pairs, config, seed)

    def num_tokens(self, visit: PairVisit) -> int:
        """See PairPacker."""
        saved = self.model.layout.image_length if "generation" in self._sides_of(visit.pair) else 0
        return super().num_tokens(visit) - saved

    def pack(
        self,
        visits: Sequence[PairVisit],
        device: torch.device | str | None = None,
        totals: Mapping[str, int] | None = None,
    ) -> FeatureBatch:
        """See PairPacker."""
        builder, layout, rows, samples = TreeBuilder(), self.model.layout, [], []
        for index, visit in enumerate(visits):
            sides = self._sides_of(visit.pair)
            if "generation" in sides:
                prompt = builder.add(self._prompt_of(visit), -1, "causal")
                rows.append(builder.packed + layout.code_positions)
                for lose, name in enumerate(("win_codes", "lose_codes")):
                    codes = torch.from_numpy(self._tokens[name][visit.pair].astype(np.int64))
                    samples.append(unpack_latents(codes, layout.latent_size))
                    last = rows[-1][-1:]
                    builder.predict("generation", index, 2 * index + lose, last, np.zeros(1), np.ones(1))
                builder.add(layout.image([0] * layout.num_image_tokens), prompt, "causal")
            self._add_asked(builder, index, visit, [side for side in sides if side != "generation"])
        batch = builder.build_batch(visits, device, totals or {})
        shared = {item.name: getattr(batch, item.name) for item in fields(PairBatch)}
        image = layout.num_image_tokens, layout.latent_size
        return FeatureBatch(
            **shared,
            image_rows=torch.from_numpy(np.array(rows, dtype=np.int64).reshape(-1, image[0])).to(device),
            samples=(torch.stack(samples) if samples else torch.zeros(0, *image)).view(-1, 2, *image).to(device),
        )
