"""Janus and Janus-Pro (deepseek-ai, arXiv 2501.17811): images are seen as features of SigLIP and drawn code by code,
with a table and a head of their own.

    deepseek-community/Janus-Pro-*               config.json (janus), weights of all parts, tokenizer.json
    deepseek-ai/Janus-1.3B, Janus-Pro-1B, -7B    the same with config.json (multi_modality) and other names

Prompts and guidance: generation_inference.py and inference.py of Janus. Codes have ids behind the text vocabulary,
where the checkpoint has none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from hermesflow.engine.decoders.autoregressive import CodeSamplingParams
from hermesflow.engine.image_tokenizers.vqgan import VQGAN
from hermesflow.engine.token_layout import Ids
from hermesflow.engine.transformer import CodeHead, Embeds, Linear, Transformer, TransformerConfig
from hermesflow.engine.weights import own_tensors, read_tensors
from hermesflow.models import llama, loading, siglip, vqgan
from hermesflow.models.causal import CausalLayout, CausalModel
from hermesflow.models.checkpoint import FETCHED, load_parts, on_meta
from hermesflow.models.images import pad_image
from hermesflow.models.model import PromptFormat
from hermesflow.models.siglip import SiglipTower
from hermesflow.models.text_tokenizers import FileTokenizer
from hermesflow.runtime.files import InputError, shown

SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
ROLES = ("<|User|>", "<|Assistant|>")
BEFORE_IMAGE = SYSTEM_PROMPT + "\n\n<|User|>: "
DRAWING_PROMPT = "<|User|>: {prompt}\n\n<|Assistant|>:"
PROMPTS = PromptFormat(
    caption_question="Give a caption for this image.",
    question="\n{question}\n\n<|Assistant|>:",
    answer=" {answer}",
    max_caption_tokens=100,
    max_answer_tokens=100,
)
SAMPLING = CodeSamplingParams(guidance_scale=4.0)
TOKENS = {
    "bos": "<｜begin▁of▁sentence｜>", "eot": "<｜end▁of▁sentence｜>", "boi": "<begin_of_image>",
    "eoi": "<end_of_image>", "pad": "<｜▁pad▁｜>",
}  # fmt: skip
_IMAGES_PER_PASS = 32


@dataclass(frozen=True, kw_only=True)
class JanusLayout(CausalLayout):
    """[text | codes]; pads stand for the text in the unconditional half, which is as long as the prompt."""

    text_vocab_size: int
    codebook_size: int
    image_grid: tuple[int, int]
    bos: int
    eot: int
    boi: int
    eoi: int
    pad: int
    before_image_ids: tuple[int, ...]
    """What stands between bos and an image to be understood."""
    codes_apart = True

    @property
    def vocab_size(self) -> int:
        """Of both tables."""
        return self.text_vocab_size + self.codebook_size

    @cached_property
    def text_ids(self) -> Ids:
        """The first of the vocabulary."""
        return Ids(range(self.text_vocab_size))

    @cached_property
    def code_ids(self) -> Ids:
        """Behind the text ids."""
        return Ids(range(self.text_vocab_size, self.vocab_size))

    def unguided_prompt(self, text_ids: Sequence[int]) -> list[int]:
        """[bos, a pad for each id of the text]."""
        return [self.bos, *[self.pad] * len(text_ids)]

    def image_prefix(self, codes: Sequence[int]) -> list[int]:
        """An image by its codes, which the model was not trained to understand."""
        return [self.bos, *self.before_image_ids, *self.image(codes)]

    def feature_prefix(self, num_features: int) -> tuple[list[int], int]:
        """An image to be understood: [bos, system prompt, boi, a pad for each feature]."""
        before = [self.bos, *self.before_image_ids, self.boi]
        return [*before, *[self.pad] * num_features], len(before)

    def feature_question(self, text_ids: Sequence[int]) -> list[int]:
        """A question about an image given by features: [eoi, text]."""
        return [self.eoi, *text_ids]


class JanusTransformer(Transformer):
    """The backbone with a table and a head for image codes beside those for text."""

    def __init__(
        self,
        config: TransformerConfig,
        text_vocab_size: int,
        code_embed: nn.Module,
        code_hidden: Linear,
        num_codes: int,
    ) -> None:
        """
        Args:
            config: the shape; its vocabulary is that of text and codes.
            text_vocab_size: rows of the text's table and head.
            code_embed: codes -> vectors of the backbone's width.
            code_hidden: the head's first layer, from the backbone's width.
            num_codes: of the code book.
        """
        super().__init__(config)
        if config.tie_embeddings:
            raise ValueError("tie_word_embeddings is not supported; give a checkpoint with a head of its own")
        self.embed = nn.Embedding(text_vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, text_vocab_size, bias=False)
        self.code_embed, self.code_hidden = code_embed, code_hidden
        self.code_out = nn.Linear(code_hidden.out_features, num_codes)

    def _embedded(self, token_ids: Tensor, embeds: Embeds | None) -> Tensor:
        is_code = token_ids >= self.embed.num_embeddings
        text = self.embed(token_ids.masked_fill(is_code, 0))
        codes = self.code_embed((token_ids - self.embed.num_embeddings).clamp(min=0))
        x = torch.where(is_code[:, None], codes, text)
        if embeds is None:
            return x
        rows, values = embeds
        return x.index_copy(0, rows.to(x.device), values.to(x))

    def skeleton(self) -> JanusTransformer:
        """See Transformer."""
        table, *layers = self.code_embed
        sizes = [(layer.in_features, layer.out_features) for layer in layers if isinstance(layer, nn.Linear)]
        aligner = [part for size in sizes for part in (Linear(*size), nn.GELU())][:-1]
        embed = nn.Sequential(nn.Embedding(table.num_embeddings, table.embedding_dim), *aligner)
        hidden = Linear(self.code_hidden.in_features, self.code_hidden.out_features)
        return JanusTransformer(self.config, self.embed.num_embeddings, embed, hidden, table.num_embeddings)

    def code_head(self, code_ids: Ids) -> CodeHead:
        """Linear in GELU of the first layer."""
        return CodeHead(self.code_out.weight, self.code_out.bias, lambda hidden: F.gelu(self.code_hidden(hidden)))


class _Names(NamedTuple):
    """How a published layout calls the parts."""

    body: str
    head: str
    code_table: str
    code_aligner: str
    code_head: tuple[str, str]
    aligner: str
    tower: str
    tower_weights: Mapping[str, Sequence[str]]
    image_tokenizer: str
    tokenizer_layout: vqgan.Layout
    mlp: Callable[[str, int], str]
    """Name of the n-th linear layer of an aligner."""


LAYOUTS = {
    "janus": _Names(
        "model.language_model.",
        "lm_head",
        "model.generation_embeddings.weight",
        "model.generation_aligner",
        ("model.generation_head.proj_out", "model.generation_head.vision_head"),
        "model.aligner",
        "model.vision_model.",
        siglip.WEIGHTS,
        "model.vqmodel.",
        vqgan.JANUS,
        lambda prefix, number: f"{prefix}.hidden_layers.{number - 1}" if number else f"{prefix}.fc1",
    ),
    "multi_modality": _Names(
        "language_model.model.",
        "language_model.lm_head",
        "gen_embed.weight",
        "gen_aligner",
        ("gen_head.output_mlp_projector", "gen_head.vision_head"),
        "aligner",
        "vision_model.vision_tower.",
        siglip.TIMM_WEIGHTS,
        "gen_vision_model.",
        vqgan.JANUS_ORIGINAL,
        lambda prefix, number: f"{prefix}.layers.{2 * number}",
    ),
}
"""By model_type: transformers' layout, and deepseek-ai's own."""
_LEFT_OVER = r"vision_model\.vision_tower\.attn_pool\..*"


class JanusModel(CausalModel):
    """A model of Janus's class, which sees images as features."""

    views_codes = False

    def whole_prompt(self, text: str) -> list[int]:
        """Text ids of an image's prompt with both roles around it."""
        return self.encode_text(DRAWING_PROMPT.format(prompt=text))

    def fit(self, image: Image.Image) -> np.ndarray:
        """The longer side, with grey around the image; rounded as transformers does, where Janus's own code cuts."""
        return pad_image(image, self.image_size, fill=127)

    @property
    def num_features(self) -> int:
        """F, patches of an image."""
        return self.parts["tower"].position.num_embeddings

    @torch.no_grad()
    def view_pixels(self, images: np.ndarray) -> Tensor:
        """Features [n, F, D] of images, uint8 [n, image_size, image_size, 3]."""
        weight = self.parts["aligner"][-1].weight
        features = [weight.new_zeros(0, self.num_features, len(weight))]
        for batch in torch.from_numpy(images).permute(0, 3, 1, 2).split(_IMAGES_PER_PASS) if len(images) else ():
            features.append(self.features(batch.to(weight) / 127.5 - 1))
        return torch.cat(features)

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels [n, 3, image_size, image_size] in [-1, 1] -> features [n, F, D]; differentiable."""
        seen = self.parts["tower"](pixels)
        return self.parts["aligner"](seen.flatten(0, 1)).unflatten(0, seen.shape[:2])

    def tokenizer_tensors(self) -> dict[str, Tensor]:
        """All of it."""
        names = LAYOUTS[json.loads(self.kept_files["config.json"])["model_type"]]
        return vqgan.tokenizer_tensors(self.vq_tokenizer, names.tokenizer_layout, names.image_tokenizer)

    def modules(self) -> tuple[nn.Module, ...]:
        """With the tower and its aligner."""
        return *super().modules(), self.parts["tower"], self.parts["aligner"]


class JanusFamily:
    """Opens checkpoints of Janus's classes."""

    files = FETCHED

    def claims(self, config: Any) -> bool:
        """By its model_type."""
        return isinstance(config, dict) and config.get("model_type") in tuple(LAYOUTS)

    def load(
        self,
        folder: Path,
        config: Mapping[str, Any],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        vq_tokenizer: str | None = None,
    ) -> JanusModel:
        """Opens a checkpoint; see Family.load. The image tokenizer is the checkpoint's own."""
        path, kind, tokenizer = folder / "config.json", config["model_type"], FileTokenizer(folder, ROLES)
        if vq_tokenizer is not None:
            raise InputError(f"vq_tokenizer {vq_tokenizer}: Janus's checkpoints hold their own; leave it out")
        names = LAYOUTS[kind]
        try:
            shapes = {name: tensor.shape for name, tensor in read_tensors(folder).items()}
        except ValueError as error:
            raise InputError(str(error)) from error
        text = config.get("text_config" if kind == "janus" else "language_config")
        text_vocab_size = text.get("vocab_size") if isinstance(text, Mapping) else None
        (num_codes, code_width), (hidden, width) = (
            shape if len(shape := shapes.get(name, ())) == 2 else (1, 1)
            for name in (names.code_table, f"{names.code_head[0]}.weight")
        )
        if type(text_vocab_size) is not int:
            raise InputError(f"{path}: vocab_size of the language model is {shown(text_vocab_size)}; restore it")
        with loading.errors_of(path):
            shape = llama.transformer_config(text, "llama", {}, text_vocab_size + num_codes, "Janus")
        vision = siglip.sizes(config.get("vision_config"), path)

        def make() -> dict[str, nn.Module]:
            embed = nn.Sequential(nn.Embedding(num_codes, code_width), *_mlp(shapes, names, names.code_aligner))
            return {
                "transformer": JanusTransformer(shape, text_vocab_size, embed, Linear(width, hidden), num_codes),
                "aligner": _mlp(shapes, names, names.aligner),
                "tower": SiglipTower(**vision),
            }

        parts = on_meta(make, path)
        with loading.errors_of(folder):
            of_codes = vqgan.config_of_shapes(shapes, names.image_tokenizer, normalized_codes=True)
        side = vision["image_size"] // of_codes.downsampling
        layout = make_layout(tokenizer, text_vocab_size, num_codes, (side, side))

        def tensors(parts: nn.ModuleDict) -> dict[str, Tensor]:
            return _tensors(parts, names)

        def open_tokenizer(device: torch.device) -> VQGAN:
            layout, prefix = names.tokenizer_layout, names.image_tokenizer
            return vqgan.load_image_tokenizer(folder, of_codes, layout, prefix, device=device)

        ignored = f"{re.escape(names.image_tokenizer)}.*|{_LEFT_OVER}"
        load_parts(parts, folder, tensors, ignored, dtype, device)
        settings = (tokenizer, layout, vision["image_size"], PROMPTS, SAMPLING, open_tokenizer)
        return JanusModel(folder, parts, tensors, *settings)


FAMILY = JanusFamily()


def make_layout(tokenizer: FileTokenizer, text_vocab_size: int, num_codes: int, grid: tuple[int, int]) -> JanusLayout:
    """The vocabulary by its tokens' names, whose ids differ between sizes. Raises: InputError if one is missing."""
    ids = {name: tokenizer.id(token) for name, token in TOKENS.items()}
    highest = max(tokenizer.vocabulary.values())
    if highest >= text_vocab_size:
        raise InputError(
            f"{tokenizer.folder}: the tokenizer has ids up to {highest}, config.json's vocab_size is "
            f"{shown(text_vocab_size)}; give the tokenizer that belongs to the checkpoint"
        )
    before = tuple(tokenizer.encode(BEFORE_IMAGE))
    return JanusLayout(
        text_vocab_size=text_vocab_size, codebook_size=num_codes, image_grid=grid, before_image_ids=before, **ids
    )


def _mlp(shapes: Mapping[str, torch.Size], names: _Names, prefix: str) -> nn.Sequential:
    """Linear layers with GELU between them, in the widths that the checkpoint has."""
    layers: list[nn.Module] = []
    while (shape := shapes.get(f"{names.mlp(prefix, len(layers) // 2)}.weight")) is not None:
        layers += [Linear(shape[1], shape[0]), nn.GELU()]
    if not layers:
        raise ValueError(f"no weights under {prefix}")
    return nn.Sequential(*layers[:-1])


def _tensors(parts: nn.ModuleDict, names: _Names) -> dict[str, Tensor]:
    """Every published tensor's name -> the place in the modules that it fills."""
    transformer = parts["transformer"]
    found = loading.published_tensors(llama.weight_table(names.body, names.head), transformer)
    found[names.code_table] = transformer.code_embed[0].weight.detach()
    layers = dict(zip(names.code_head, (transformer.code_hidden, transformer.code_out), strict=True))
    for prefix, mlp in ((names.code_aligner, transformer.code_embed[1:]), (names.aligner, parts["aligner"])):
        linear = (layer for layer in mlp if isinstance(layer, nn.Linear))
        layers |= {names.mlp(prefix, number): layer for number, layer in enumerate(linear)}
    for name, layer in layers.items():
        found |= {f"{name}.{kind}": tensor for kind, tensor in own_tensors(layer).items()}
    return found | siglip.published_tensors(parts["tower"], names.tower_weights, names.tower)
