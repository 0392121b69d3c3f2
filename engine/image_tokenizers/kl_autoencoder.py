"""A KL autoencoder (arXiv 2112.10752): images <-> grids of continuous latents; the defaults are FLUX.1's.

Module names are those of FLUX's ae.safetensors.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hermesflow.engine.image_tokenizers.blocks import Decoder, Encoder, check_ranges, group_norm

_RANGES = {
    "latent_channels": (1, 2**16), "channels": (1, 2**16), "channel_multipliers": (1, 64), "num_res_blocks": (1, 64),
    "num_groups": (1, 2**16),
}  # fmt: skip
_VALUES_PER_PASS = 2**27


@dataclass(frozen=True, kw_only=True)
class KLAutoencoderConfig:
    """Shape of an autoencoder. A latent is scale * (mean - shift)."""

    latent_channels: int = 16
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    """Of each level of the encoder; the decoder's have one more."""
    num_groups: int = 32
    scale: float = 0.3611
    shift: float = 0.1159

    def __post_init__(self) -> None:
        check_ranges(self, _RANGES)

    @property
    def downsampling(self) -> int:
        """Pixels a latent spans in each direction."""
        return 2 ** (len(self.channel_multipliers) - 1)

    def to_dict(self) -> dict[str, Any]:
        """The fields, for a configuration file."""
        return asdict(self)


class KLAutoencoder(nn.Module):
    """Images in [-1, 1] <-> latents, of any rectangle."""

    def __init__(self, config: KLAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        depth, norm = config.num_res_blocks, group_norm(config.num_groups)
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        counts = [depth] * len(widths), [depth + 1] * len(widths)
        self.encoder = Encoder(3, config.channels, widths, counts[0], 2 * config.latent_channels, norm)
        self.decoder = Decoder(config.latent_channels, widths[-1], widths, counts[1], 3, norm)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and of the images that encode takes."""
        return self.encoder.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.encoder.conv_in.weight.device

    def images_per_pass(self, height: int, width: int) -> int:
        """Images of that many pixels that one pass should take: at least one; see ImageTokenizer."""
        return max(1, _VALUES_PER_PASS // (self.config.channels * height * width))

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, 3, H, W] in [-1, 1] -> mean and log-variance [B, C, h, w] of the latents, without scale and shift.

        Raises: ValueError: not three channels, or H or W not a multiple of config.downsampling.
        """
        factor = self.config.downsampling
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"KLAutoencoder: expected images [B, 3, H, W] with H and W multiples of {factor}, got "
                f"{tuple(images.shape)}"
            )
        return self.encoder(images).chunk(2, dim=1)

    def encode(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w]: the mean, so that an image has one. Raises: as
        moments."""
        return self.config.scale * (self.moments(images)[0] - self.config.shift)

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, C, h, w] -> images [B, 3, H, W], about [-1, 1]."""
        return self.decoder(latents / self.config.scale + self.config.shift)
