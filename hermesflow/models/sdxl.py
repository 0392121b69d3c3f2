"""SDXL (arXiv 2307.01952) that draws what features say, as in SEED-X: an adapter stands in place of its text models.

diffusers gives UNet, autoencoder and scheduler. An image depends on its features alone: all start from the same noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hermesflow.engine.weights import own_tensors, read_tensors
from hermesflow.kernels.philox import RandomKey, normal
from hermesflow.models.checkpoint import on_meta
from hermesflow.models.model import to_pixels
from hermesflow.runtime.files import InputError, reason_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel

FILES = ("unet/config.json", "unet/*.safetensors", "vae/config.json", "vae/*.safetensors", "scheduler/*.json")
"""What is read of a repository of SDXL's."""
_IMAGES_PER_PASS = 4
_EPS = 1e-5


class Adapter(nn.Module):
    """Features -> what SDXL's cross attention reads, and its pooled text: ResamplerXLV2 of SEED-X.

    A perceiver: latents that attend to the features and to themselves. Module names are those of the published file.
    """

    def __init__(self, sizes: Mapping[str, tuple[int, ...]], num_heads: int) -> None:
        """
        Args:
            sizes: of its tensors, by which it is made.
            num_heads: of all attentions.
        Raises: KeyError on a tensor that is missing; ValueError if the heads do not divide a width.
        """
        super().__init__()
        _, queries, width = sizes["latents"]
        inner = sizes["layers.0.0.to_q.weight"][0]
        if inner % num_heads or width % num_heads:
            raise ValueError(f"Adapter: expected heads that divide {inner} and {width}, got {num_heads}")
        self.latents = nn.Parameter(torch.empty(1, queries, width))
        self.proj_in, self.norm_out = nn.Linear(sizes["proj_in.weight"][1], width), nn.LayerNorm(width, eps=_EPS)
        depth = next(number for number in range(len(sizes)) if f"layers.{number}.0.to_q.weight" not in sizes)
        self.layers = nn.ModuleList(
            nn.ModuleList([_Perceiver(width, inner, num_heads), _feed_forward(width, sizes)]) for _ in range(depth)
        )
        outputs = [sizes[f"unet_proj_{number}.weight"][0] for number in (1, 2)]
        self.unet_proj_1, self.unet_proj_2 = (nn.Linear(width, size) for size in outputs)
        self.unet_attnpool = _AttentionPool(queries, width, outputs[1], num_heads)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[B, n, F] -> [B, queries, text width] and pooled [B, pooled width]."""
        x = self.proj_in(features)
        latents = self.latents.expand(len(x), -1, -1)
        for attend, feed_forward in self.layers:
            latents = latents + attend(x, latents)
            latents = latents + feed_forward(latents)
        found = self.norm_out(latents)
        return torch.cat([self.unet_proj_1(found), self.unet_proj_2(found)], dim=-1), self.unet_attnpool(found)


class _Perceiver(nn.Module):
    def __init__(self, width: int, inner: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=_EPS) for _ in range(2))
        self.to_q, self.to_kv = nn.Linear(width, inner, bias=False), nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        x, latents = self.norm1(x), self.norm2(latents)
        keys, values = self.to_kv(torch.cat([x, latents], dim=1)).chunk(2, dim=-1)
        return self.to_out(_attend(self.to_q(latents), keys, values, self.num_heads))


class _AttentionPool(nn.Module):
    """The mean, and what it attends to: CLIP's attention pool."""

    def __init__(self, queries: int, width: int, outputs: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.empty(queries + 1, width))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positional_embedding
        found = _attend(self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x), self.num_heads)
        return self.c_proj(found[:, 0])


def _feed_forward(width: int, sizes: Mapping[str, tuple[int, ...]]) -> nn.Sequential:
    inner = sizes["layers.0.1.1.weight"][0]
    linear = nn.Linear(width, inner, bias=False), nn.GELU(), nn.Linear(inner, width, bias=False)
    return nn.Sequential(nn.LayerNorm(width, eps=_EPS), *linear)


def _attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    q, k, v = (each.unflatten(-1, (num_heads, -1)).transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Detokenizer(nn.Module):
    """Features -> images."""

    def __init__(
        self,
        adapter: Adapter,
        unet: UNet2DConditionModel,
        autoencoder: AutoencoderKL,
        scheduler: EulerDiscreteScheduler,
        *,
        num_steps: int = 50,
        guidance_scale: float = 7.5,
        seed: int = 0,
    ) -> None:
        """
        Args:
            adapter, unet, autoencoder, scheduler: the parts.
            num_steps: evaluations of the UNet, guided ones counted once.
            guidance_scale: w of unconditional + w (conditional - unconditional).
            seed: of the noise that every image starts from.
        """
        super().__init__()
        self.adapter, self.unet, self.autoencoder, self._scheduler = adapter, unet, autoencoder, scheduler
        self.num_steps, self.guidance_scale, self.seed = num_steps, guidance_scale, seed

    @property
    def image_size(self) -> int:
        """Side in pixels of an image that the UNet was trained with."""
        return self.unet.config.sample_size * self._factor

    @property
    def _factor(self) -> int:
        return 2 ** (len(self.autoencoder.config.block_out_channels) - 1)

    @torch.no_grad()
    def decode(self, features: Tensor, negative: Tensor, size: int) -> Tensor:
        """Images of features.

        Args:
            features: fp32 [B, n, F].
            negative: fp32 [n, F], those of guidance.
            size: side of an image in pixels, a multiple of the autoencoder's factor.
        Returns: uint8 [B, 3, size, size] on the features' device.
        """
        if not len(features):
            return features.new_zeros(0, 3, size, size, dtype=torch.uint8)
        return torch.cat([self._decode(batch, negative, size) for batch in features.split(_IMAGES_PER_PASS)])

    def _decode(self, features: Tensor, negative: Tensor, size: int) -> Tensor:
        dtype, device, side = self.unet.dtype, features.device, size // self._factor
        both = torch.cat([negative.expand_as(features), features]).to(self.adapter.latents.dtype)
        text, pooled = (each.to(dtype) for each in self.adapter(both))
        channels, zero = self.unet.config.in_channels, torch.zeros(1, dtype=torch.int64, device=device)
        key = RandomKey(zero + self.seed, zero, zero)
        x = normal(key, channels * side**2).view(1, channels, side, side).expand(len(features), -1, -1, -1)
        scheduler = type(self._scheduler).from_config(self._scheduler.config)  # it counts its steps
        scheduler.set_timesteps(self.num_steps, device=device)
        x = x * scheduler.init_noise_sigma
        place = torch.tensor([[size, size, 0, 0, size, size]], dtype=dtype, device=device).expand(len(both), -1)
        for time in scheduler.timesteps:
            given = scheduler.scale_model_input(x, time).repeat(2, 1, 1, 1).to(dtype)
            more = {"text_embeds": pooled, "time_ids": place}
            found = self.unet(given, time, encoder_hidden_states=text, added_cond_kwargs=more).sample.float()
            unguided, guided = found.chunk(2)
            x = scheduler.step(torch.lerp(unguided, guided, self.guidance_scale), time, x).prev_sample
        x = x / self.autoencoder.config.scaling_factor
        return to_pixels(self.autoencoder.decode(x.to(self.autoencoder.dtype)).sample)


def load_detokenizer(
    weights: Path, sdxl: Path, num_heads: int, dtype: torch.dtype, device: torch.device | str | None
) -> Detokenizer:
    """A de-tokenizer from SEED-X's file and SDXL's folder.

    Args:
        weights: the adapter, and tensors unet.* that stand in place of SDXL's.
        sdxl: holds unet/, vae/ and scheduler/ as diffusers keeps them.
        num_heads: of the adapter.
        dtype: of the UNet; the autoencoder is fp32.
        device: where they go.
    Raises: InputError if diffusers is not installed, or a file is missing, damaged or does not fit.
    """
    try:
        from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
    except ImportError as error:
        raise InputError(f"{sdxl}: diffusers is not installed; run: pip install diffusers") from error
    adapter, of_unet = load_adapter(weights, num_heads)
    try:
        kept = {"local_files_only": True, "use_safetensors": True}
        unet = UNet2DConditionModel.from_pretrained(sdxl, subfolder="unet", **kept)
        autoencoder = AutoencoderKL.from_pretrained(sdxl, subfolder="vae", **kept)
        scheduler = EulerDiscreteScheduler.from_pretrained(sdxl, subfolder="scheduler", local_files_only=True)
    except Exception as error:  # diffusers raises many kinds
        raise InputError(
            f"{sdxl}: not SDXL as diffusers keeps it ({reason_of(error)}); restore it from its source"
        ) from error
    own = unet.state_dict()
    wrong = [name for name, tensor in of_unet.items() if name not in own or own[name].shape != tensor.shape]
    expected = adapter.unet_proj_1.out_features + adapter.unet_proj_2.out_features
    if wrong or unet.config.cross_attention_dim != expected:
        raise InputError(
            f"{weights}: does not fit SDXL in {sdxl} ({', '.join(wrong[:5]) or 'another width of text'}); give the "
            "model that it was trained for"
        )
    unet.load_state_dict(of_unet, strict=False)
    parts = (part.to(device=device).eval().requires_grad_(False) for part in (adapter, unet.to(dtype), autoencoder))
    return Detokenizer(*parts, scheduler)


def load_adapter(path: Path, num_heads: int) -> tuple[Adapter, dict[str, Tensor]]:
    """The adapter in fp32, and the file's tensors of the UNet. Raises: InputError on a file that holds no adapter."""
    try:
        tensors = read_tensors(path)
    except ValueError as error:
        raise InputError(str(error)) from error
    parts: dict[str, dict[str, Tensor]] = {"resampler": {}, "unet": {}, "": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        parts[kind if kind in parts else ""][rest] = tensor
    sizes = {name: tuple(tensor.shape) for name, tensor in parts["resampler"].items()}
    adapter = on_meta(lambda: {"adapter": Adapter(sizes, num_heads)}, path)["adapter"].to_empty(device="cpu")
    missing = set(own_tensors(adapter)) ^ set(sizes)
    if missing or parts[""]:
        listed = ", ".join(sorted([*missing, *parts[""]])[:8])
        raise InputError(f"{path}: is no de-tokenizer of SEED-X's ({listed}); restore it from its source")
    for name, tensor in own_tensors(adapter).items():
        given = parts["resampler"][name].float()
        if given.shape != tensor.shape or not given.isfinite().all():
            raise InputError(f"{path}: resampler.{name} does not fit, or holds NaN; restore it from its source")
        tensor.copy_(given)
    return adapter, parts["unet"]
