"""Images as latents: rows of numbers in place of tokens, in and out of a transformer.

Source: BAGEL (arXiv 2505.14683) for the input (projection + time + place) and the output (velocity); the time embedding
is the sinusoid of diffusion models (arXiv 2006.11239), cosine first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hermesflow.engine.transformer import Embeds, Transformer, TransformerConfig
from hermesflow.kernels.span_tree import SpanTree

_FREQUENCIES, _LONGEST = 128, 10_000.0


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """size: numbers of a latent. side: rows, and columns, of the table of places."""

    size: int
    side: int

    def __post_init__(self) -> None:
        if not (1 <= self.size <= 2**16 and 1 <= self.side <= 2**12):
            raise ValueError(
                f"LatentConfig: expected size to 65536 and side to 4096, at least 1, got {self.size} and {self.side}"
            )


class NoisedImages(NamedTuple):
    """B images of latents, all of one grid, in S spans of a pass.

    latents: fp32 [B, N, C], noised to their times.
    times: fp32 [B], or one of all, 0-dim, from 0 (the image) to 1 (noise).
    grid: rows and columns of the N latents.
    rows: int64 [S, N], where they stand among the pass's tokens. S is a multiple of B: images stand in the spans in
        their order, and again. Their spans are the last of the pass.
    """

    latents: Tensor
    times: Tensor
    grid: tuple[int, int]
    rows: Tensor


class FlowTransformer(Transformer):
    """A transformer that draws latents by a flow: of noised images it gives the velocities noise - image."""

    def forward_images(
        self,
        tree: SpanTree,
        images: NoisedImages,
        cache: Any = None,
        embeds: Embeds | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One pass over a tree that has noised images in it.

        Args:
            tree, embeds: as in forward; embeds are those of other tokens.
            images: what stands in its last spans.
            cache: of new_flow_cache; None: every span is new.
            rows: int64 [R] of others whose hidden states are wanted; None: of none.
        Returns: velocities fp32 [S, N, C], and hidden states [R, D]; both are differentiable.
        Raises: ValueError on a grid that is too large.
        """
        raise NotImplementedError(f"{type(self).__name__}: does not say how it draws")

    def prefill(self, tree: SpanTree, cache: Any) -> None:
        """Caches the text of a tree, which images will follow."""
        self(tree, cache)

    def new_flow_cache(self, capacity: int) -> Any:
        """A cache of capacity token slots for passes with images."""
        return self.new_cache(capacity)


class LatentTransformer(FlowTransformer):
    """In latent rows stand embeddings, and their hidden states give velocities."""

    def __init__(self, config: TransformerConfig, latents: LatentConfig) -> None:
        super().__init__(config)
        self.latents, width = latents, config.hidden_size
        self.latent_in, self.latent_out = nn.Linear(latents.size, width), nn.Linear(width, latents.size)
        self.time = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.latent_places = nn.Embedding(latents.side**2, width)
        self.latent_places.weight.requires_grad_(False)

    def init_weights(self, generator: torch.Generator, std: float = 0.02) -> LatentTransformer:
        """As in Transformer, and the table of places by its formula."""
        super().init_weights(generator, std)
        with torch.no_grad():
            self.latent_places.weight.copy_(place_table(self.latents.side, self.config.hidden_size))
        return self

    def skeleton(self) -> LatentTransformer:
        """See Transformer."""
        return LatentTransformer(self.config, self.latents)

    def latent_embeds(self, latents: Tensor, times: Tensor, places: Tensor) -> Tensor:
        """What stands in latent rows.

        Args:
            latents: fp32 [R, size], noised to their times.
            times: fp32 [R], or one of all rows, 0-dim, from 0 (the image) to 1 (noise).
            places: int64 [R]; see places_of.
        Returns: [R, D] in the weights' dtype; differentiable.
        """
        return embed_latents(self.latent_parts, latents, times, places)

    @property
    def latent_parts(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """What latent_embeds passes through."""
        return self.latent_in, self.time, self.latent_places

    def forward_images(
        self,
        tree: SpanTree,
        images: NoisedImages,
        cache: Any = None,
        embeds: Embeds | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See FlowTransformer."""
        own, places = images.rows.flatten(), self.places_of(images.grid)
        count, times = len(places), images.times

        def with_images() -> Embeds:
            of_rows = times.repeat_interleave(count) if times.dim() else times
            values = self.latent_embeds(images.latents.flatten(0, 1), of_rows, places.repeat(len(images.latents)))
            return joined_embeds((own, values.repeat(len(own) // len(values), 1)), embeds)

        hidden = self(tree, cache, with_images, own if rows is None else torch.cat([own, rows]))
        found = self.velocities(hidden[: len(own)])
        return found.unflatten(0, images.rows.shape), hidden[len(own) :]

    def velocities(self, hidden: Tensor) -> Tensor:
        """Of latent rows' hidden states [R, D] the velocity noise - image, fp32 [R, size]; differentiable."""
        return self.latent_out(hidden).float()

    def places_of(self, grid: tuple[int, int]) -> Tensor:
        """Numbers int64 [rows * columns] of a grid's places in the table. Raises: ValueError if it is too large."""
        rows, columns = grid
        if max(grid) > self.latents.side:
            raise ValueError(
                f"LatentTransformer: expected a grid of at most {self.latents.side} x {self.latents.side} latents, got "
                f"{rows} x {columns}; draw a smaller image"
            )
        down, along = (torch.arange(count, device=self.latent_places.weight.device) for count in grid)
        return (down[:, None] * self.latents.side + along).flatten()


def joined_embeds(first: Embeds, others: Embeds | None) -> Embeds:
    """Both, in the dtype of the first."""
    if others is None:
        return first
    (rows, values), (more_rows, more) = first, others
    return torch.cat([rows, more_rows]), torch.cat([values, more.to(values)])


def embed_latents(parts: tuple[nn.Module, ...], latents: Tensor, times: Tensor, places: Tensor) -> Tensor:
    """LatentTransformer.latent_embeds by its latent_parts, or by a copy of them."""
    latent_in, time, latent_places = parts
    dtype = latent_in.weight.dtype
    # Rows of one time share its embedding.
    distinct, number = times.unique(return_inverse=True) if times.dim() else (times[None], 0)
    return latent_in(latents.to(dtype)) + time(time_waves(distinct).to(dtype))[number] + latent_places(places)


def time_waves(times: Tensor) -> Tensor:
    """fp32 [R] -> [R, 256]: cosines and sines of 128 frequencies from 1 down to 1/10000."""
    exponents = torch.arange(_FREQUENCIES, device=times.device) / _FREQUENCIES
    angles = times[:, None] * torch.exp(-math.log(_LONGEST) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def place_table(side: int, width: int) -> Tensor:
    """Two-dimensional sinusoids fp32 [side^2, width]: half of a row for its column, half for its row, sines first.

    Source: the formula of MAE (arXiv 2111.06377), which BAGEL's tables follow. Raises: ValueError unless 4 divides the
    width.
    """
    if width % 4:
        raise ValueError(f"place_table: expected a width that is a multiple of 4, got {width}")
    omega = 1 / _LONGEST ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    waves = torch.arange(side, dtype=torch.float64)[:, None] * omega
    along = torch.cat([waves.sin(), waves.cos()], dim=1)
    rows, columns = (each.flatten() for each in torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    return torch.cat([along[columns], along[rows]], dim=1).float()


def pack_latents(latents: Tensor) -> Tensor:
    """fp32 [..., N, C] -> int64 [..., N C / 2]: float16, two in the 32 bits of each, as pairs and records keep them.

    Numbers that are not finite, or beyond float16, become its largest. -1 never comes out.
    """
    most = torch.finfo(torch.float16).max
    numbers = latents.detach().float().nan_to_num(nan=most, posinf=most, neginf=-most).clamp(-most, most)
    return numbers.flatten(-2).half().contiguous().view(torch.int32).long()


def unpack_latents(codes: Tensor, size: int) -> Tensor:
    """The inverse: int64 [..., M] -> fp32 [..., 2 M / size, size]; what is -1 becomes NaN."""
    return codes.to(torch.int32).contiguous().view(torch.float16).float().unflatten(-1, (-1, size))


def patchify(latents: Tensor, patch: int) -> Tensor:
    """[..., C, H, W] -> [..., H W / patch^2, patch^2 C]: patches row by row; in each row, column, channel."""
    *batch, channels, height, width = latents.shape
    grid = latents.reshape(*batch, channels, height // patch, patch, width // patch, patch)
    count = len(batch)
    order = [*range(count), *(count + axis for axis in (1, 3, 2, 4, 0))]
    return grid.permute(order).reshape(*batch, height * width // patch**2, patch**2 * channels)


def unpatchify(rows: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """The inverse: [..., N, patch^2 C] and the grid of N patches -> [..., C, H, W]."""
    *batch, _, size = rows.shape
    count, (height, width) = len(batch), grid
    whole = rows.reshape(*batch, height, width, patch, patch, size // patch**2)
    order = [*range(count), *(count + axis for axis in (4, 0, 2, 1, 3))]
    return whole.permute(order).reshape(*batch, size // patch**2, height * patch, width * patch)
