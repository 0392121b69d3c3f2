"""BAGEL (ByteDance-Seed, arXiv 2505.14683): a mixture of two transformers that draws latents by a flow.

    ByteDance-Seed/BAGEL-7B-MoT    config.json (bagel), llm_config.json, vit_config.json, ema.safetensors,
                                   ae.safetensors, tokenizer.json

Text and what it sees go through one expert, latents through the other; an image's tokens have one position. It sees
images through a SigLIP tower. Names, prompts and defaults: modeling/bagel and inferencer.py of BAGEL.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hermesflow.engine.decoders.flow import FlowSamplingParams
from hermesflow.engine.image_tokenizers.kl_autoencoder import KLAutoencoder, KLAutoencoderConfig
from hermesflow.engine.latents import LatentConfig, LatentTransformer, patchify
from hermesflow.engine.token_layout import FeatureSpan, Ids, Layout, check_grid
from hermesflow.engine.transformer import Block, TransformerConfig
from hermesflow.engine.weights import own_tensors, read_tensors, save_tensors
from hermesflow.kernels.span_tree import Place
from hermesflow.models import loading
from hermesflow.models.checkpoint import FILES, load_parts, on_meta
from hermesflow.models.latent_model import PATCH, LatentModel
from hermesflow.models.model import PromptFormat
from hermesflow.models.siglip import see
from hermesflow.models.text_tokenizers import FileTokenizer
from hermesflow.runtime.files import InputError, read_json, shown

MODEL_TYPE = "bagel"
WEIGHTS_FILE, AUTOENCODER_FILE = "ema.safetensors", "ae.safetensors"
PROMPTS = PromptFormat(
    caption_question="Give a caption for this image.",
    question="{question}",
    answer="{answer}",
    max_prompt_tokens=512,
    max_caption_tokens=128,
    max_answer_tokens=128,
)
SAMPLING = FlowSamplingParams(num_steps=50, guidance_scale=3.0, shift=3.0, guidance_from=0.4, renorm="image")
TOKENS = {"bos": "<|im_start|>", "eot": "<|im_end|>", "soi": "<|vision_start|>", "eoi": "<|vision_end|>"}
_LAYERS = "language_model.model.layers.*"


def _expert(blocks: str, suffix: str) -> dict[str, list[str]]:
    attention, mlp = f"{_LAYERS}.self_attn", f"{_LAYERS}.mlp{suffix}"
    return {
        f"{blocks}.attention_norm": [f"{_LAYERS}.input_layernorm{suffix}"],
        f"{blocks}.attention.qkv": [f"{attention}.{name}_proj{suffix}" for name in "qkv"],
        f"{blocks}.attention.out": [f"{attention}.o_proj{suffix}"],
        f"{blocks}.attention.q_norm": [f"{attention}.q_norm{suffix}"],
        f"{blocks}.attention.k_norm": [f"{attention}.k_norm{suffix}"],
        f"{blocks}.mlp_norm": [f"{_LAYERS}.post_attention_layernorm{suffix}"],
        f"{blocks}.mlp.up": [f"{mlp}.gate_proj", f"{mlp}.up_proj"],
        f"{blocks}.mlp.down": [f"{mlp}.down_proj"],
    }


WEIGHTS = {
    "embed": ["language_model.model.embed_tokens"],
    **_expert("blocks.*", ""),
    "norm": ["language_model.model.norm"],
    **_expert("blocks.*.latent", "_moe_gen"),
    "latent_norm": ["language_model.model.norm_moe_gen"],
    "head": ["language_model.lm_head"],
    "latent_in": ["vae2llm"],
    "latent_out": ["llm2vae"],
    "time.0": ["time_embedder.mlp.0"],
    "time.2": ["time_embedder.mlp.2"],
    "latent_places": ["latent_pos_embed.pos_embed"],
}
_VISION = "vit_model.vision_model"
VISION_WEIGHTS = {
    "patch": [f"{_VISION}.embeddings.patch_embedding"],
    "position": [f"{_VISION}.embeddings.position_embedding"],
    "blocks.*.attention_norm": [f"{_VISION}.encoder.layers.*.layer_norm1"],
    "blocks.*.attention.qkv": [f"{_VISION}.encoder.layers.*.self_attn.{name}_proj" for name in "qkv"],
    "blocks.*.attention.out": [f"{_VISION}.encoder.layers.*.self_attn.out_proj"],
    "blocks.*.mlp_norm": [f"{_VISION}.encoder.layers.*.layer_norm2"],
    "blocks.*.mlp.up": [f"{_VISION}.encoder.layers.*.mlp.fc1"],
    "blocks.*.mlp.down": [f"{_VISION}.encoder.layers.*.mlp.fc2"],
    "norm": [f"{_VISION}.post_layernorm"],
    "connector.0": ["connector.fc1"],
    "connector.2": ["connector.fc2"],
    "places": ["vit_pos_embed.pos_embed"],
}
_TABLES = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")
"""Which are bare tensors."""
_SETTINGS = {
    "hidden_size": "@hidden_size",
    "num_layers": "@num_hidden_layers",
    "num_heads": "@num_attention_heads",
    "num_kv_heads": "@num_key_value_heads",
    "mlp_size": "@intermediate_size",
    "norm_eps": "@rms_norm_eps",
    "rope_theta": "@rope_theta",
    "activation": "@hidden_act",
    "norm": "rmsnorm",
    "gated": True,
    "bias": False,
    "qkv_bias": True,
    "qk_norm": True,
}
_VISION_SETTINGS = {
    "hidden_size": "@hidden_size", "num_layers": "@num_hidden_layers", "num_heads": "@num_attention_heads",
    "mlp_size": "@intermediate_size", "norm_eps": 1e-6, "activation": "gelu_tanh", "rotary_fraction": 0.0,
}  # fmt: skip
_SUPPORTED = {
    "config.json": {"interpolate_pos": False, "connector_act": "gelu_pytorch_tanh", "latent_patch_size": PATCH},
    "llm_config.json": {
        "tie_word_embeddings": False, "qk_norm": True, "rope_scaling": None, "attention_bias": True,
        "use_sliding_window": False, "hidden_act": "silu",
    },
    "vit_config.json": {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "num_channels": 3},
}  # fmt: skip
"""Settings of which one value is supported, or none."""
_IMAGES_PER_PASS = 8
_EXPERTS = {"Qwen2MoTDecoderLayer": 2, "Qwen2DecoderLayer": 1}
"""By layer_module of llm_config.json, which the published file leaves out."""


@dataclass(frozen=True, kw_only=True)
class BagelLayout(Layout):
    """The language model's vocabulary, special tokens among it; images are latents and features."""

    vocab_size: int
    image_grid: tuple[int, int]
    largest: int
    """Rows, and columns, of the largest image."""
    bos: int
    eot: int
    soi: int
    eoi: int
    latent_size: int

    code_ids = None
    codebook_size = 0
    image_place = Place(stride=0, advance=1, framed=(1, 1))

    @property
    def num_image_tokens(self) -> int:
        """Latents of an image."""
        return self.image_grid[0] * self.image_grid[1]

    @cached_property
    def text_ids(self) -> Ids:
        """All."""
        return Ids(range(self.vocab_size))

    @property
    def before_image(self) -> tuple[int, ...]:
        """soi."""
        return (self.soi,)

    @property
    def after_image(self) -> tuple[int, ...]:
        """eoi."""
        return (self.eoi,)

    def of_grid(self, grid: tuple[int, int]) -> BagelLayout:
        """The same for images of so many rows and columns of latents."""
        check_grid("BAGEL", grid)
        if max(grid) > self.largest:
            raise ValueError(f"BAGEL: expected a grid of at most {self.largest} x {self.largest}, got {grid}")
        return replace(self, image_grid=tuple(grid))

    def image(self, codes: Sequence[int]) -> list[int]:
        """An image's span; what its latents are is said by embeddings."""
        return [self.soi, *[self.eoi] * len(codes), self.eoi]

    def text_prompt(self, text_ids: Sequence[int]) -> list[int]:
        """Condition of an image: [bos, text, eos]."""
        return [self.bos, *text_ids, self.eot]

    def image_prefix(self, codes: Sequence[int]) -> list[int]:
        """It sees features alone."""
        raise ValueError("BAGEL: sees images by features, got codes")

    def unguided_prompt(self, text_ids: Sequence[int]) -> list[int]:
        """Nothing: the image is a root."""
        return []

    def feature_span(self, num_features: int) -> FeatureSpan:
        """[soi, features, eoi], all at one position and seen by one another."""
        return FeatureSpan(
            self.image([0] * num_features), range(1, 1 + num_features), "full", Place(stride=0, advance=1)
        )

    def question(self, text_ids: Sequence[int]) -> list[int]:
        """[bos, question, eos], and the bos of the answer."""
        return [self.bos, *text_ids, self.eot, self.bos]


class BagelVision(nn.Module):
    """Pixels -> a vector of the language model a patch; any size of whole patches."""

    def __init__(self, config: TransformerConfig, patch: int, side: int, width: int) -> None:
        """
        Args:
            config: of the tower.
            patch: pixels of a patch, in each direction.
            side: patches of the largest image, likewise.
            width: of the language model.
        """
        super().__init__()
        self.config, self.patch_size, self.side = config, patch, side
        self.patch = nn.Linear(3 * patch**2, config.hidden_size)
        self.position = nn.Embedding(side**2, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        gelu = nn.GELU(approximate="tanh")
        self.connector = nn.Sequential(nn.Linear(config.hidden_size, width), gelu, nn.Linear(width, width))
        self.places = nn.Embedding(side**2, width)
        self.places.weight.requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] in [-1, 1] -> [B, F, width]. Raises: ValueError on a size that is none of whole patches,
        or too large."""
        seen = self.tower(pixels)
        return self.connector(seen) + self.places(self._numbers(pixels))

    def tower(self, pixels: Tensor) -> Tensor:
        """[B, F, the tower's width]."""
        numbers = self._numbers(pixels)
        return self.norm(see(self.blocks, self.patch(patchify(pixels, self.patch_size)) + self.position(numbers)))

    def _numbers(self, pixels: Tensor) -> Tensor:
        """Of each patch in the tables of places."""
        size = pixels.shape[2:]
        rows, columns = (length // self.patch_size for length in size)
        if any(length % self.patch_size for length in size) or not 1 <= max(rows, columns) <= self.side:
            raise ValueError(
                f"BagelVision: expected sides of 1 to {self.side} patches of {self.patch_size} pixels, got {list(size)}"
            )
        return (torch.arange(rows)[:, None] * self.side + torch.arange(columns)).flatten().to(pixels.device)


class BagelModel(LatentModel):
    """A model of BAGEL's class."""

    autoencoder_file = AUTOENCODER_FILE
    kept = (*FILES, "llm_config.json", "vit_config.json", "vocab.json", "merges.txt")

    @property
    def vision(self) -> BagelVision:
        """What it sees through."""
        return self.parts["vision"]

    @property
    def view_size(self) -> int:
        """Side in pixels of what is seen of an image: its own, to whole patches."""
        patch = self.vision.patch_size
        return patch * max(1, min(self.vision.side, round(self.image_size / patch)))

    @property
    def num_features(self) -> int:
        """F, patches of an image."""
        return (self.view_size // self.vision.patch_size) ** 2

    @torch.no_grad()
    def view_pixels(self, images: np.ndarray) -> Tensor:
        """Features [n, F, D] of images, uint8 [n, image_size, image_size, 3]."""
        weight, size = self.vision.connector[2].weight, (self.view_size,) * 2
        if not len(images):
            return weight.new_zeros(0, self.num_features, len(weight))
        resized = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in images]
        pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)
        return torch.cat([self.vision(batch.to(weight) / 127.5 - 1) for batch in pixels.split(_IMAGES_PER_PASS)])

    def write(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Writes the published layout, with the autoencoder."""
        tensors = self.published_tensors()
        save_tensors(tensors, folder / WEIGHTS_FILE, dtype)
        save_tensors(self.vq_tokenizer.state_dict(), folder / AUTOENCODER_FILE)
        self.write_kept(folder)

    def modules(self) -> tuple[nn.Module, ...]:
        """With the tower."""
        return *super().modules(), self.vision


class BagelFamily:
    """Opens checkpoints of BAGEL's class."""

    files = (*FILES, "llm_config.json", "vit_config.json", WEIGHTS_FILE, AUTOENCODER_FILE, "vocab.json", "merges.txt")

    def claims(self, config: Any) -> bool:
        """By its model_type."""
        return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE

    def load(
        self,
        folder: Path,
        config: Mapping[str, Any],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        vq_tokenizer: str | None = None,
    ) -> BagelModel:
        """Opens a checkpoint; see Family.load. vq_tokenizer is load_model's: a folder that holds ae.safetensors."""
        path, tokenizer = folder / "config.json", FileTokenizer(folder)
        _check_supported(path, config)
        sides = [config.get(name, default) for name, default in (("max_latent_size", 64),
                                                                 ("vit_max_num_patch_per_side", 70))]  # fmt: skip
        if not all(type(side) is int and 1 <= side <= 2**8 for side in sides):
            raise InputError(
                f"{path}: expected max_latent_size and vit_max_num_patch_per_side from 1 to 256, got "
                f"{', '.join(map(shown, sides))}; restore it from its source"
            )
        shape = _transformer_config(folder / "llm_config.json")
        tower, patch = _vision_config(folder / "vit_config.json")
        latents = LatentConfig(size=KLAutoencoderConfig().latent_channels * PATCH**2, side=sides[0])
        layout = BagelLayout(
            vocab_size=shape.vocab_size, image_grid=(sides[0], sides[0]), largest=sides[0], latent_size=latents.size,
            **{name: tokenizer.id(token) for name, token in TOKENS.items()},
        )  # fmt: skip
        parts = on_meta(
            lambda: {
                "transformer": LatentTransformer(shape, latents),
                "vision": BagelVision(tower, patch, sides[1], shape.hidden_size),
            },
            path,
        )

        def open_tokenizer(device: torch.device) -> KLAutoencoder:
            return load_autoencoder(folder if vq_tokenizer is None else Path(vq_tokenizer), device)

        shift = config.get("timestep_shift", 1.0)
        if type(shift) not in (int, float) or not 1e-3 <= shift <= 1e3:
            raise InputError(f"{path}: timestep_shift is {shown(shift)}, no number above 0; restore it from its source")
        load_parts(parts, folder / WEIGHTS_FILE, published_tensors, "", dtype, device)
        image_size = sides[0] * KLAutoencoderConfig().downsampling * PATCH
        model = BagelModel(
            folder, parts, published_tensors, tokenizer, layout, image_size, PROMPTS, SAMPLING, open_tokenizer
        )
        model.flow_shift = float(shift)
        return model


FAMILY = BagelFamily()


def published_tensors(parts: nn.ModuleDict) -> dict[str, Tensor]:
    """Of the parts: the name of each published tensor -> the parameter, or the rows of one, that it is."""
    found = loading.published_tensors(WEIGHTS, parts["transformer"])
    found |= loading.published_tensors(VISION_WEIGHTS, parts["vision"])
    for name in _TABLES:
        found[name] = found.pop(f"{name}.weight")
    return found


def load_autoencoder(folder: Path, device: torch.device | str | None = None) -> KLAutoencoder:
    """FLUX.1's autoencoder. Raises: InputError if the folder does not hold its weights."""
    path = folder / AUTOENCODER_FILE
    if not path.is_file():
        raise InputError(f"{path}: is not there; put FLUX.1's autoencoder, which BAGEL publishes, beside its weights")
    parts = on_meta(lambda: {"autoencoder": KLAutoencoder(_autoencoder_config(path))}, path)
    load_parts(parts, path, lambda parts: own_tensors(parts["autoencoder"]), "", torch.float32, device)
    return parts["autoencoder"]


def _autoencoder_config(path: Path) -> KLAutoencoderConfig:
    """By the shapes of its tensors, since no file names its sizes; scale and shift are FLUX.1's."""
    try:
        shapes = {name: tensor.shape for name, tensor in read_tensors(path).items()}
        channels = shapes["encoder.conv_in.weight"][0]
        counts = [sum(name.startswith(f"encoder.down.{level}.block.") for name in shapes) for level in range(8)]
        widths = [
            shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level, count in enumerate(counts) if count
        ]
        blocks = len({name.split(".")[4] for name in shapes if name.startswith("encoder.down.0.block.")})
        return KLAutoencoderConfig(
            latent_channels=shapes["decoder.conv_in.weight"][1], channels=channels, num_res_blocks=blocks,
            channel_multipliers=tuple(width // channels for width in widths), num_groups=math.gcd(32, channels),
        )  # fmt: skip
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"{path}: holds no autoencoder of FLUX.1's kind ({error}); give the model's own") from error


def _transformer_config(path: Path) -> TransformerConfig:
    given = read_json(path)
    _check_supported(path, given)
    module = given.get("layer_module", "Qwen2MoTDecoderLayer") if isinstance(given, Mapping) else None
    if not isinstance(module, str) or module not in _EXPERTS:
        raise InputError(
            f"{path}: layer_module {shown(module)} is not supported, {' and '.join(_EXPERTS)} are; use another "
            "checkpoint"
        )
    with loading.errors_of(path):
        settings = _SETTINGS | {"experts": _EXPERTS[module]}
        shape = loading.transformer_config(given, "qwen2", settings, {}, given.get("vocab_size"), "BAGEL")
        if given.get("head_dim", shape.head_dim) != shape.head_dim:
            raise InputError(f"head_dim {shown(given['head_dim'])} is not supported, {shape.head_dim} is")
        return shape


def _check_supported(path: Path, given: Any) -> None:
    """Raises InputError on a setting of another value than the one that is supported."""
    for name, value in _SUPPORTED[path.name].items():
        found = given.get(name, value) if isinstance(given, Mapping) else value
        if found != value or type(found) is not type(value):
            raise InputError(f"{path}: {name} {shown(found)} is not supported, {value} is; use another checkpoint")


def _vision_config(path: Path) -> tuple[TransformerConfig, int]:
    """The tower's shape, without its last layer, which BAGEL leaves out, and the pixels of a patch."""
    given = read_json(path)
    _check_supported(path, given)
    with loading.errors_of(path):
        shape = loading.transformer_config(given, "siglip_vision_model", _VISION_SETTINGS, {}, 1, "BAGEL")
        patch = given.get("patch_size")
        if type(patch) is not int or not 1 <= patch <= 2**8 or shape.num_layers < 2:
            raise InputError(f"patch_size {shown(patch)} and {shape.num_layers} layers do not fit; restore the file")
    return replace(shape, num_layers=shape.num_layers - 1), patch
