"""Emu3's image tokenizer: a VQGAN for video whose decoder is conditioned on the codes (MoVQ, arXiv 2209.09002).

Source: emu3/tokenizer/modeling_emu3visionvq.py of baaivision/Emu3, whose module names these are. An image is a video of
temporal_downsampling equal frames. They pass the 2-D encoder as one, for they only differ after the first 3-D
convolution, whose padding is zeros. Decoding takes frame 0, which in causal convolutions depends on frame 0 alone, so
the other frames are never made.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hermesflow.engine.image_tokenizers.blocks import (
    Codebook,
    Decoder,
    Encoder,
    ImageTokenizer,
    Norm,
    check_ranges,
    group_norm,
)

_RANGES = {
    "codebook_size": (1, 2**24), "embed_dim": (1, 2**16), "channels": (1, 2**16), "channel_multipliers": (1, 64),
    "num_res_blocks": (1, 64), "attention_levels": (0, 64), "temporal_downsampling": (1, 64), "num_groups": (1, 2**16),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Emu3TokenizerConfig:
    """Shape of an Emu3 tokenizer; the defaults are BAAI/Emu3-VisionTokenizer's (downsampling 8)."""

    codebook_size: int = 32768
    """Number of codes."""
    embed_dim: int = 4
    """Channels of a code and of the latents."""
    channels: int = 256
    """Channels at full resolution are this times the first of channel_multipliers."""
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    """One a level; each level but the last halves the resolution."""
    num_res_blocks: int = 2
    """Of each level and of the time stack of the encoder; the decoder's levels have one more."""
    attention_levels: tuple[int, ...] = (3,)
    """Levels with attention after each block; 0 is the finest. The middle always has it."""
    temporal_downsampling: int = 4
    """Frames a code spans, a power of two."""
    num_groups: int = 32
    """Of the group norms."""

    def __post_init__(self) -> None:
        check_ranges(self, _RANGES)
        if self.temporal_downsampling.bit_count() != 1:
            raise ValueError(
                f"Emu3TokenizerConfig: temporal_downsampling must be a power of two, got {self.temporal_downsampling}"
            )

    @property
    def downsampling(self) -> int:
        """Pixels a token spans in each direction."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of each level, the finest first."""
        return [self.channels * multiplier for multiplier in self.channel_multipliers]

    @property
    def num_time_convs(self) -> int:
        """Convolutions that halve, and that double, the number of frames."""
        return self.temporal_downsampling.bit_length() - 1

    def to_dict(self) -> dict[str, Any]:
        """The fields, for a configuration file."""
        return asdict(self)


class CausalConv3d(nn.Module):
    """Convolution over time, height and width that sees no later frame; all padding is zeros."""

    def __init__(self, channels: int, kernel_size: tuple[int, int, int], time_stride: int = 1) -> None:
        super().__init__()
        padding = (0, *(size // 2 for size in kernel_size[1:]))
        self.conv = nn.Conv3d(channels, channels, kernel_size, stride=(time_stride, 1, 1), padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, h, w] -> [B, C, T', h, w]; two frames of padding in front, whatever the kernel's size."""
        return self.conv(F.pad(x, (0, 0, 0, 0, 2, 0)))


class TimeConv(nn.Module):
    """Causal convolution that changes the number of frames, and SiLU."""

    def __init__(self, channels: int, kernel_frames: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, (kernel_frames, 3, 3), stride)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, h, w] -> [B, C, T / stride, h, w]."""
        return F.silu(self.conv(x))


class RunningBatchNorm(nn.BatchNorm3d):
    """Batch norm by its running statistics, also in training mode: the tokenizer is never trained here."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, h, w] -> the same shape."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class TimeResBlock(nn.Module):
    """Two batch-normalized causal convolutions with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = RunningBatchNorm(channels), CausalConv3d(channels, (3, 3, 3))
        self.norm2, self.conv2 = RunningBatchNorm(channels), CausalConv3d(channels, (3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, h, w] -> the same shape."""
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class SpatialNorm(nn.Module):
    """Group norm whose scale and shift at each position come from the code there (MoVQ, section 3.2)."""

    def __init__(self, channels: int, code_channels: int, norm: Norm) -> None:
        super().__init__()
        self.norm_layer = norm(channels)
        self.conv_y = nn.Conv2d(code_channels, channels, 1)
        self.conv_b = nn.Conv2d(code_channels, channels, 1)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        """x [B, C, H, W], codes [B, code_channels, h, w] -> the shape of x."""
        # A 1x1 convolution and nearest-neighbor resizing commute; before it there are fewer positions.
        scale, shift = (
            F.interpolate(layer(codes), size=x.shape[2:], mode="nearest") for layer in (self.conv_y, self.conv_b)
        )
        return self.norm_layer(x) * scale + shift


class Emu3Encoder(Encoder):
    """Images -> latents of one frame."""

    def __init__(self, config: Emu3TokenizerConfig) -> None:
        super().__init__(
            3,
            config.channels,
            config.widths,
            [config.num_res_blocks] * len(config.widths),
            config.embed_dim,
            group_norm(config.num_groups),
            config.attention_levels,
        )
        self.num_frames = config.temporal_downsampling
        self.time_conv = nn.ModuleList(TimeConv(config.embed_dim, 4, stride=2) for _ in range(config.num_time_convs))
        self.time_res_stack = nn.ModuleList(TimeResBlock(config.embed_dim) for _ in range(config.num_res_blocks))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, H, W] -> z [B, embed_dim, 1, h, w]."""
        z = super().forward(x).unsqueeze(2).repeat(1, 1, self.num_frames, 1, 1)
        for layer in (*self.time_conv, *self.time_res_stack):
            z = layer(z)
        return z


class Emu3Decoder(Decoder):
    """Latents of one frame and their codes -> images."""

    def __init__(self, config: Emu3TokenizerConfig) -> None:
        super().__init__(
            config.embed_dim,
            config.widths[-1],
            config.widths,
            [config.num_res_blocks + 1] * len(config.widths),
            3,
            lambda channels: SpatialNorm(channels, config.embed_dim, group_norm(config.num_groups)),
            config.attention_levels,
        )
        self.time_res_stack = nn.ModuleList(TimeResBlock(config.embed_dim) for _ in range(config.num_res_blocks))
        self.time_conv = nn.ModuleList(TimeConv(config.embed_dim, 3) for _ in range(config.num_time_convs))

    def forward(self, z: Tensor, codes: Tensor) -> Tensor:
        """z and codes [B, embed_dim, 1, h, w] -> [B, 3, H, W]; both pass the time stack."""
        both = torch.cat([z, codes])
        for layer in (*self.time_res_stack, *self.time_conv):
            both = layer(both)
        return super().forward(*both.squeeze(2).chunk(2))


class Emu3Tokenizer(ImageTokenizer):
    """Images in [-1, 1] <-> grids of learned codes, of any rectangle."""

    def __init__(self, config: Emu3TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Emu3Encoder(config)
        self.decoder = Emu3Decoder(config)
        self.quantize = Codebook(config.codebook_size, config.embed_dim)
        self.quant_conv = CausalConv3d(config.embed_dim, (3, 1, 1))
        self.post_quant_conv = CausalConv3d(config.embed_dim, (3, 1, 1))

    def images_to_latent(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] -> z [B, embed_dim, h, w]."""
        return self.quant_conv(self.encoder(images)).squeeze(2)

    def latent_to_codes(self, z: Tensor) -> Tensor:
        """z [B, embed_dim, h, w] -> nearest codes int64 [B, h * w]."""
        return self.quantize.nearest(z)

    def codes_to_latent(self, codes: Tensor, height: int, width: int) -> Tensor:
        """codes int64 [B, h * w] -> latent [B, embed_dim, h, w] in the weights' dtype."""
        return self.quantize.lookup(codes, height, width)

    def decode_latent(self, z: Tensor) -> Tensor:
        """Quantized latent [B, embed_dim, h, w] -> images [B, 3, H, W]."""
        codes = z.unsqueeze(2)
        return self.decoder(self.post_quant_conv(codes), codes)
