"""Image tokenizers with learned code books as they are published: configurations and names of weights.

layout           published in
CHAMELEON        vqgan.ckpt of Meta and GAIR/Anole; model.vqmodel.* and leloy/Anole-7b-v0.1-vqvae-hf of transformers
JANUS            model.vqmodel.* of transformers (deepseek-community/Janus-Pro-*)
JANUS_ORIGINAL   gen_vision_model.* of deepseek-ai/Janus*
EMU3             vqmodel.* of transformers (BAAI/Emu3-*-hf)
EMU3_ORIGINAL    BAAI/Emu3-VisionTokenizer
DIFFUSERS        vqvae/ of Alpha-VLLM/Lumina-DiMOO: VQModel of diffusers
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from hermesflow.engine.image_tokenizers.emu3 import Emu3Tokenizer, Emu3TokenizerConfig
from hermesflow.engine.image_tokenizers.vqgan import VQGAN, VQGANConfig
from hermesflow.engine.weights import load_weights, own_tensors
from hermesflow.models.loading import make_config
from hermesflow.runtime.files import InputError, reason_of, shown

AnyConfig = VQGANConfig | Emu3TokenizerConfig
_Config = TypeVar("_Config", VQGANConfig, Emu3TokenizerConfig)


class Layout(NamedTuple):
    """How published names and shapes differ from ours."""

    renames: tuple[tuple[str, str], ...] = ()
    """Regular expressions in our names, and what stands there in the published ones; applied in this order."""
    coarsest_first: bool = False
    """Whether the decoder's levels are counted from the coarsest; ours are from the finest."""
    linear_attention: bool = False
    """Whether the attention's layers are linear ones, [C, C]; ours are 1x1 convolutions, [C, C, 1, 1]."""


CHAMELEON = Layout()
JANUS = Layout(coarsest_first=True)
JANUS_ORIGINAL = Layout(
    (
        (r"\.(down|up)\.(\d+)\.", r".conv_blocks.\2."),
        (r"\.block\.", ".res."),
        (r"\.mid\.block_1\.", ".mid.0."),
        (r"\.mid\.attn_1\.", ".mid.1."),
        (r"\.mid\.block_2\.", ".mid.2."),
    ),
    coarsest_first=True,
)
EMU3 = Layout(
    (
        (r"\.mid\.", ".middle_block."),
        (r"\.(down|up)\.(\d+)\.", r".\1_block.\1.\2."),
        (r"\.attn_1\.norm\.", ".attn_norm."),
        (r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1."),
        (r"\.([qkv])\.(weight|bias)$", r".\1_proj.\2"),
        (r"\.proj_out\.", ".out_proj."),
    ),
    linear_attention=True,
)
EMU3_ORIGINAL = Layout()
DIFFUSERS = Layout(
    (
        (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
        (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
        (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
        (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.norm_out\.", ".conv_norm_out."),
    ),
    coarsest_first=True,
    linear_attention=True,
)

_VQGAN_FIELDS = {
    "codebook_size": ["num_embeddings"], "embed_dim": ["embed_dim"], "latent_channels": ["latent_channels"],
    "channels": ["base_channels"], "channel_multipliers": ["channel_multiplier"], "num_res_blocks": ["num_res_blocks"],
}  # fmt: skip
_VQ_MODEL = {
    "block_out_channels": [64], "layers_per_block": 1, "latent_channels": 3, "num_vq_embeddings": 256,
    "norm_num_groups": 32, "vq_embed_dim": None, "norm_type": "group", "mid_block_add_attention": True,
}  # fmt: skip
"""Defaults of diffusers' VQModel."""
_EMU3_FIELDS = {
    "codebook_size": ["codebook_size"], "embed_dim": ["embed_dim"], "channels": ["base_channels", "ch"],
    "channel_multipliers": ["channel_multiplier", "ch_mult"], "num_res_blocks": ["num_res_blocks"],
    "attention_levels": ["attn_resolutions"], "temporal_downsampling": ["temporal_downsample_factor"],
}  # fmt: skip
"""Ours -> transformers' name, and BAAI's where it is another."""
_FIXED = {
    "double_latent": False, "double_z": False, "in_channels": 3, "out_channels": 3, "attn_type": "vanilla",
    "num_attention_heads": 1,
}  # fmt: skip
"""Published settings that no published tokenizer has otherwise."""
_LEFT_OVER = r"quantize\.codebook_used|loss\..*"
"""Janus's count of used codes, and the discriminator and the perceptual loss that a VQGAN was trained with."""


def chameleon_config(given: Mapping[str, Any]) -> VQGANConfig:
    """Chameleon's shape from transformers' vq_config, or from the config.json of a vqvae folder.

    Absent values are ChameleonVQVAEConfig's defaults. Has a decoder: set has_decoder where the weights have none.

    Raises: InputError that names what does not fit.
    """
    config = _config(VQGANConfig, _VQGAN_FIELDS, given)
    resolution, attended = given.get("resolution", 512), given.get("attn_resolutions") or ()
    fits = type(resolution) is int and 0 < resolution < 2**16 and resolution % config.downsampling == 0
    if not fits or not isinstance(attended, list | tuple):
        raise InputError(
            f"vq_config: expected resolution as a multiple of {config.downsampling} pixels and attn_resolutions "
            f"as a list, got {shown(resolution)} and {shown(attended)}; restore it from its source"
        )
    levels = range(len(config.channel_multipliers))
    return replace(config, attention_levels=tuple(level for level in levels if resolution >> level in attended))


def janus_config(given: Mapping[str, Any]) -> VQGANConfig:
    """Janus's shape from transformers' vq_config; {} gives LlamaGen's VQ-16, which is all that deepseek-ai publishes.

    Absent values are JanusVQVAEConfig's defaults.

    Raises: InputError that names what does not fit.
    """
    config = _config(VQGANConfig, _VQGAN_FIELDS, given, codebook_size=16384, embed_dim=8)
    return replace(config, attention_levels=(len(config.channel_multipliers) - 1,), normalized_codes=True)


def emu3_config(given: Mapping[str, Any]) -> Emu3TokenizerConfig:
    """Emu3's shape from transformers' vq_config, or from the config.json of BAAI/Emu3-VisionTokenizer.

    Absent values are Emu3VQVAEConfig's defaults.

    Raises: InputError that names what does not fit.
    """
    config = _config(Emu3TokenizerConfig, _EMU3_FIELDS, given)
    for name in ("latent_channels", "z_channels"):
        if given.get(name) not in (None, config.embed_dim):
            raise InputError(f"vq_config: {name} must be embed_dim, got {shown(given[name])} and {config.embed_dim}")
    return config


def diffusers_config(given: Mapping[str, Any]) -> VQGANConfig:
    """The shape of diffusers' VQModel from its config.json, for images in [0, 1]. Absent values are its defaults.

    Raises: InputError that names what does not fit.
    """
    if not isinstance(given, Mapping):
        raise InputError(f"the image tokenizer's configuration is {shown(given)}, no object; restore it")
    given = {**_VQ_MODEL, **given}
    for name, expected in (("in_channels", 3), ("out_channels", 3), ("act_fn", "silu")):
        if given.get(name, expected) != expected:
            raise InputError(f"{name} is {shown(given[name])}, only {expected!r} is supported; give another tokenizer")
    for name in _VQ_MODEL.keys() - {"vq_embed_dim"}:
        if given[name] is None:
            raise InputError(f"{name} is null, expected a value; restore it from its source")
    widths = given["block_out_channels"]
    if not isinstance(widths, list | tuple) or not widths or any(type(width) is not int for width in widths):
        raise InputError(f"block_out_channels: expected a list of numbers, got {shown(widths)}; restore it")
    for name, expected in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if given.get(name) not in (None, [expected] * len(widths)):
            raise InputError(f"{name}: {shown(given[name])}: only {expected} is supported; give another tokenizer")
    if widths[0] < 1 or any(width % widths[0] for width in widths) or given["norm_type"] != "group":
        raise InputError(
            f"block_out_channels {shown(widths)} and norm_type {shown(given['norm_type'])}: expected multiples of the "
            "first and group; give another tokenizer"
        )
    shape = {
        "codebook_size": given["num_vq_embeddings"],
        "embed_dim": given["vq_embed_dim"] or given["latent_channels"],
        "latent_channels": given["latent_channels"],
        "channels": widths[0],
        "channel_multipliers": [width // widths[0] for width in widths],
        "num_res_blocks": given["layers_per_block"],
        "num_groups": given["norm_num_groups"],
        "middle_attention": given["mid_block_add_attention"],
    }
    return replace(_config(VQGANConfig, {name: [name] for name in shape}, shape), unit_pixels=True)


def config_of_shapes(
    shapes: Mapping[str, torch.Size], prefix: str = "", *, normalized_codes: bool = False
) -> VQGANConfig | Emu3TokenizerConfig:
    """The configuration of a tokenizer that is published without one, from the shapes of its weights in any layout.

    Args:
        shapes: published name -> shape; other names may be among them.
        prefix: of the tokenizer's names.
        normalized_codes: as Janus's are, which no shape tells.
    Raises: InputError if they are no image tokenizer's.
    """
    inside = {name.removeprefix(prefix): tuple(shape) for name, shape in shapes.items() if name.startswith(prefix)}
    level = r"encoder\.(?:down_block\.)?(?:down|conv_blocks)\.(\d+)\."
    blocks = {
        (int(found[1]), int(found[2])): (*shape, 0)[0]
        for name, shape in inside.items()
        if (found := re.fullmatch(level + r"(?:block|res)\.(\d+)\.conv2\.weight", name))
    }
    attended = {int(found[1]) for name in inside if (found := re.match(level + r"attn\.", name))}
    try:
        channels, (codes, width) = inside["encoder.conv_in.weight"][0], inside["quantize.embedding.weight"]
        num_levels, depth = (max(index) + 1 for index in zip(*blocks, strict=True))
        common = {
            "codebook_size": codes,
            "embed_dim": width,
            "channels": channels,
            "channel_multipliers": tuple(blocks[index, 0] // channels for index in range(num_levels)),
            "num_res_blocks": depth,
            "attention_levels": tuple(sorted(attended)),
        }
        if any(name.startswith("encoder.time_") for name in inside):
            time_convs = sum(
                bool(re.fullmatch(r"encoder\.time_conv\.\d+\.conv\.conv\.weight", name)) for name in inside
            )
            return Emu3TokenizerConfig(**common, temporal_downsampling=2**time_convs)
        return VQGANConfig(
            **common,
            latent_channels=inside["encoder.conv_out.weight"][0],
            normalized_codes=normalized_codes,
            has_decoder="decoder.conv_in.weight" in inside,
        )
    except (KeyError, IndexError, ValueError, ArithmeticError) as error:
        raise InputError(
            f"the weights under {prefix!r} are no image tokenizer's ({reason_of(error)}); restore them"
        ) from error


def published_name(name: str, layout: Layout, num_levels: int) -> str:
    """The published name of one of our weights, without the checkpoint's prefix."""
    if layout.coarsest_first:
        name = re.sub(r"\bup\.(\d+)", lambda found: f"up.{num_levels - 1 - int(found[1])}", name)
    for pattern, published in layout.renames:
        name = re.sub(pattern, published, name)
    return name


def tokenizer_tensors(tokenizer: VQGAN | Emu3Tokenizer, layout: Layout, prefix: str = "") -> dict[str, Tensor]:
    """The views of a tokenizer for load_weights and save_tensors: published name -> tensor in the published shape.

    Buffers of batch norms are among them; num_batches_tracked is int64.
    """
    num_levels, tensors = len(tokenizer.config.channel_multipliers), {}
    for name, tensor in own_tensors(tokenizer).items():
        if layout.linear_attention and re.search(r"\.([qkv]|proj_out)\.weight$", name):
            tensor = tensor.flatten(1)
        tensors[prefix + published_name(name, layout, num_levels)] = tensor
    return tensors


def load_image_tokenizer(
    path: Path,
    config: AnyConfig,
    layout: Layout,
    prefix: str = "",
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> VQGAN | Emu3Tokenizer:
    """Opens an image tokenizer.

    Args:
        path: a file or a folder of weights. Those of other parts may be among them if there is a prefix.
        config: its shape; of its class is the tokenizer.
        layout: how the weights are named.
        prefix: of all their names, such as "model.vqmodel.".
        dtype: of the weights. fp32, since codes are discrete: others move some of them.
        device: where the weights go; None is the CPU.
    Raises: InputError if sizes do not fit together, or the files are damaged or do not fit.
    """
    kind = VQGAN if isinstance(config, VQGANConfig) else Emu3Tokenizer
    try:
        with torch.device("meta"):
            tokenizer = kind(config)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise InputError(f"{path}: not the shape of an image tokenizer ({reason_of(error)}); restore it") from error
    start = re.escape(prefix)
    try:
        load_weights(
            tokenizer,
            path,
            lambda module: tokenizer_tensors(module, layout, prefix),
            ignored=rf"(?!{start}).*|{start}(?:{_LEFT_OVER})",
            dtype=dtype,
            device=device,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    return tokenizer.eval()


def _config(kind: type[_Config], names: Mapping[str, Sequence[str]], given: Any, **defaults: int) -> _Config:
    """A configuration from a published one, whose absent values are the defaults, else the class's own."""
    if not isinstance(given, Mapping):
        raise InputError(f"vq_config is {shown(given)}, no object; restore it from its source")
    for name, expected in _FIXED.items():
        if given.get(name, expected) != expected:
            raise InputError(f"vq_config: {name} is {shown(given[name])}, only {expected!r} is supported; restore it")
    found = {
        ours: given[name] for ours, published in names.items() for name in published if given.get(name) is not None
    }
    try:
        return make_config(kind, defaults | found)
    except (ValueError, TypeError) as error:
        raise InputError(f"vq_config: not the shape of an image tokenizer ({error}); restore it") from error


def chameleon_dict(config: VQGANConfig, resolution: int) -> dict[str, Any]:
    """The config.json of a vqvae folder, which chameleon_config reads."""
    shape = {names[0]: getattr(config, ours) for ours, names in _VQGAN_FIELDS.items()}
    attended = [resolution >> level for level in config.attention_levels]
    return {"model_type": "chameleon_vqgan", "architectures": ["ChameleonVQVAE"], "resolution": resolution} | (
        shape | {"attn_resolutions": attended or None}
    )
