"""The built-in model's family: a folder of our own.

    FOLDER/  config.json  model.safetensors  vq_tokenizer.safetensors  tokenizer.json      (built in: "tiny", "tiny-ar")

config.json holds the shapes, the layout, the prompts and how images are drawn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hermesflow.engine.decoders.autoregressive import AutoregressiveDecoder
from hermesflow.engine.decoders.masked import ImageDecoder
from hermesflow.engine.image_tokenizers.magvit import VQTokenizer, VQTokenizerConfig
from hermesflow.engine.token_layout import TokenLayout
from hermesflow.engine.transformer import Transformer, TransformerConfig
from hermesflow.engine.weights import load_weights, save_weights
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
            with torch.device("meta"):
                transformer = Transformer(make_config(TransformerConfig, config["transformer"]))
                vq_tokenizer = VQTokenizer(make_config(VQTokenizerConfig, config["vq_tokenizer"]))
            layout, image_size = make_config(TokenLayout, config["layout"]), int(config["image_size"])
            _check_sizes(transformer.config, vq_tokenizer.config, layout, image_size)
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
        return TinyModel(transformer.eval(), vq_tokenizer.eval(), text_tokenizer, layout, image_size, prompts, sampling)


FAMILY = TinyFamily()


def _prompts_and_sampling(config: Mapping[str, Any], layout: TokenLayout) -> tuple[PromptFormat, Any]:
    """Older folders lack both: they descend from the built-in model."""
    if "prompts" not in config:
        config = read_json(ASSETS / "tiny" / CONFIG)
    return make_config(PromptFormat, config["prompts"]), make_config(
        _DECODERS[layout.image_mode].params, config["sampling"]
    )


def _check_sizes(
    transformer: TransformerConfig, vq_tokenizer: VQTokenizerConfig, layout: TokenLayout, image_size: int
) -> None:
    """Refuses, with ValueError, parts that each are well but do not fit one another."""
    side = image_size // vq_tokenizer.downsampling
    for name, value, expected in (
        ("image_size", image_size, max(side, 1) * vq_tokenizer.downsampling),
        ("layout.num_image_tokens", layout.num_image_tokens, side**2),
        ("layout.image_rows", layout.image_rows or side, side),
        ("layout.codebook_size", layout.codebook_size, vq_tokenizer.codebook_size),
        ("transformer.vocab_size", transformer.vocab_size, layout.vocab_size),
    ):
        if value != expected:
            raise ValueError(f"{name} is {value}, the other sizes make it {expected}")
