"""Janus and Janus-Pro (deepseek-ai, arXiv 2501.17811): images are seen as features of SigLIP and drawn code by code,
with a table and a head of their own.

    deepseek-community/Janus-Pro-*    config.json (janus), weights of all parts, tokenizer.json

Prompts and guidance: generation_inference.py and inference.py of Janus. Codes have ids behind the text vocabulary,
where the checkpoint has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hermesflow.engine.decoders.autoregressive import AutoregressiveDecoder, CodeSamplingParams
from hermesflow.engine.token_layout import Ids, Layout
from hermesflow.engine.transformer import CodeHead, Embeds, Transformer, TransformerConfig
from hermesflow.engine.weights import WEIGHT_FILES, load_weights, own_tensors, read_tensors
from hermesflow.models import llama, loading, siglip
from hermesflow.models.model import Model, PromptFormat
from hermesflow.models.siglip import SiglipTower
from hermesflow.models.text_tokenizers import FileTokenizer
from hermesflow.runtime.files import InputError, shown

MODEL_TYPE = "janus"
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
WEIGHTS = llama.weight_table("model.language_model.", "lm_head")
_TOKENS = {
    "bos": "<｜begin▁of▁sentence｜>", "eot": "<｜end▁of▁sentence｜>", "boi": "<begin_of_image>",
    "eoi": "<end_of_image>", "pad": "<｜▁pad▁｜>",
}  # fmt: skip
_IMAGE_TOKENIZER = r"model\.vqmodel\..*"


@dataclass(frozen=True, kw_only=True)
class JanusLayout(Layout):
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
    image_mode = prefix_mode = "causal"
    codes_apart = True

    @property
    def vocab_size(self) -> int:
        """Of both tables."""
        return self.text_vocab_size + self.codebook_size

    @property
    def num_image_tokens(self) -> int:
        """Of the grid."""
        return self.image_grid[0] * self.image_grid[1]

    @cached_property
    def text_ids(self) -> Ids:
        """The first of the vocabulary."""
        return Ids(range(self.text_vocab_size))

    @cached_property
    def code_ids(self) -> Ids:
        """Behind the text ids."""
        return Ids(range(self.text_vocab_size, self.vocab_size))

    @property
    def before_image(self) -> tuple[int, ...]:
        """boi."""
        return (self.boi,)

    @property
    def after_image(self) -> tuple[int, ...]:
        """eoi."""
        return (self.eoi,)

    def text_prompt(self, text_ids: Sequence[int]) -> list[int]:
        """Condition of an image: [bos, text]."""
        return [self.bos, *text_ids]

    def unguided_prompt(self, text_ids: Sequence[int]) -> list[int]:
        """[bos, a pad for each id of the text]."""
        return [self.bos, *[self.pad] * len(text_ids)]

    def image_prefix(self, codes: Sequence[int]) -> list[int]:
        """An image by its codes, which the model was not trained to understand."""
        return [self.bos, *self.before_image_ids, *self.image(codes)]

    def question(self, text_ids: Sequence[int]) -> list[int]:
        """What is asked of an image."""
        return list(text_ids)

    def feature_prefix(self, num_features: int) -> tuple[list[int], int]:
        """An image to be understood: [bos, system prompt, boi, a pad for each feature]."""
        before = [self.bos, *self.before_image_ids, self.boi]
        return [*before, *[self.pad] * num_features], len(before)

    def feature_question(self, text_ids: Sequence[int]) -> list[int]:
        """What is asked of an image given by features: [eoi, text]."""
        return [self.eoi, *text_ids]


class JanusTransformer(Transformer):
    """The backbone with a table and a head for image codes beside those for text."""

    def __init__(
        self,
        config: TransformerConfig,
        text_vocab_size: int,
        code_embed: nn.Module,
        code_hidden: nn.Linear,
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

    def code_head(self, code_ids: Ids) -> CodeHead:
        """Linear in GELU of the first layer."""
        return CodeHead(self.code_out.weight, self.code_out.bias, lambda hidden: F.gelu(self.code_hidden(hidden)))


class JanusModel(Model):
    """A model of Janus's class."""

    image_decoder = AutoregressiveDecoder
    views_codes = False

    def image_prompt(self, text: str) -> list[int]:
        """Text ids of an image's prompt with both roles around it."""
        return self.encode_text(DRAWING_PROMPT.format(prompt=text))


class JanusFamily:
    """Opens checkpoints of Janus's class."""

    files = ("config.json", "tokenizer*.json", "preprocessor_config.json", *WEIGHT_FILES, "*-of-*.safetensors")

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
    ) -> JanusModel:
        """Opens a checkpoint; see Family.load."""
        tokenizer, text = FileTokenizer(folder, ROLES), config.get("text_config")
        try:
            found = {name: tensor.shape for name, tensor in read_tensors(folder).items()}
            num_codes, code_width = found["model.generation_embeddings.weight"]
            hidden, width = found["model.generation_head.proj_out.weight"]
            text_vocab_size = text["vocab_size"] if isinstance(text, Mapping) else 0
            shape = llama.transformer_config(text, "llama", {}, text_vocab_size + num_codes, "Janus")
            layout = make_layout(tokenizer, text_vocab_size, num_codes, (4, 4))
            with torch.device("meta"):
                embed = nn.Sequential(nn.Embedding(num_codes, code_width), *mlp(found, "model.generation_aligner"))
                parts = nn.ModuleDict()
                parts["transformer"] = JanusTransformer(
                    shape, text_vocab_size, embed, nn.Linear(width, hidden), num_codes
                )
                parts["aligner"] = mlp(found, "model.aligner")
                parts["tower"] = _tower(config.get("vision_config"))
            load_weights(parts, folder, _tensors, ignored=_IMAGE_TOKENIZER, dtype=dtype, device=device)
        except ValueError as error:
            raise InputError(str(error)) from error
        parts.eval()
        model = JanusModel(parts["transformer"], None, tokenizer, layout, 8, PROMPTS, SAMPLING)
        model.tower, model.aligner = parts["tower"], parts["aligner"]
        return model


FAMILY = JanusFamily()


def make_layout(tokenizer: FileTokenizer, text_vocab_size: int, num_codes: int, grid: tuple[int, int]) -> JanusLayout:
    """The vocabulary by its tokens' names, whose ids differ between sizes. Raises: InputError if one is missing."""
    ids = {name: tokenizer.id(token) for name, token in _TOKENS.items()}
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


def mlp(found: Mapping[str, torch.Size], prefix: str) -> nn.Sequential:
    """Linear layers with GELU between them, in the widths that the checkpoint has."""
    names = [f"{prefix}.fc1.weight"]
    while f"{prefix}.hidden_layers.{len(names) - 1}.weight" in found:
        names.append(f"{prefix}.hidden_layers.{len(names) - 1}.weight")
    layers = [nn.Linear(found[name][1], found[name][0]) for name in names]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.GELU())][:-1])


def _tower(config: Any) -> SiglipTower:
    """Raises: InputError if the configuration leaves a size out."""
    names = {"width": "hidden_size", "depth": "num_hidden_layers", "num_heads": "num_attention_heads"}
    names |= {"image_size": "image_size", "patch_size": "patch_size"}
    config = config if isinstance(config, Mapping) else {}
    sizes = {ours: config.get(name) for ours, name in names.items()}
    for ours, value in sizes.items():
        if type(value) is not int or value < 1:
            raise InputError(f"vision_config: {names[ours]} is {shown(value)}; restore config.json from its source")
    if config.get("use_qk_norm"):
        raise InputError("vision_config: use_qk_norm true is not supported; give a checkpoint without it")
    return SiglipTower(**sizes, mlp_size=int(sizes["width"] * config.get("mlp_ratio", 4.0)))


def _mlp_names(layers: nn.Sequential, prefix: str) -> dict[str, Tensor]:
    found = {}
    for number, layer in enumerate(part for part in layers if isinstance(part, nn.Linear)):
        name = f"{prefix}.fc1" if number == 0 else f"{prefix}.hidden_layers.{number - 1}"
        found |= {f"{name}.weight": layer.weight.detach(), f"{name}.bias": layer.bias.detach()}
    return found


def _tensors(parts: nn.ModuleDict) -> dict[str, Tensor]:
    """Every published tensor's name -> the place in the modules that it fills."""
    transformer = parts["transformer"]
    found = loading.published_tensors(WEIGHTS, transformer)
    found["model.generation_embeddings.weight"] = transformer.code_embed[0].weight.detach()
    found |= _mlp_names(transformer.code_embed[1:], "model.generation_aligner")
    for name, layer in (("proj_out", transformer.code_hidden), ("vision_head", transformer.code_out)):
        found |= {f"model.generation_head.{name}.{kind}": tensor for kind, tensor in own_tensors(layer).items()}
    found |= _mlp_names(parts["aligner"], "model.aligner")
    tower = loading.published_tensors(siglip.WEIGHTS, parts["tower"])
    found |= {f"model.vision_model.{name}": tensor for name, tensor in tower.items()}
    return found
