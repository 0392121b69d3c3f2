"""A unified model as users hold it: backbone, image tokenizer, text tokenizer and their common token layout.

A folder of our own holds config.json, model.safetensors, vq_tokenizer.safetensors and tokenizer.json; families.py and
published.py know the published layouts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hermesflow.engine.engine import Engine
from hermesflow.engine.image_decoder import ImageSamplingParams
from hermesflow.engine.token_layout import TokenLayout
from hermesflow.engine.transformer import Transformer, TransformerConfig
from hermesflow.engine.vq_tokenizer import VQTokenizer, VQTokenizerConfig
from hermesflow.engine.weights import load_weights, save_weights

from .config import CurationConfig, EvalConfig, ModelConfig
from .distributed import local_device
from .files import InputError, read_json, reason_of, shown
from .hub import find_folder
from .images import fit_image
from .prompting import PromptFormat
from .text_tokenizers import PretrainedTokenizer, WordTokenizer
from .worlds.shapes import CAPTION_QUESTION

ASSETS = Path(__file__).parent / "assets"
TINY_PROMPTS = PromptFormat(caption_question=CAPTION_QUESTION)
TINY_SAMPLING = ImageSamplingParams(num_steps=8, guidance_scale=0.5, mask_temperature=1.0, temperature=0.7)


class Model:
    """Backbone, image tokenizer and text tokenizer with one token layout."""

    def __init__(
        self, transformer: Transformer, vq_tokenizer: VQTokenizer | None,
        text_tokenizer: WordTokenizer | PretrainedTokenizer, layout: TokenLayout, image_size: int,
        prompts: PromptFormat = TINY_PROMPTS, sampling: ImageSamplingParams = TINY_SAMPLING,
    ) -> None:  # fmt: skip
        self.transformer, self.text_tokenizer, self.layout = transformer, text_tokenizer, layout
        self.image_size, self.prompts, self.sampling = image_size, prompts, sampling
        if vq_tokenizer is not None:  # a subclass may open its own when it is needed
            self.vq_tokenizer = vq_tokenizer

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

    def sampling_of(self, settings: CurationConfig | EvalConfig) -> ImageSamplingParams:
        """How images are drawn under these settings: the model's own way where they leave it open."""
        given = {"num_steps": settings.num_steps or self.sampling.num_steps}
        for name in ("temperature", "guidance_scale", "mask_temperature"):
            value = getattr(settings, name)
            given[name] = getattr(self.sampling, name) if value < 0 else value
        return replace(self.sampling, **given)

    @property
    def views_codes(self) -> bool:
        """Whether it sees images as their codes, and not as features of a vision encoder."""
        return True

    def view_images(self, images: Iterable[Image.Image]) -> Tensor:
        """What the model sees of images of any size, ready for the engine: codes int64 [n, N]."""
        return self.encode_images(np.stack([fit_image(image, self.image_size) for image in images]))

    @torch.no_grad()
    def encode_images(self, images: np.ndarray) -> Tensor:
        """uint8 [n, H, W, 3] with H and W multiples of a token's pixels -> codes int64 [n, h * w]."""
        if not len(images):
            return torch.zeros(0, self.layout.num_image_tokens, dtype=torch.int64)
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        weight = self.vq_tokenizer.encoder.conv_in.weight
        batches = pixels.split(self.vq_tokenizer.images_per_pass(*pixels.shape[2:]))
        return torch.cat(
            [self.vq_tokenizer.encode(batch.to(weight.device, weight.dtype) / 127.5 - 1) for batch in batches]
        )

    @torch.no_grad()
    def decode_images(self, codes: Tensor, height: int | None = None, width: int | None = None) -> np.ndarray:
        """codes int64 [n, h * w] -> uint8 [n, H, W, 3]; height and width in tokens, else a square.

        Rounding by batch may move a pixel by a level.
        """
        if not len(codes):
            return np.zeros((0, self.image_size, self.image_size, 3), dtype=np.uint8)
        device, factor = self.vq_tokenizer.encoder.conv_in.weight.device, self.vq_tokenizer.config.downsampling
        batches = codes.split(self.vq_tokenizer.images_per_pass(codes.shape[1] * factor, factor))
        images = torch.cat(
            [to_pixels(self.vq_tokenizer.decode(batch.to(device), height, width)).cpu() for batch in batches]
        )
        return images.permute(0, 2, 3, 1).numpy()

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Writes the four files of a model folder; dtype converts the weights (None keeps theirs).

        Raises: InputError while adapters stand around the transformer's layers, for no one could read the weights.
        """
        if any(".lora_" in name for name, _ in self.transformer.named_parameters()):
            raise InputError(f"{folder}: the model still has adapters around its layers; merge them before saving")
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


def to_pixels(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8 of the same shape."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def open_model(config: ModelConfig) -> Model:
    """The model of a run's settings, where and in the dtype that they say. Raises: InputError as load_model does."""
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    return load_model(config.name, local_device(config.device), dtype)


def load_model(
    name_or_path: str = "tiny", device: torch.device | str | None = None, dtype: torch.dtype | None = None, *,
    vq_tokenizer: str | None = None,
) -> Model:  # fmt: skip
    """Opens the built-in model "tiny", a folder that Model.save wrote, or a published checkpoint of Show-o's class.

    Args:
        name_or_path: "tiny", a folder, or a hub id such as "showlab/show-o-512x512" or "Gen-Verse/HermesFlow".
        device: where the weights go; None is the CPU.
        dtype: of the backbone; None takes the checkpoint's, and fp32 for folders that Model.save wrote.
        vq_tokenizer: for published checkpoints: folder or hub id of the image tokenizer; None takes the one beside the
            checkpoint (magvitv2/), else the family's own. It is opened when it is first needed.
    Raises:
        InputError: no such model, the hub cannot be reached, or a file of it is missing, damaged or does not fit the
            others; what does not fit is listed.
    """
    from .published import CHECKPOINT_FILES, load_published

    is_name = name_or_path == Path(name_or_path).name  # "./tiny" is a folder of the user's
    folder = ASSETS / name_or_path if is_name and os.path.isfile(ASSETS / name_or_path / "config.json") else None
    if folder is None and ("/" in name_or_path or os.path.isdir(name_or_path)):
        folder = find_folder(name_or_path, CHECKPOINT_FILES, "model")
    if folder is None or not (folder / "config.json").is_file():
        raise InputError(
            f"no model {shown(name_or_path)}: give 'tiny', a folder that holds config.json, or a hub id such as "
            "showlab/show-o-512x512"
        )
    config = read_json(folder / "config.json")
    if isinstance(config, dict) and "_class_name" in config:
        return load_published(folder, config, device, dtype, vq_tokenizer)
    return _load_own(folder, config, device, dtype)


def _load_own(folder: Path, config: Any, device: torch.device | str | None, dtype: torch.dtype | None) -> Model:
    """Opens what Model.save wrote."""
    try:
        with torch.device("meta"):
            transformer = Transformer(make_config(TransformerConfig, config["transformer"]))
            vq_tokenizer = VQTokenizer(make_config(VQTokenizerConfig, config["vq_tokenizer"]))
        layout, image_size = make_config(TokenLayout, config["layout"]), int(config["image_size"])
        _check_sizes(transformer.config, vq_tokenizer.config, layout, image_size)
    except Exception as error:  # wrong values make the constructors raise many types: ArithmeticError, RuntimeError ...
        raise InputError(
            f"{folder / 'config.json'}: not a model configuration ({reason_of(error)}); restore it from its source"
        ) from error
    try:
        load_weights(transformer, folder / "model.safetensors", dtype=dtype or torch.float32, device=device)
        load_weights(vq_tokenizer, folder / "vq_tokenizer.safetensors", dtype=torch.float32, device=device)
    except ValueError as error:
        raise InputError(str(error)) from error
    text_tokenizer = WordTokenizer.from_file(folder / "tokenizer.json")
    if text_tokenizer.size > layout.text_vocab_size:
        raise InputError(
            f"{folder / 'tokenizer.json'}: has {text_tokenizer.size} text ids, the model {layout.text_vocab_size}; "
            "restore it from its source"
        )
    return Model(transformer.eval(), vq_tokenizer.eval(), text_tokenizer, layout, image_size)


def make_config(kind: type, values: dict[str, Any]) -> Any:
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
            raise ValueError(f"{kind.__name__}: {name} is {shown(value)}")
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
