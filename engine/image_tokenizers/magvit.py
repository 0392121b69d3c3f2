"""Lookup-free-quantization image tokenizer: the architecture of MAGVIT-v2 as Show-o uses it, other sizes by config.

Encoder and decoder are residual convolution stacks; the latent's signs are the code (LFQ, arXiv 2310.05737): channel i
of code_bits carries the bit 2 ** (code_bits - 1 - i). Module names follow the published state dict.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Wider than any model, and narrow enough that a damaged configuration asks for no endless work.
_RANGES = {
    "code_bits": (1, 24), "channels": (1, 2**16), "channel_multipliers": (1, 64), "num_res_blocks": (0, 64),
    "num_groups": (1, 2**16), "patch_size": (1, 64),
}  # fmt: skip
_MAX_LEVELS = 8


@dataclass(frozen=True, kw_only=True)
class VQTokenizerConfig:
    """Shape of a tokenizer; the defaults are Show-o's MAGVIT-v2 (downsampling 16, 13 bits).

    patch_size folds pixels into channels before the first convolution (1: none); each level of channel_multipliers but
    the last halves the resolution.
    """

    code_bits: int = 13
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4, 4)
    num_res_blocks: tuple[int, ...] = (4, 3, 4, 3, 4)
    num_groups: int = 32
    patch_size: int = 1

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not all(low <= number <= high for number in (value if isinstance(value, tuple) else (value,))):
                raise ValueError(f"VQTokenizerConfig: {name} must lie in [{low}, {high}], got {value!r:.80}")
        levels = len(self.channel_multipliers)
        if not 1 <= levels <= _MAX_LEVELS:
            raise ValueError(f"VQTokenizerConfig: expected 1 to {_MAX_LEVELS} channel_multipliers, got {levels}")
        if len(self.num_res_blocks) != levels:
            raise ValueError(
                f"VQTokenizerConfig: num_res_blocks and channel_multipliers need one entry a level, "
                f"got {self.num_res_blocks!r:.80} and {self.channel_multipliers}"
            )

    @property
    def downsampling(self) -> int:
        """Pixels a token spans in each direction."""
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return 2**self.code_bits

    def to_dict(self) -> dict[str, Any]:
        """The fields, for a configuration file."""
        return asdict(self)


class ResBlock(nn.Module):
    """Two normalized 3x3 convolutions with a residual."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, num_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, num_groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C', h, w]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class SpatialAttention(nn.Module):
    """Single-head attention over all positions."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, num_groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> the same shape."""
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(out)


class Encoder(nn.Module):
    """Images -> latents before quantization."""

    def __init__(self, config: VQTokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = nn.Conv2d(3 * config.patch_size**2, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        width = config.channels
        for level, out in enumerate(widths):
            stage = nn.Module()
            stage.block = nn.ModuleList()
            for _ in range(config.num_res_blocks[level]):
                stage.block.append(ResBlock(width, out, config.num_groups))
                width = out
            if level < len(widths) - 1:
                stage.downsample = Downsample(width)
            self.down.append(stage)
        self.mid = _middle(width, config.num_groups)
        self.norm_out = _norm(width, config.num_groups)
        self.conv_out = nn.Conv2d(width, config.code_bits, 3, padding=1)
        self.quant_conv = nn.Conv2d(config.code_bits, config.code_bits, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3 * patch_size ** 2, h, w] -> z [B, code_bits, h / 2 ** levels, w / 2 ** levels]."""
        x = self.conv_in(x)
        for stage in self.down:
            for block in stage.block:
                x = block(x)
            if hasattr(stage, "downsample"):
                x = stage.downsample(x)
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(x))))


class Decoder(nn.Module):
    """Quantised latents -> images."""

    def __init__(self, config: VQTokenizerConfig) -> None:
        super().__init__()
        multipliers = config.channel_multipliers
        width = config.channels * multipliers[-1]
        # A level is as wide and deep as the encoder's next finer one: the published decoder narrows, then upsamples.
        finer = [max(level - 1, 0) for level in range(len(multipliers))]
        self.post_quant_conv = nn.Conv2d(config.code_bits, config.code_bits, 1)
        self.conv_in = nn.Conv2d(config.code_bits, width, 3, padding=1)
        self.mid = _middle(width, config.num_groups)
        stages = []
        for level in reversed(range(len(multipliers))):
            stage, out = nn.Module(), config.channels * multipliers[finer[level]]
            stage.block = nn.ModuleList()
            for _ in range(config.num_res_blocks[finer[level]]):
                stage.block.append(ResBlock(width, out, config.num_groups))
                width = out
            if level > 0:
                stage.upsample = Upsample(width)
            stages.append(stage)
        self.up = nn.ModuleList(reversed(stages))
        self.norm_out = _norm(width, config.num_groups)
        self.conv_out = nn.Conv2d(width, 3 * config.patch_size**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """z [B, code_bits, h, w] -> [B, 3 * patch_size ** 2, h * 2 ** levels, w * 2 ** levels]."""
        x = self.conv_in(self.post_quant_conv(z))
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        for stage in reversed(self.up):
            for block in stage.block:
                x = block(x)
            if hasattr(stage, "upsample"):
                x = stage.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Downsample(nn.Module):
    """Halves the resolution: 3x3 convolution of stride 2 after one pixel of padding at the right and bottom."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C, h / 2, w / 2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the resolution: nearest neighbor, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C, 2 h, 2 w]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class VQTokenizer(nn.Module):
    """Images in [-1, 1] <-> grids of codes."""

    def __init__(self, config: VQTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @staticmethod
    def images_per_pass(height: int, width: int) -> int:
        """Images of that many pixels that one pass should take: at least one, else about 2 ** 20 pixels (4 GiB)."""
        return max(1, 2**20 // (height * width))

    def encode_latent(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> z [B, code_bits, h, w] before quantization.

        Raises:
            ValueError: not three channels, or H or W not a multiple of config.downsampling.
        """
        factor = self.config.downsampling
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"VQTokenizer: expected images [B, 3, H, W] with H and W multiples of {factor}, "
                f"got {tuple(images.shape)}"
            )
        return self.encoder(F.pixel_unshuffle(images, self.config.patch_size))

    def encode(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> codes int64 [B, h * w], row by row."""
        return self.latent_to_codes(self.encode_latent(images))

    def latent_to_codes(self, z: Tensor) -> Tensor:
        """z [B, code_bits, h, w] -> codes int64 [B, h * w]: a bit is set where its channel is positive."""
        return ((z > 0).long() * self._bit_values(z.device)[:, None, None]).sum(1).flatten(1)

    def decode(self, codes: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """codes int64 [B, h * w] -> images [B, 3, H, W], about [-1, 1]; height and width in tokens, else a square.

        Raises:
            ValueError: a grid that does not fit, or a code outside [0, codebook_size).
        """
        side = int(codes.shape[1] ** 0.5)
        height, width = height or side, width or side
        if height * width != codes.shape[1]:
            raise ValueError(
                f"VQTokenizer: {codes.shape[1]} codes do not make a {height} x {width} grid; pass height and width"
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.config.codebook_size:
            raise ValueError(
                f"VQTokenizer: codes must lie in [0, {self.config.codebook_size}), "
                f"got [{int(codes.min())}, {int(codes.max())}]"
            )
        return self.decode_latent(self.codes_to_latent(codes, height, width))

    def codes_to_latent(self, codes: Tensor, height: int, width: int) -> Tensor:
        """codes int64 [B, h * w] -> latent of +1 and -1, [B, code_bits, h, w] in the weights' dtype."""
        bits = (codes[:, None, :] & self._bit_values(codes.device)[:, None]) != 0
        dtype = self.decoder.conv_in.weight.dtype
        return (bits.to(dtype) * 2 - 1).view(len(codes), self.config.code_bits, height, width)

    def decode_latent(self, z: Tensor) -> Tensor:
        """z [B, code_bits, h, w] -> images [B, 3, H, W]."""
        return F.pixel_shuffle(self.decoder(z), self.config.patch_size)

    def _bit_values(self, device: torch.device) -> Tensor:
        return 2 ** torch.arange(self.config.code_bits - 1, -1, -1, device=device)


def _norm(channels: int, num_groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups, channels, eps=1e-6)


def _middle(channels: int, num_groups: int) -> nn.Module:
    middle = nn.Module()
    middle.block_1 = ResBlock(channels, channels, num_groups)
    middle.attn_1 = SpatialAttention(channels, num_groups)
    middle.block_2 = ResBlock(channels, channels, num_groups)
    return middle
