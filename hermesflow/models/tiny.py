"""The built-in models' family: a folder of our own.

    FOLDER/  config.json  model.safetensors  vq_tokenizer.safetensors  tokenizer.json

config.json holds the shapes, the layout, the prompts and how images are drawn: masked codes ("tiny"), code by code
("tiny-ar"), or, with "latents", by a flow ("tiny-flow"), as Transfusion (arXiv 2408.11039) draws: in one body with
text, an image's latents full. Its latents are the numbers whose signs are a code's bits (analog bits, arXiv
2208.04202); it sees an image as its latents without noise.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hermesflow.engine.decoders.autoregressive import AutoregressiveDecoder
from hermesflow.engine.decoders.flow import FlowDecoder
from hermesflow.engine.decoders.masked import ImageDecoder
from hermesflow.engine.image_tokenizers.magvit import VQTokenizer, VQTokenizerConfig
from hermesflow.engine.latents import LatentConfig, LatentTransformer, embed_latents, pack_latents, unpack_latents
from hermesflow.engine.token_layout import FeatureSpan, Ids, Layout, TokenLayout
from hermesflow.engine.transformer import Transformer, TransformerConfig
from hermesflow.engine.weights import load_weights, save_weights
from hermesflow.kernels.span_tree import Place
from hermesflow.models.family import ASSETS, CONFIG
from hermesflow.models.loading import make_config
from hermesflow.models.model import Model, PromptFormat
from hermesflow.models.text_tokenizers import WordTokenizer
from hermesflow.runtime.files import InputError, read_json, reason_of

_DECODERS = {"full": ImageDecoder, "causal": AutoregressiveDecoder}
_WEIGHTS, _VQ_WEIGHTS, _TOKENIZER = "model.safetensors", "vq_tokenizer.safetensors", "tokenizer.json"


class TinyModel(Model):
    """A model of this family."""

    is_published = False

    @property
    def image_decoder(self) -> type:
        """By how its images are drawn."""
        return _DECODERS[self.layout.image_mode]

    def write(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Writes the four files; see Model.save."""
        config = {
            "image_size": self.image_size,
            "transformer": self.transformer.config.to_dict(),
            "vq_tokenizer": self.vq_tokenizer.config.to_dict(),
            "layout": self.layout.to_dict(),
            "prompts": asdict(self.prompts),
            "sampling": asdict(self.sampling),
        }
        save_weights(self.transformer, folder / _WEIGHTS, dtype)
        save_weights(self.vq_tokenizer, folder / _VQ_WEIGHTS, dtype)
        self.text_tokenizer.save(folder)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


@dataclass(frozen=True, kw_only=True)
class FlowLayout(Layout):
    """[text | pad, soi, eoi, t2i, mmu]; an image has a square of latents.

    sot and eot are text tokens.
    """

    text_vocab_size: int
    num_image_tokens: int
    latent_size: int
    sot: int
    eot: int

    code_ids = None
    codebook_size = 0

    def __post_init__(self) -> None:
        for name, most in (("text_vocab_size", 2**24), ("num_image_tokens", 2**16), ("latent_size", 2**10)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"FlowLayout: {name} must lie in [1, {most}], got {getattr(self, name)}")
        if math.isqrt(self.num_image_tokens) ** 2 != self.num_image_tokens or self.latent_size % 2:
            raise ValueError("FlowLayout: num_image_tokens must be a square and latent_size even")
        if not 0 <= min(self.sot, self.eot) <= max(self.sot, self.eot) < self.text_vocab_size:
            raise ValueError(f"FlowLayout: sot and eot must be text ids, got {self.sot} and {self.eot}")

    @property
    def vocab_size(self) -> int:
        """Text and the five that follow it."""
        return self.text_vocab_size + 5

    @cached_property
    def text_ids(self) -> Ids:
        """The first of the vocabulary."""
        return Ids(range(self.text_vocab_size))

    @property
    def image_grid(self) -> tuple[int, int]:
        """A square."""
        side = math.isqrt(self.num_image_tokens)
        return side, side

    @property
    def before_image(self) -> tuple[int, ...]:
        """soi."""
        return (self.text_vocab_size + 1,)

    @property
    def after_image(self) -> tuple[int, ...]:
        """eoi."""
        return (self.text_vocab_size + 2,)

    def image(self, codes: Sequence[int]) -> list[int]:
        """[soi, a pad for each latent, eoi]."""
        return [*self.before_image, *[self.text_vocab_size] * self.num_image_tokens, *self.after_image]

    def text_prompt(self, text_ids: Sequence[int]) -> list[int]:
        """Condition of an image: [t2i, sot, text, eot]."""
        return [self.text_vocab_size + 3, self.sot, *text_ids, self.eot]

    def unguided_prompt(self, text_ids: Sequence[int]) -> list[int]:
        """Nothing: the image is a root."""
        return []

    def image_prefix(self, codes: Sequence[int]) -> list[int]:
        """It sees latents as features."""
        raise ValueError("FlowLayout: sees images by features, got codes")

    def feature_span(self, num_features: int) -> FeatureSpan:
        """[mmu, image], a full span of which features stand from the third token on."""
        return FeatureSpan([self.text_vocab_size + 4, *self.image([])], range(2, 2 + num_features), "full", Place())

    def question(self, text_ids: Sequence[int]) -> list[int]:
        """[sot, text]."""
        return [self.sot, *text_ids]

    def to_dict(self) -> dict[str, Any]:
        """The fields, for a configuration file."""
        return asdict(self)


class TinyFlowModel(TinyModel):
    """A model of this family that draws latents by a flow.

    What it sees of an image is made by the parts that embed latents. Once loaded they are not trained, as the encoders
    of other families are not, and views have a copy of them: the transformer's weights may be sharded.
    """

    image_decoder = FlowDecoder
    views_codes = False

    def __init__(self, transformer: LatentTransformer, *parts: Any) -> None:
        """Arguments are Model's."""
        super().__init__(transformer, *parts)
        self._eye = copy.deepcopy(transformer.latent_parts)

    @property
    def num_features(self) -> int:
        """F, latents of an image."""
        return self.layout.num_image_tokens

    def view_pixels(self, images: np.ndarray) -> Tensor:
        """Features [n, F, D] of images that fit: their latents without noise, embedded."""
        return self.view_codes(self.encode_images(images))

    @torch.no_grad()
    def view_codes(self, codes: Tensor) -> Tensor:
        """Likewise of packed latents int64 [n, M]."""
        device, places = self._eye[0].weight.device, self.transformer.places_of(self.layout.image_grid)
        latents = unpack_latents(codes.to(device), self.layout.latent_size)
        now = torch.zeros((), device=device)
        features = embed_latents(self._eye, latents.flatten(0, 1), now, places.repeat(len(latents)))
        return features.unflatten(0, latents.shape[:2])

    @torch.no_grad()
    def encode_images(self, images: np.ndarray) -> Tensor:
        """uint8 [n, H, W, 3] -> packed latents int64 [n, M]: 1 or -1 for each bit of a code."""
        codes = super().encode_images(images)
        if not len(codes):
            return torch.zeros(0, self.layout.code_length, dtype=torch.int64)
        side = self.layout.image_grid
        bits = self.vq_tokenizer.codes_to_latent(codes, *side)
        return pack_latents(bits.flatten(2).transpose(1, 2))

    @torch.no_grad()
    def decode_images(self, codes: Tensor, height: int | None = None, width: int | None = None) -> np.ndarray:
        """Packed latents int64 [n, M] -> uint8 [n, H, W, 3], by the codes whose bits are their signs."""
        rows = unpack_latents(codes, self.layout.latent_size)
        grid = (height or self.layout.image_grid[0], width or self.layout.image_grid[1])
        latent = (
            rows.transpose(1, 2).unflatten(2, grid) if len(rows) else torch.zeros(0, self.layout.latent_size, *grid)
        )
        tokenizer = self.vq_tokenizer
        return super().decode_images(tokenizer.latent_to_codes(latent.to(tokenizer.device)), *grid)

    def write(self, folder: Path, dtype: torch.dtype | None) -> None:
        """With the latents' sizes."""
        super().write(folder, dtype)
        config = json.loads((folder / CONFIG).read_text()) | {"latents": asdict(self.transformer.latents)}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


class TinyFamily:
    """Opens what TinyModel.save wrote."""

    files = (CONFIG, _WEIGHTS, _VQ_WEIGHTS, _TOKENIZER)

    def claims(self, config: Any) -> bool:
        """Published layouts name a class or a type; a configuration that names none is refused by load."""
        return not isinstance(config, dict) or not {"_class_name", "model_type", "architectures"} & config.keys()

    def load(
        self,
        folder: Path,
        config: Mapping[str, Any],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        **_: Any,
    ) -> TinyModel:
        """Opens a folder; see Family.load. Its image tokenizer lies in it."""
        try:
            is_flow = "latents" in config
            with torch.device("meta"):
                shape = make_config(TransformerConfig, config["transformer"])
                sizes = make_config(LatentConfig, config["latents"]) if is_flow else None
                transformer = LatentTransformer(shape, sizes) if is_flow else Transformer(shape)
                vq_tokenizer = VQTokenizer(make_config(VQTokenizerConfig, config["vq_tokenizer"]))
            layout = make_config(FlowLayout if is_flow else TokenLayout, config["layout"])
            image_size = int(config["image_size"])
            _check_sizes(transformer, vq_tokenizer.config, layout, image_size)
            prompts, sampling = _prompts_and_sampling(config, layout)
        except Exception as error:  # wrong values raise many types: ArithmeticError, RuntimeError ...
            raise InputError(
                f"{folder / CONFIG}: not a model configuration ({reason_of(error)}); restore it from its source"
            ) from error
        try:
            load_weights(transformer, folder / _WEIGHTS, dtype=dtype or torch.float32, device=device)
            own = folder / _VQ_WEIGHTS
            shared = own if own.exists() or folder.parent != ASSETS else ASSETS / "tiny" / _VQ_WEIGHTS
            load_weights(vq_tokenizer, shared, dtype=torch.float32, device=device)
        except ValueError as error:
            raise InputError(str(error)) from error
        text_tokenizer = WordTokenizer.from_file(folder / _TOKENIZER)
        if text_tokenizer.size > len(layout.text_ids):
            raise InputError(
                f"{folder / _TOKENIZER}: has {text_tokenizer.size} text ids, the model {len(layout.text_ids)}; "
                "restore it from its source"
            )
        if is_flow:  # what views pass through
            for part in transformer.latent_parts:
                part.requires_grad_(False)
        parts = (transformer.eval(), vq_tokenizer.eval(), text_tokenizer, layout, image_size, prompts, sampling)
        return (TinyFlowModel if is_flow else TinyModel)(*parts)


FAMILY = TinyFamily()


def _prompts_and_sampling(config: Mapping[str, Any], layout: TokenLayout) -> tuple[PromptFormat, Any]:
    """Older folders lack both: they descend from the built-in model."""
    if "prompts" not in config:
        config = read_json(ASSETS / "tiny" / CONFIG)
    decoder = FlowDecoder if layout.latent_size else _DECODERS[layout.image_mode]
    return make_config(PromptFormat, config["prompts"]), make_config(decoder.params, config["sampling"])


def _check_sizes(transformer: Transformer, vq_tokenizer: VQTokenizerConfig, layout: Layout, image_size: int) -> None:
    """Refuses, with ValueError, parts that each are well but do not fit one another."""
    side = image_size // vq_tokenizer.downsampling
    sizes = [
        ("image_size", image_size, max(side, 1) * vq_tokenizer.downsampling),
        ("layout.num_image_tokens", layout.num_image_tokens, side**2),
    ]
    if isinstance(layout, FlowLayout):
        sizes += [
            ("layout.latent_size", layout.latent_size, vq_tokenizer.code_bits),
            ("latents.size", transformer.latents.size, layout.latent_size),
            ("latents.side", max(transformer.latents.side, side), transformer.latents.side),
        ]
    else:
        sizes += [
            ("layout.image_rows", layout.image_rows or side, side),
            ("layout.codebook_size", layout.codebook_size, vq_tokenizer.codebook_size),
        ]
    # Last, since the vocabulary follows from the others.
    sizes.append(("transformer.vocab_size", transformer.config.vocab_size, layout.vocab_size))
    for name, value, expected in sizes:
        if value != expected:
            raise ValueError(f"{name} is {value}, the other sizes make it {expected}")
