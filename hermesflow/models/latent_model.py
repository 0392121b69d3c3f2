"""Shared by families of published checkpoints that draw latents: an autoencoder in place of an image tokenizer."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hermesflow.engine.decoders.flow import FlowDecoder
from hermesflow.engine.latents import pack_latents, patchify, unpack_latents, unpatchify
from hermesflow.engine.nan_cause import NotFiniteError, likely_cause
from hermesflow.models.checkpoint import CheckpointModel
from hermesflow.models.model import to_pixels
from hermesflow.runtime.files import InputError

PATCH = 2
"""Latents of the autoencoder that a row holds, in each direction."""


class LatentModel(CheckpointModel):
    """Where others have codes it has latents, packed (engine/latents.py)."""

    image_decoder = FlowDecoder
    views_codes = False
    autoencoder_file: str
    """For messages."""

    @cached_property
    def vq_tokenizer(self) -> Any:
        """The autoencoder, in fp32. Raises: InputError if it is unavailable or does not fit."""
        found = self._open_tokenizer(self.engine.device)
        size = found.config.latent_channels * PATCH**2
        if size != self.layout.latent_size:
            raise InputError(
                f"{self.folder}: {self.autoencoder_file} gives latents of {size} numbers, the model draws "
                f"{self.layout.latent_size}; give the model's own"
            )
        return found

    @torch.no_grad()
    def encode_images(self, images: np.ndarray) -> Tensor:
        """uint8 [n, H, W, 3] with H and W multiples of a row's pixels -> packed latents int64 [n, M]."""
        if not len(images):
            return torch.zeros(0, self.layout.code_length, dtype=torch.int64)
        pixels, coder = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2), self.vq_tokenizer
        batches = pixels.split(coder.images_per_pass(*pixels.shape[2:]))
        latents = [coder.encode(batch.to(coder.device, coder.dtype) / 127.5 - 1) for batch in batches]
        return pack_latents(patchify(self._finite(torch.cat(latents).float()), PATCH))

    @torch.no_grad()
    def decode_images(self, codes: Tensor, height: int | None = None, width: int | None = None) -> np.ndarray:
        """Packed latents int64 [n, M] -> uint8 [n, H, W, 3]; height and width in rows of latents, else the layout's."""
        coder, grid = self.vq_tokenizer, (height or self.layout.image_grid[0], width or self.layout.image_grid[1])
        factor = coder.config.downsampling * PATCH
        if not len(codes):
            return np.zeros((0, grid[0] * factor, grid[1] * factor, 3), dtype=np.uint8)
        latents = unpatchify(unpack_latents(codes, self.layout.latent_size), grid, PATCH)
        batches = latents.split(coder.images_per_pass(grid[0] * factor, grid[1] * factor))
        decoded = (self._finite(coder.decode(batch.to(coder.device, coder.dtype))) for batch in batches)
        images = [to_pixels(batch).cpu() for batch in decoded]
        return torch.cat(images).permute(0, 2, 3, 1).numpy()

    def _finite(self, values: Tensor) -> Tensor:
        """The values. Raises: RuntimeError where the autoencoder gave NaN or infinity."""
        if not values.isfinite().all():
            cause = likely_cause(self.vq_tokenizer)
            raise NotFiniteError(
                f"{self.folder / self.autoencoder_file}: the autoencoder gives no finite numbers; {cause}"
            )
        return values
