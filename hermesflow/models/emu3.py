"""Emu3 (BAAI, arXiv 2409.18869): one joint vocabulary, images row by row, code by code, in any grid.

    BAAI/Emu3-{Gen,Chat,Stage1}-hf    config.json (emu3), weights with the image tokenizer, tokenizer.json
    BAAI/Emu3-{Gen,Chat,Stage1}       config.json (Emu3), weights; tokenizer.json made from emu3.tiktoken beside them

Gen is tuned for drawing and Chat for understanding; Stage1 does both. Prompts and guidance: image_generation.py and
processing_emu3.py of Emu3.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil, floor, isqrt, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hermesflow.engine.decoders.autoregressive import CodeSamplingParams
from hermesflow.engine.engine import Engine
from hermesflow.engine.image_tokenizers.emu3 import Emu3Tokenizer
from hermesflow.engine.token_layout import Ids, check_grid
from hermesflow.engine.transformer import Transformer
from hermesflow.models import llama, loading, vqgan
from hermesflow.models.causal import CausalLayout, CausalModel
from hermesflow.models.checkpoint import FETCHED, load_parts, on_meta
from hermesflow.models.hub import find_folder
from hermesflow.models.images import upright_rgb
from hermesflow.models.model import PromptFormat
from hermesflow.models.text_tokenizers import FileTokenizer
from hermesflow.runtime.files import InputError, read_json, shown

VQ_TOKENIZER = "BAAI/Emu3-VisionTokenizer"
SUFFIX = " masterpiece, film grained, best quality."
NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
SYSTEM_PROMPT = "You are a helpful assistant. USER: "
PROMPTS = PromptFormat(
    caption_question="Give a caption for this image",
    question="{question}. ASSISTANT:",
    answer=" {answer}",
    max_caption_tokens=100,
    max_answer_tokens=100,
)
SAMPLING = CodeSamplingParams(guidance_scale=2.0, top_k=2048)
WEIGHTS = {
    "emu3": llama.weight_table("text_model.model.", "text_model.lm_head"),
    "Emu3": llama.weight_table("model.", "lm_head"),
}
"""By the model_type of config.json."""
GRID = 90
"""Rows and columns of an image of 720 x 720 pixels."""
MOST_ASPECT = 5
_TOKENS = {
    "bos": "<|extra_203|>", "eot": "<|extra_204|>", "boi": "<|image start|>", "eoi": "<|image end|>",
    "img": "<|image token|>", "eol": "<|extra_200|>", "eof": "<|extra_201|>",
}  # fmt: skip
_CODE_NAME = re.compile(r"<\|visual token (\d+)\|>")
_IMAGE_TOKENIZER = "vqmodel."
_DEFAULTS = {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "intermediate_size": 14_336, "rope_theta": 1e6}


@dataclass(frozen=True, kw_only=True)
class Emu3Layout(CausalLayout):
    """Codes end the vocabulary. An image says its grid before its codes, and eol ends each row of them.

    encode: text -> ids, for the grid's numbers. negative_ids stand for the text in the unconditional half.
    """

    vocab_size: int
    code_ids: Ids
    image_grid: tuple[int, int]
    bos: int
    eot: int
    boi: int
    eoi: int
    img: int
    eol: int
    eof: int
    system_ids: tuple[int, ...]
    negative_ids: tuple[int, ...]
    encode: Callable[[str], list[int]] = field(compare=False)

    def of_grid(self, grid: tuple[int, int]) -> Emu3Layout:
        """The same for images of so many rows and columns."""
        check_grid("Emu3", grid)
        return replace(self, image_grid=grid)

    @property
    def codebook_size(self) -> int:
        """As many as there are ids."""
        return len(self.code_ids)

    @cached_property
    def text_ids(self) -> Ids:
        """All but the image codes'."""
        return Ids(range(self.vocab_size - self.codebook_size))

    @cached_property
    def before_image(self) -> tuple[int, ...]:
        """boi, rows * columns in digits, img."""
        rows, columns = self.image_grid
        return (self.boi, *self.encode(f"{rows}*{columns}"), self.img)

    @property
    def row_end(self) -> tuple[int, ...]:
        """eol."""
        return (self.eol,)

    @property
    def after_image(self) -> tuple[int, ...]:
        """eof, eoi."""
        return self.eof, self.eoi

    def unguided_prompt(self, text_ids: Sequence[int]) -> list[int]:
        """[bos, negative prompt], whatever the text is."""
        return [self.bos, *self.negative_ids]

    def image_prefix(self, codes: Sequence[int]) -> list[int]:
        """An image to be understood: [bos, system prompt, image]."""
        return [self.bos, *self.system_ids, *self.image(codes)]


class PixelBounds(NamedTuple):
    """Of images to be understood: their sides are multiples of factor, their pixels lie between least and most."""

    factor: int
    least: int
    most: int

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """Height and width within the bounds, with the aspect kept up to rounding.

        Source: smart_resize of Emu3's image_processing_emu3visionvq.py."""
        sides = [round(side / self.factor) for side in (height, width)]
        pixels = sides[0] * sides[1] * self.factor**2
        if pixels > self.most:
            scale = sqrt(self.most / (height * width)) / self.factor
            sides = [floor(side * scale) for side in (height, width)]
        elif pixels < self.least:
            scale = sqrt(self.least / (height * width)) / self.factor
            sides = [ceil(side * scale) for side in (height, width)]
        return sides[0] * self.factor, sides[1] * self.factor


_PUBLISHED_BOUNDS = PixelBounds(8, 512 * 512, 1024 * 1024)


class Emu3Model(CausalModel):
    """A model of Emu3's class."""

    bounds: PixelBounds

    def fit_whole(self, image: Image.Image, name: str = "image") -> np.ndarray:
        """An image of any mode and size with its aspect, as it is understood: uint8 [H, W, 3].

        Raises: InputError, which calls it by its name, on an aspect above MOST_ASPECT.
        """
        image = upright_rgb(image)
        width, height = image.size
        if max(width, height) > MOST_ASPECT * min(width, height):
            raise InputError(
                f"{name}: Emu3 sees images of an aspect up to {MOST_ASPECT}, got {width} x {height} pixels; crop it"
            )
        height, width = self.bounds.fit(height, width)
        return np.array(image.resize((width, height), Image.Resampling.BICUBIC))

    def views(self, images: Iterable[Image.Image]) -> Iterator[tuple[Sequence[int], Tensor, Engine]]:
        """See Model; every image keeps its aspect."""
        groups: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
        for number, image in enumerate(images):
            pixels = self.fit_whole(image, f"image {number + 1}")
            groups.setdefault(pixels.shape, []).append((number, pixels))
        for (height, width, _), group in groups.items():
            numbers, pixels = zip(*group, strict=True)
            grid = height // self.bounds.factor, width // self.bounds.factor
            yield numbers, self.encode_images(np.stack(pixels)), self.engine.of_grid(grid)

    def whole_prompt(self, text: str) -> list[int]:
        """Text ids of an image's prompt, with the suffix that asks for quality; none of an empty text."""
        return self.encode_text(text + SUFFIX) if text else []

    def tokenizer_tensors(self) -> dict[str, Tensor]:
        """All of it in transformers' layout; the original one keeps it in a checkpoint of its own."""
        if "vq_config" not in json.loads(self.kept_files["config.json"]):
            return {}
        return vqgan.tokenizer_tensors(self.vq_tokenizer, vqgan.EMU3, _IMAGE_TOKENIZER)


class Emu3Family:
    """Opens checkpoints of Emu3's classes."""

    files = FETCHED

    def claims(self, config: Any) -> bool:
        """By its model_type."""
        return isinstance(config, dict) and config.get("model_type") in tuple(WEIGHTS)

    def load(
        self,
        folder: Path,
        config: Mapping[str, Any],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        vq_tokenizer: str | None = None,
    ) -> Emu3Model:
        """Opens a checkpoint; see Family.load. vq_tokenizer is load_model's."""
        path, tokenizer, kind = folder / "config.json", FileTokenizer(folder), config["model_type"]
        text, of_text = (config.get("text_config"), "emu3_text_model") if kind == "emu3" else (config, kind)
        vocab_size = text.get("vocab_size") if isinstance(text, Mapping) else None
        with loading.errors_of(path):
            shape = llama.transformer_config(text, of_text, _DEFAULTS, vocab_size, "Emu3")
        bounds = _pixel_bounds(folder)
        side = min(GRID, isqrt(bounds.most) // bounds.factor)
        layout = make_layout(tokenizer, vocab_size, (side, side))
        parts = on_meta(lambda: {"transformer": Transformer(shape)}, path)

        def tensors(parts: nn.ModuleDict) -> dict[str, Tensor]:
            return loading.published_tensors(WEIGHTS[kind], parts["transformer"])

        def open_tokenizer(device: torch.device) -> Emu3Tokenizer:
            if vq_tokenizer is None and isinstance(config.get("vq_config"), Mapping):
                with loading.errors_of(path):
                    of_codes = vqgan.emu3_config(config["vq_config"])
                return vqgan.load_image_tokenizer(folder, of_codes, vqgan.EMU3, _IMAGE_TOKENIZER, device=device)
            source = find_folder(vq_tokenizer or VQ_TOKENIZER, FETCHED, "image tokenizer")
            with loading.errors_of(source / "config.json"):
                of_codes = vqgan.emu3_config(read_json(source / "config.json"))
            return vqgan.load_image_tokenizer(source, of_codes, vqgan.EMU3_ORIGINAL, device=device)

        load_parts(parts, folder, tensors, re.escape(_IMAGE_TOKENIZER) + ".*", dtype, device)
        settings = (tokenizer, layout, side * bounds.factor, PROMPTS, SAMPLING, open_tokenizer)
        model = Emu3Model(folder, parts, tensors, *settings)
        model.bounds = bounds
        return model


FAMILY = Emu3Family()


def make_layout(tokenizer: FileTokenizer, vocab_size: int, grid: tuple[int, int]) -> Emu3Layout:
    """The vocabulary by its tokens' names.

    Raises: InputError if a token is missing, or the codes do not end the vocabulary in their order.
    """
    found = ((_CODE_NAME.fullmatch(name), token) for name, token in tokenizer.vocabulary.items())
    codes = {int(match[1]): token for match, token in found if match}
    first = (vocab_size if type(vocab_size) is int else 0) - len(codes)
    if not codes or codes != {code: first + code for code in range(len(codes))}:
        raise InputError(
            f"{tokenizer.folder}: the tokenizer's visual tokens are not the last of config.json's vocabulary of "
            f"{shown(vocab_size)}; give the tokenizer that belongs to the checkpoint"
        )
    ids = {name: tokenizer.id(token) for name, token in _TOKENS.items()}
    return Emu3Layout(
        vocab_size=vocab_size,
        code_ids=Ids(range(first, vocab_size)),
        image_grid=grid,
        system_ids=tuple(tokenizer.encode(SYSTEM_PROMPT)),
        negative_ids=tuple(tokenizer.encode(NEGATIVE_PROMPT)),
        encode=tokenizer.encode,
        **ids,
    )


def _pixel_bounds(folder: Path) -> PixelBounds:
    """What the preprocessor allows; as published where it is silent."""
    path = folder / "preprocessor_config.json"
    given = read_json(path) if path.is_file() else {}
    names = ("spatial_factor", "min_pixels", "max_pixels")
    given = given if isinstance(given, Mapping) else dict.fromkeys(names)
    bounds = PixelBounds(*(given.get(name, usual) for name, usual in zip(names, _PUBLISHED_BOUNDS, strict=True)))
    if any(type(value) is not int for value in bounds) or min(bounds) < 1 or bounds.factor**2 > bounds.most:
        raise InputError(
            f"{path}: expected {', '.join(names)} as numbers, got {', '.join(map(shown, bounds))}; restore it from its "
            "source"
        )
    return bounds
