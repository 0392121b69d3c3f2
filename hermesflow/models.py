"""A unified model as users hold it: backbone, image tokenizer, text tokenizer and their common token layout.

A model folder holds config.json, model.safetensors, vq_tokenizer.safetensors and tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from torch import Tensor

from hermesflow.engine.engine import Engine
from hermesflow.engine.token_layout import TokenLayout
from hermesflow.engine.transformer import Transformer, TransformerConfig
from hermesflow.engine.vq_tokenizer import VQTokenizer, VQTokenizerConfig
from hermesflow.engine.weights import load_weights, save_weights

from .files import InputError
from .prompting import PromptFormat
from .text_tokenizers import WordTokenizer
from .worlds.shapes import CAPTION_QUESTION

ASSETS = Path(__file__).parent / "assets"
TINY_PROMPTS = PromptFormat(caption_question=CAPTION_QUESTION)


class Model:
    """Backbone, image tokenizer and text tokenizer with one token layout."""

    def __init__(
        self, transformer: Transformer, vq_tokenizer: VQTokenizer, text_tokenizer: WordTokenizer, layout: TokenLayout,
        image_size: int, prompts: PromptFormat = TINY_PROMPTS,
    ) -> None:  # fmt: skip
        self.transformer, self.vq_tokenizer, self.text_tokenizer = transformer, vq_tokenizer, text_tokenizer
        self.layout, self.image_size, self.prompts = layout, image_size, prompts

    @cached_property
    def engine(self) -> Engine:
        """The engine over this model's backbone; it shares the weights, so training shows in it at once."""
        return Engine(self.transformer, self.layout)

    def encode_text(self, text: str) -> list[int]:
        """Text ids without special tokens.

        Raises:
            InputError: a word that the model's closed vocabulary does not have.
        """
        return self.text_tokenizer.encode(text)

    def decode_text(self, ids: Sequence[int]) -> str:
        """Text of ids; ids that are no words of the text vocabulary (special tokens, image codes) are left out."""
        return self.text_tokenizer.decode([token for token in ids if int(token) < self.layout.text_vocab_size])

    @torch.no_grad()
    def encode_images(self, images: np.ndarray) -> Tensor:
        """uint8 [n, H, W, 3] -> codes int64 [n, N]."""
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        weight = self.vq_tokenizer.encoder.conv_in.weight
        batches = (batch.to(weight.device, weight.dtype) / 127.5 - 1 for batch in pixels.split(256))
        codes = [self.vq_tokenizer.encode(batch) for batch in batches]
        return torch.cat(codes) if codes else torch.zeros(0, self.layout.num_image_tokens, dtype=torch.int64)

    def view_images(self, images: Sequence[np.ndarray]) -> Tensor:
        """What the model sees of uint8 images [H, W, 3] of its size, ready for the engine: codes int64 [n, N]."""
        return self.encode_images(np.stack(images))

    @torch.no_grad()
    def decode_images(self, codes: Tensor, height: int | None = None, width: int | None = None) -> np.ndarray:
        """codes int64 [n, h * w] -> uint8 [n, H, W, 3], a square unless height and width are given, in tokens.

        Rounding by batch may move a pixel by a level.
        """
        if not len(codes):
            return np.zeros((0, self.image_size, self.image_size, 3), dtype=np.uint8)
        device = self.vq_tokenizer.encoder.conv_in.weight.device
        images = torch.cat([self.vq_tokenizer.decode(batch.to(device), height, width) for batch in codes.split(256)])
        return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Writes the four files of a model folder; dtype converts the weights (None keeps theirs)."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "image_size": self.image_size,
            "transformer": self.transformer.config.to_dict(),
            "vq_tokenizer": self.vq_tokenizer.config.to_dict(),
            "layout": self.layout.to_dict(),
        }
        save_weights(self.transformer, folder / "model.safetensors", dtype)
        save_weights(self.vq_tokenizer, folder / "vq_tokenizer.safetensors", dtype)
        self.text_tokenizer.save(folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_model(
    name_or_path: str = "tiny", device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Model:
    """Opens a model folder, or the built-in model "tiny".

    Args:
        name_or_path: "tiny" or a folder as Model.save writes it.
        device: where the weights go; None is the CPU.
        dtype: what the weights are converted to; None keeps theirs.
    Raises:
        InputError: no such model, or a file of it is missing, damaged or does not fit the others.
    """
    folder = ASSETS / name_or_path if (ASSETS / name_or_path / "config.json").is_file() else Path(name_or_path)
    if not (folder / "config.json").is_file():
        raise InputError(f"no model {name_or_path!r}: give 'tiny' or a folder that holds config.json")
    try:
        config = json.loads((folder / "config.json").read_text())
        transformer = Transformer(_make_config(TransformerConfig, config["transformer"]))
        vq_tokenizer = VQTokenizer(_make_config(VQTokenizerConfig, config["vq_tokenizer"]))
        layout, image_size = _make_config(TokenLayout, config["layout"]), int(config["image_size"])
        _check_sizes(transformer.config, vq_tokenizer.config, layout, image_size)
    except Exception as error:  # wrong values make the constructors raise many types: ArithmeticError, RuntimeError ...
        raise InputError(
            f"{folder / 'config.json'}: not a model configuration ({error}); restore it from its source"
        ) from error
    try:
        load_weights(transformer, folder / "model.safetensors")
        load_weights(vq_tokenizer, folder / "vq_tokenizer.safetensors")
    except ValueError as error:
        raise InputError(str(error)) from error
    text_tokenizer = WordTokenizer.from_file(folder / "tokenizer.json")
    if text_tokenizer.size > layout.text_vocab_size:
        raise InputError(
            f"{folder / 'tokenizer.json'}: has {text_tokenizer.size} text ids, the model {layout.text_vocab_size}; "
            "restore it from its source"
        )
    model = Model(transformer.eval(), vq_tokenizer.eval(), text_tokenizer, layout, image_size)
    model.transformer.to(device, dtype)
    model.vq_tokenizer.to(device, dtype)
    return model


def _make_config(kind: type, values: dict[str, Any]) -> Any:
    """A configuration from JSON, whose values must have the types of its fields; no size is negative."""
    hints = get_type_hints(kind)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for name, value in values.items():
        expected = hints.get(name)
        numbers = value if isinstance(value, tuple) else (value,)
        if expected == tuple[int, ...]:
            fits = isinstance(value, tuple) and all(type(item) is int for item in value)
        else:
            fits = expected is None or type(value) is expected or (expected is float and type(value) is int)
        if not fits or any(type(item) is int and item < 0 for item in numbers):
            raise ValueError(f"{kind.__name__}: {name} is {value!r}")
    return kind(**values)


def _check_sizes(
    transformer: TransformerConfig, vq_tokenizer: VQTokenizerConfig, layout: TokenLayout, image_size: int
) -> None:
    """Refuses, with ValueError, parts that each are well but do not fit one another."""
    side = image_size // vq_tokenizer.downsampling
    for name, value, expected in (
        ("image_size", image_size, max(side, 1) * vq_tokenizer.downsampling),
        ("layout.num_image_tokens", layout.num_image_tokens, side**2),
        ("layout.codebook_size", layout.codebook_size, vq_tokenizer.codebook_size),
        ("transformer.vocab_size", transformer.vocab_size, layout.vocab_size),
    ):
        if value != expected:
            raise ValueError(f"{name} is {value}, the other sizes make it {expected}")
