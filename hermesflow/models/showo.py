"""Show-o (arXiv 2408.12528), and HermesFlow's checkpoints of its class: masked image codes, Phi as backbone.

    FOLDER/  config.json  pytorch_model.safetensors (or any of WEIGHT_FILES)
             llm/  configuration and text tokenizer of the language model      (else llm_model_path is fetched)
             magvitv2/  the image tokenizer, in its own published layout       (else VQ_TOKENIZER is fetched)
             clip/  the vision encoder, in the variant that sees through CLIP  (else VISION_ENCODER is fetched)

Prompts and sampling: inference_mmu.py of Show-o, inference_mmu_vqa.py and README of HermesFlow; 128 tokens
(max_seq_length in configs/) hold the text of a prompt with its start and its end.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hermesflow.engine.decoders.masked import ImageSamplingParams
from hermesflow.engine.image_tokenizers.magvit import VQTokenizer
from hermesflow.engine.token_layout import SPECIAL_TOKENS as FRAMES
from hermesflow.engine.token_layout import TokenLayout
from hermesflow.engine.transformer import Transformer, TransformerConfig
from hermesflow.engine.weights import WEIGHT_FILES, load_weights, own_tensors, read_tensors, save_tensors
from hermesflow.models import loading, magvit
from hermesflow.models.hub import find_folder
from hermesflow.models.model import Model, PromptFormat
from hermesflow.models.text_tokenizers import PretrainedTokenizer
from hermesflow.models.vision import CLIP_FILES, ClipEncoder, load_clip_encoder
from hermesflow.runtime.files import InputError, make_folder, read_json, shown, write_json

CLASS_NAME, LANGUAGE_MODEL = "Showo", "phi"
VQ_TOKENIZER, VISION_ENCODER = "showlab/magvitv2", "openai/clip-vit-large-patch14-336"
"""Hub ids of the image tokenizer, and of the encoder of the variant that sees through CLIP."""
PIXELS_PER_TOKEN = 16
SPECIAL_TOKENS = ("[PAD]", *(f"<|{name}|>" for name in FRAMES))
"""In the order in which they follow the text vocabulary."""
SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""What the variant with CLIP reads before the image's features."""
PROMPTS = PromptFormat(
    caption_question="Give a caption for this image.",
    question="USER: \n{question} ASSISTANT:",
    choices="Question:{question} Choice:{choices}",
    answer=" {answer}",
    max_prompt_tokens=126,
    max_caption_tokens=100,
    max_answer_tokens=100,
)
VISION_PROMPTS = replace(PROMPTS, question="USER: {question} ASSISTANT:")
SAMPLING = ImageSamplingParams(num_steps=50, guidance_scale=5.0, mask_temperature=1.0, mask_decay="showo")
TRANSFORMER = {
    "hidden_size": "@hidden_size",
    "num_layers": "@num_hidden_layers",
    "num_heads": "@num_attention_heads",
    "num_kv_heads": "@num_key_value_heads",
    "mlp_size": "@intermediate_size",
    "norm_eps": "@layer_norm_eps",
    "activation": "@hidden_act",
    "rotary_fraction": "@partial_rotary_factor",
    "rope_theta": "@rope_theta",
    "block": "parallel",
    "qk_norm": True,  # Show-o adds it to Phi, whatever qk_layernorm in Phi's configuration says
    "bias": True,
    "head_bias": True,
}
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu": "gelu"}
_LAYER = "showo.model.layers.*"
WEIGHTS = {
    "embed": ["showo.model.embed_tokens"],
    "blocks.*.attention_norm": [f"{_LAYER}.input_layernorm"],
    "blocks.*.attention.qkv": [f"{_LAYER}.self_attn.{name}_proj" for name in "qkv"],
    "blocks.*.attention.q_norm": [f"{_LAYER}.self_attn.q_layernorm"],
    "blocks.*.attention.k_norm": [f"{_LAYER}.self_attn.k_layernorm"],
    "blocks.*.attention.out": [f"{_LAYER}.self_attn.dense"],
    "blocks.*.mlp.up": [f"{_LAYER}.mlp.fc1"],
    "blocks.*.mlp.down": [f"{_LAYER}.mlp.fc2"],
    "norm": ["showo.model.final_layernorm"],
    "head": ["showo.lm_head"],
}
PROJECTOR = ("mm_projector.0.weight", "mm_projector.0.bias", "mm_projector.2.weight", "mm_projector.2.bias")
"""Published tensors of the variant that sees through CLIP, beside the weights."""
_OLD_BUFFERS = r"showo\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
"""Old checkpoints hold them besides, and nothing needs them."""

LLM_FOLDER, VQ_FOLDER, VISION_FOLDER = "llm", "magvitv2", "clip"
LLM_FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "tokenizer.model",
)  # fmt: skip
_WEIGHTS_FILE = "pytorch_model.safetensors"  # the name that Show-o's from_pretrained looks for first
_CONFIG_FIELDS = {
    "vocab_size": int, "llm_vocab_size": int, "codebook_size": int, "num_vq_tokens": int, "llm_model_path": str,
    "w_clip_vit": bool,
}  # fmt: skip


class ShowoModel(Model):
    """A model of Show-o's class; the image tokenizer is opened when it is first needed."""

    def __init__(
        self,
        config: Mapping[str, Any],
        transformer: Transformer,
        projector: nn.Module | None,
        text_tokenizer: PretrainedTokenizer,
        layout: TokenLayout,
        folder: Path,
        vq_tokenizer: str | None,
    ) -> None:
        """
        Args:
            config: the checkpoint's config.json.
            transformer, projector, text_tokenizer, layout: the parts; a projector where the model sees through CLIP.
            folder: the checkpoint's folder.
            vq_tokenizer: folder or hub id of the image tokenizer; None: beside the checkpoint, else the family's.
        """
        side = math.isqrt(layout.num_image_tokens)
        super().__init__(
            transformer,
            None,
            text_tokenizer,
            layout,
            side * PIXELS_PER_TOKEN,
            PROMPTS if projector is None else VISION_PROMPTS,
            SAMPLING,
        )
        self.config, self.projector, self.folder = dict(config), projector, folder
        self.llm_files = {
            name: (text_tokenizer.folder / name).read_bytes()
            for name in LLM_FILES
            if (text_tokenizer.folder / name).is_file()
        }
        self._vq_source = vq_tokenizer

    @cached_property
    def vq_tokenizer(self) -> VQTokenizer:
        """The image tokenizer in fp32, since codes are signs; convert it to trade some of them for speed.

        Raises: InputError if it is neither beside the checkpoint nor on the hub, or does not fit the checkpoint.
        """
        beside = self.folder / VQ_FOLDER
        source = self._vq_source or (str(beside) if beside.is_dir() else VQ_TOKENIZER)
        loaded = magvit.load_vq_tokenizer(source, self.engine.device)
        for name, value, expected in (
            ("codes", loaded.config.codebook_size, self.layout.codebook_size),
            ("pixels a token", loaded.config.downsampling, PIXELS_PER_TOKEN),
        ):
            if value != expected:
                raise InputError(f"{source}: has {value} {name}, the model {expected}; give the model's own tokenizer")
        return loaded

    @cached_property
    def vision_encoder(self) -> ClipEncoder:
        """What the variant of w_clip_vit sees through. Raises: InputError if it cannot be had or does not fit."""
        beside = self.folder / VISION_FOLDER
        source = str(beside) if beside.is_dir() else VISION_ENCODER
        return load_clip_encoder(find_folder(source, CLIP_FILES, "vision encoder"), self.projector)

    @property
    def views_codes(self) -> bool:
        """Whether it sees images as their codes, and not as features of a vision encoder."""
        return self.projector is None

    @property
    def is_saved_whole(self) -> bool:
        """CLIP stays where it was."""
        return self.views_codes

    def whole_prompt(self, text: str) -> list[int]:
        """See Model; a text that itself begins with the start of text does not get a second one."""
        ids = self.encode_text(text)
        return ids[1:] if ids[:1] == [self.layout.sot] else ids

    def view_images(self, images: Iterable[Image.Image]) -> Tensor:
        """What the model sees of images of any size: codes int64 [n, N], or features [n, F, D]."""
        return super().view_images(images) if self.views_codes else self.vision_encoder.encode(list(images))

    def view_pixels(self, images: np.ndarray) -> Tensor:
        """Likewise of images that fit, uint8 [n, image_size, image_size, 3]."""
        return super().view_pixels(images) if self.views_codes else self.vision_encoder.encode(list(images))

    @property
    def num_features(self) -> int:
        """F, in the variant that sees through CLIP."""
        return self.vision_encoder.num_features

    def write(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Writes the published layout with the language model's files and the image tokenizer, not the vision encoder.

        llm_model_path stays a hub id or an absolute folder where it was one, so that the original code finds the
        language model from anywhere; else it is "llm", which that code looks for in its working directory. load_model
        takes llm/.
        """
        make_folder(folder / LLM_FOLDER)
        path = self.config["llm_model_path"]
        found_elsewhere = _is_hub_id(path) or (Path(path).is_absolute() and Path(path).is_dir())
        write_json(folder / "config.json", self.config | ({} if found_elsewhere else {"llm_model_path": LLM_FOLDER}))
        parts = {"transformer": self.transformer} | ({"projector": self.projector} if self.projector else {})
        save_tensors(_tensors(parts), folder / _WEIGHTS_FILE, dtype)
        for name, data in self.llm_files.items():
            (folder / LLM_FOLDER / name).write_bytes(data)
        magvit.save_vq_tokenizer(self.vq_tokenizer, make_folder(folder / VQ_FOLDER))


class ShowoFamily:
    """Opens checkpoints of Show-o's class."""

    files = ("config.json", *WEIGHT_FILES, "*-of-*.safetensors", "*-of-*.bin")

    def claims(self, config: Any) -> bool:
        """By its class."""
        return isinstance(config, dict) and config.get("_class_name") == CLASS_NAME

    def load(
        self,
        folder: Path,
        config: Mapping[str, Any],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        vq_tokenizer: str | None = None,
    ) -> ShowoModel:
        """Opens a checkpoint; see Family.load. vq_tokenizer is load_model's."""
        _check_config(folder / "config.json", config)
        llm = find_language_model(folder, config["llm_model_path"], "microsoft/phi-1_5")
        try:
            shape = transformer_config(read_json(llm / "config.json"), config["vocab_size"])
        except InputError as error:
            raise InputError(f"{llm / 'config.json'}: {error}") from error
        text_tokenizer = PretrainedTokenizer(llm, SPECIAL_TOKENS)
        text_tokenizer.check(config["llm_vocab_size"])
        try:
            system_ids = text_tokenizer.encode(SYSTEM_PROMPT) if config["w_clip_vit"] else ()
            layout = make_layout(config, text_tokenizer.bos, text_tokenizer.eos, system_ids)
        except ValueError as error:
            raise InputError(f"{folder / 'config.json'}: {error}; restore it from its source") from error
        try:
            parts = nn.ModuleDict()
            with torch.device("meta"):
                parts["transformer"] = Transformer(shape)
                if config["w_clip_vit"]:
                    parts["projector"] = _projector(folder, shape.hidden_size)
            load_weights(parts, folder, _tensors, ignored=_OLD_BUFFERS, dtype=dtype, device=device)
        except ValueError as error:
            raise InputError(str(error)) from error
        parts.eval()
        projector = parts["projector"] if config["w_clip_vit"] else None
        return ShowoModel(config, parts["transformer"], projector, text_tokenizer, layout, folder, vq_tokenizer)


FAMILY = ShowoFamily()


def transformer_config(language_model: Any, vocab_size: int) -> TransformerConfig:
    """The backbone's shape from Phi's configuration; see loading.transformer_config."""
    return loading.transformer_config(language_model, LANGUAGE_MODEL, TRANSFORMER, ACTIVATIONS, vocab_size, CLASS_NAME)


def published_tensors(transformer: Transformer) -> dict[str, Tensor]:
    """Of a backbone: the name of each published tensor -> the parameter, or the rows of one, that it is."""
    return loading.published_tensors(WEIGHTS, transformer)


def make_layout(config: Mapping[str, Any], bos: int, eos: int, system_ids: Sequence[int] = ()) -> TokenLayout:
    """The joint vocabulary of a checkpoint; system_ids stand before an image's features in the variant that has them.

    Raises: ValueError if its sizes do not add up.
    """
    text, codes, total = config["llm_vocab_size"], config["codebook_size"], config["vocab_size"]
    special = len(SPECIAL_TOKENS)
    if total != text + special + codes + 1:
        raise ValueError(
            f"the vocabulary does not add up: llm_vocab_size {text} + {special} special tokens + codebook_size {codes} "
            f"+ 1 mask are {text + special + codes + 1}, vocab_size is {total}"
        )
    return TokenLayout(
        text_vocab_size=text,
        codebook_size=codes,
        num_image_tokens=config["num_vq_tokens"],
        sot=bos,
        eot=eos,
        system_ids=tuple(system_ids),
    )


def _tensors(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Every published tensor's name -> the place in the modules "transformer" and "projector" that it fills."""
    found = published_tensors(parts["transformer"])
    if "projector" in parts:
        found |= dict(zip(PROJECTOR, own_tensors(parts["projector"]).values(), strict=True))
    return found


def _projector(folder: Path, hidden_size: int) -> nn.Sequential:
    """Features of the vision encoder -> embeddings; the first weight on disk gives its widths."""
    first = read_tensors(folder).get(PROJECTOR[0])
    inner, width = first.shape if first is not None and first.dim() == 2 else (hidden_size, hidden_size)
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, hidden_size))


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    for name, kind in _CONFIG_FIELDS.items():
        value = config.get(name)
        if type(value) is not kind or (kind is int and value < 1):
            raise InputError(
                f"{path}: {name}: expected {'a number from 1' if kind is int else kind.__name__}, got {shown(value)}; "
                "restore it from its source"
            )
    if math.isqrt(config["num_vq_tokens"]) ** 2 != config["num_vq_tokens"]:
        raise InputError(f"{path}: num_vq_tokens: expected a square number, got {config['num_vq_tokens']}; restore it")


def find_language_model(folder: Path, path: str, example: str) -> Path:
    """Where the language model's configuration and tokenizer are: inside the checkpoint, in a folder, or on the hub.

    Args:
        folder: the checkpoint's.
        path: its llm_model_path.
        example: a hub id, for messages.
    Raises: InputError if there is no such folder and the hub does not give it either.
    """
    inside = [folder / part for part in (path, LLM_FOLDER) if not Path(part).is_absolute() and ".." not in part]
    found = next((place for place in inside if path and os.path.isfile(place / "config.json")), None)
    try:
        return found or find_folder(path, LLM_FILES, "language model (llm_model_path)", example)
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from error


def _is_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith(("/", ".", "~")) and not Path(path).is_dir()
