"""Wan2.1's autoencoder of videos (arXiv 2503.20314), for single images: images <-> grids of continuous latents.

In time its convolutions are causal, with zeros before the first frame, so that an image meets the last slice of each
kernel alone. Module names are those of Wan2.1_VAE.pth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hermesflow.engine.image_tokenizers.blocks import check_ranges

UNUSED = r".*\.time_conv\.(weight|bias)"
"""Tensors of the published file that no image meets."""
MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632, -0.1922,
    -0.9497, 0.2503, -0.2921,
)  # fmt: skip
STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253,
    2.8251, 1.9160,
)  # fmt: skip
"""Of the latents' channels: models draw (latent - MEAN) / STD."""
_RANGES = {"channels": (1, 2**12), "channel_multipliers": (1, 64), "num_res_blocks": (1, 64)}
_VALUES_PER_PASS = 2**27


@dataclass(frozen=True, kw_only=True)
class WanAutoencoderConfig:
    """Shape of an autoencoder; the defaults are the published one's."""

    channels: int = 96
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    """Of each level of the encoder; the decoder's have one more."""

    def __post_init__(self) -> None:
        check_ranges(self, _RANGES)

    latent_channels = len(MEAN)

    @property
    def downsampling(self) -> int:
        """Pixels a latent spans in each direction."""
        return 2 ** (len(self.channel_multipliers) - 1)


class WanAutoencoder(nn.Module):
    """Images in [-1, 1] <-> latents of mean 0 and variance about 1, of any rectangle."""

    def __init__(self, config: WanAutoencoderConfig) -> None:
        super().__init__()
        self.config, count = config, config.latent_channels
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        self.encoder = _Encoder(config.channels, widths, config.num_res_blocks, 2 * count)
        self.conv1, self.conv2 = _Conv(2 * count, 2 * count, 1), _Conv(count, count, 1)
        self.decoder = _Decoder(count, widths[::-1], config.num_res_blocks + 1)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and of the images that encode takes."""
        return self.conv1.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.conv1.weight.device

    def images_per_pass(self, height: int, width: int) -> int:
        """Images of that many pixels that one pass should take: at least one; see ImageTokenizer."""
        return max(1, _VALUES_PER_PASS // (self.config.channels * height * width))

    def encode(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w]: the mean, so that an image has one.

        Raises: ValueError: not three channels, or H or W not a multiple of config.downsampling.
        """
        factor = self.config.downsampling
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"WanAutoencoder: expected images [B, 3, H, W] with H and W multiples of {factor}, got "
                f"{tuple(images.shape)}"
            )
        mean, _ = self.conv1(self.encoder(images)).chunk(2, dim=1)
        return (mean - self._of_channels(MEAN)) / self._of_channels(STD)

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, C, h, w] -> images [B, 3, H, W], about [-1, 1]."""
        return self.decoder(self.conv2(latents * self._of_channels(STD) + self._of_channels(MEAN)))

    def _of_channels(self, values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, dtype=self.dtype, device=self.device)[:, None, None]


class _Conv(nn.Module):
    """A convolution [out, in, time, side, side], in space that of its last slice."""

    def __init__(self, in_channels: int, out_channels: int, side: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, side, side, side))
        self.bias = nn.Parameter(torch.empty(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[:, :, -1], self.bias, padding=self.weight.shape[-1] // 2)


class _Norm(nn.Module):
    """To a root mean square of 1 over the channels of each pixel, times gamma."""

    def __init__(self, channels: int, num_axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * num_axes))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * x.shape[1] ** 0.5 * self.gamma.view(-1, 1, 1)


class _ResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        first = _Norm(in_channels), nn.SiLU(), _Conv(in_channels, out_channels, 3)
        second = _Norm(out_channels), nn.SiLU(), nn.Identity(), _Conv(out_channels, out_channels, 3)
        self.residual = nn.Sequential(*first, *second)
        self.shortcut = nn.Identity() if in_channels == out_channels else _Conv(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.residual(x)


class _Attention(nn.Module):
    """One head over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _Norm(channels, 2)
        self.to_qkv, self.proj = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        return x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class _Resample(nn.Module):
    """Half the size, or twice."""

    def __init__(self, in_channels: int, out_channels: int, before: nn.Module, stride: int) -> None:
        super().__init__()
        conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=2 - stride)
        self.resample = nn.Sequential(before, conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x)


def _middle(channels: int) -> nn.Sequential:
    return nn.Sequential(_ResBlock(channels, channels), _Attention(channels), _ResBlock(channels, channels))


class _Encoder(nn.Module):
    def __init__(self, channels: int, widths: list[int], num_blocks: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = _Conv(3, channels, 3)
        layers: list[nn.Module] = []
        for level, width in enumerate(widths):
            for _ in range(num_blocks):
                layers.append(_ResBlock(channels, width))
                channels = width
            if level < len(widths) - 1:
                layers.append(_Resample(width, width, nn.ZeroPad2d((0, 1, 0, 1)), 2))
        self.downsamples, self.middle = nn.Sequential(*layers), _middle(channels)
        self.head = nn.Sequential(_Norm(channels), nn.SiLU(), _Conv(channels, out_channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.downsamples(self.conv1(x))))


class _Decoder(nn.Module):
    def __init__(self, in_channels: int, widths: list[int], num_blocks: int) -> None:
        super().__init__()
        self.conv1, self.middle = _Conv(in_channels, widths[0], 3), _middle(widths[0])
        channels, layers = widths[0], []
        for level, width in enumerate(widths):
            for _ in range(num_blocks):
                layers.append(_ResBlock(channels, width))
                channels = width
            if level < len(widths) - 1:
                channels = width // 2
                layers.append(_Resample(width, channels, nn.Upsample(scale_factor=2.0, mode="nearest-exact"), 1))
        self.upsamples = nn.Sequential(*layers)
        self.head = nn.Sequential(_Norm(channels), nn.SiLU(), _Conv(channels, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.upsamples(self.middle(self.conv1(x))))
