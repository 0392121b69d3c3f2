"""Shared by the image tokenizers: their outer form, and their encoder and decoder of residual convolutions.

Module names are those of taming-transformers, whose state dicts most published tokenizers follow.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]
"""Makes the norm of that many channels; it is called with what the decoder's forward gets besides its input."""

_MAX_LEVELS = 8
_VALUES_PER_PASS = 2**27


def check_ranges(config: Any, ranges: Mapping[str, tuple[int, int]]) -> None:
    """Refuses numbers outside their range (both ends included), or another number of levels than 1 to 8.

    Raises: ValueError that names the field.
    """
    kind = type(config).__name__
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if not all(low <= number <= high for number in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{kind}: {name} must lie in [{low}, {high}], got {value!r:.80}")
    levels = len(config.channel_multipliers)
    if not 1 <= levels <= _MAX_LEVELS:
        raise ValueError(f"{kind}: expected 1 to {_MAX_LEVELS} channel_multipliers, got {levels}")


def group_norm(num_groups: int) -> Norm:
    """Norms over num_groups groups of channels, with the epsilon of all published tokenizers."""
    return partial(nn.GroupNorm, num_groups, eps=1e-6)


class ResBlock(nn.Module):
    """Two normalized 3x3 convolutions with a residual."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm) -> None:
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C', h, w]; condition is what the norms take besides."""
        h = self.conv1(F.silu(self.norm1(x, *condition)))
        h = self.conv2(F.silu(self.norm2(h, *condition)))
        return self.nin_shortcut(x) + h


class SpatialAttention(nn.Module):
    """Single-head attention over all positions."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        """x [B, C, h, w] -> the same shape; condition is what the norm takes besides."""
        normed = self.norm(x, *condition)
        q, k, v = (layer(normed).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(out)


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


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where the level has it."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, norm: Norm, attention: bool) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * num_blocks]
        self.block, self.attn = nn.ModuleList(), nn.ModuleList()
        for before, after in zip(widths, widths[1:], strict=False):
            self.block.append(ResBlock(before, after, norm))
            if attention:
                self.attn.append(SpatialAttention(after, norm))

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C', h, w]."""
        for index, block in enumerate(self.block):
            x = block(x, *condition)
            if self.attn:
                x = self.attn[index](x, *condition)
        return x


class Middle(nn.Module):
    """Residual block, attention unless it has none, residual block at the lowest resolution."""

    def __init__(self, channels: int, norm: Norm, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, norm)
        self.attn_1 = SpatialAttention(channels, norm) if attention else None
        self.block_2 = ResBlock(channels, channels, norm)

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        """x [B, C, h, w] -> the same shape."""
        x = self.block_1(x, *condition)
        if self.attn_1 is not None:
            x = self.attn_1(x, *condition)
        return self.block_2(x, *condition)


class Encoder(nn.Module):
    """Images -> latents; each level but the last halves the resolution."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        widths: Sequence[int],
        num_blocks: Sequence[int],
        out_channels: int,
        norm: Norm,
        attention_levels: Collection[int] = (),
        middle_attention: bool = True,
    ) -> None:
        """
        Args:
            in_channels, out_channels: of an image and of a latent.
            channels: of the first convolution.
            widths, num_blocks: channels and residual blocks of each level, the finest first.
            norm: makes the norms.
            attention_levels: levels with attention after each block; 0 is the finest.
            middle_attention: whether the middle has it.
        """
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down = nn.ModuleList()
        width = channels
        for index, (out, count) in enumerate(zip(widths, num_blocks, strict=True)):
            level = Level(width, out, count, norm, attention=index in attention_levels)
            width = out if count else width
            if index < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(width, norm, middle_attention)
        self.norm_out = norm(width)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_channels, H, W] -> z [B, out_channels, h, w] with h = H / 2 ** (levels - 1), and w likewise."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents -> images; each level but the finest doubles the resolution."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        widths: Sequence[int],
        num_blocks: Sequence[int],
        out_channels: int,
        norm: Norm,
        attention_levels: Collection[int] = (),
        middle_attention: bool = True,
        post_quant_conv: nn.Module | None = None,
    ) -> None:
        """
        Args:
            in_channels, out_channels: of a latent and of an image.
            channels: of the first convolution and the middle.
            widths, num_blocks, attention_levels, middle_attention: as the encoder's, the finest level first.
            norm: makes the norms.
            post_quant_conv: comes before all else, where the published names have it in here.
        """
        super().__init__()
        self.post_quant_conv = post_quant_conv or nn.Identity()
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.mid = Middle(channels, norm, middle_attention)
        levels, width = [], channels
        for index in reversed(range(len(widths))):
            level = Level(width, widths[index], num_blocks[index], norm, attention=index in attention_levels)
            width = widths[index] if num_blocks[index] else width
            if index > 0:
                level.upsample = Upsample(width)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = norm(width)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, z: Tensor, *condition: Tensor) -> Tensor:
        """z [B, in_channels, h, w] -> [B, out_channels, H, W]; condition is what the norms take besides."""
        x = self.mid(self.conv_in(self.post_quant_conv(z)), *condition)
        for level in reversed(self.up):
            x = level(x, *condition)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x, *condition)))


class Codebook(nn.Module):
    """A learned code book. With `normalized`, latents and codes are compared and decoded on the unit sphere."""

    def __init__(self, num_codes: int, channels: int, normalized: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, channels)
        self.normalized = normalized

    def nearest(self, z: Tensor) -> Tensor:
        """z [B, C, h, w] -> codes int64 [B, h * w] of the least Euclidean distance, which is computed in fp32."""
        rows = self._placed(z.flatten(2).transpose(1, 2).flatten(0, 1).float())
        codes = self._placed(self.embedding.weight.float())
        norms = codes.square().sum(1)
        pieces = rows.split(max(1, _VALUES_PER_PASS // len(codes)))
        # The latent's own square is the same for all codes, so it is left out.
        nearest = [torch.addmm(norms, piece, codes.T, alpha=-2).argmin(1) for piece in pieces]
        return torch.cat(nearest).view(len(z), z.shape[2] * z.shape[3])

    def lookup(self, codes: Tensor, height: int, width: int) -> Tensor:
        """codes int64 [B, h * w] -> latents [B, C, h, w] in the weights' dtype."""
        return self._placed(self.embedding(codes)).transpose(1, 2).unflatten(2, (height, width))

    def _placed(self, rows: Tensor) -> Tensor:
        return F.normalize(rows, dim=-1) if self.normalized else rows


class ImageTokenizer(nn.Module):
    """Images in [-1, 1] <-> grids of codes.

    A subclass has `config` with downsampling, codebook_size and channels, an `encoder`, and the methods that raise
    NotImplementedError here.
    """

    config: Any
    encoder: nn.Module

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and of the images that encode takes."""
        return self.encoder.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.encoder.conv_in.weight.device

    def images_per_pass(self, height: int, width: int) -> int:
        """Images of that many pixels that one pass should take: at least one.

        A tensor of the finest level then has about 2 ** 27 values, and a pass needs some 4 GiB in fp32.
        """
        return max(1, _VALUES_PER_PASS // (self.config.channels * height * width))

    def encode_latent(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> z [B, C, h, w] before quantization.

        Raises:
            ValueError: not three channels, or H or W not a multiple of config.downsampling.
        """
        factor = self.config.downsampling
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"{type(self).__name__}: expected images [B, 3, H, W] with H and W multiples of {factor}, "
                f"got {tuple(images.shape)}"
            )
        return self.images_to_latent(images)

    def encode(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> codes int64 [B, h * w], row by row. Raises: as encode_latent."""
        return self.latent_to_codes(self.encode_latent(images))

    def decode(self, codes: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """codes int64 [B, h * w] -> images [B, 3, H, W], about [-1, 1]; height and width in tokens, else a square.

        Raises:
            ValueError: a grid that does not fit, or a code outside [0, codebook_size).
        """
        side = int(codes.shape[1] ** 0.5)
        height, width = height or side, width or side
        if height * width != codes.shape[1]:
            raise ValueError(
                f"{type(self).__name__}: {codes.shape[1]} codes do not make a {height} x {width} grid; "
                f"pass height and width"
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.config.codebook_size:
            raise ValueError(
                f"{type(self).__name__}: codes must lie in [0, {self.config.codebook_size}), "
                f"got [{int(codes.min())}, {int(codes.max())}]"
            )
        return self.decode_latent(self.codes_to_latent(codes, height, width))

    def images_to_latent(self, images: Tensor) -> Tensor:
        """As encode_latent, of images that fit."""
        raise NotImplementedError

    def latent_to_codes(self, z: Tensor) -> Tensor:
        """z [B, C, h, w] -> codes int64 [B, h * w]."""
        raise NotImplementedError

    def codes_to_latent(self, codes: Tensor, height: int, width: int) -> Tensor:
        """codes int64 [B, h * w] -> quantized latent [B, C, h, w] in the weights' dtype."""
        raise NotImplementedError

    def decode_latent(self, z: Tensor) -> Tensor:
        """Quantized latent [B, C, h, w] -> images [B, 3, H, W]."""
        raise NotImplementedError
