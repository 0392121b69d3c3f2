"""Chameleon and Anole (GAIR/Anole-7b, arXiv 2407.06135) as transformers publishes them: one joint vocabulary, images
code by code.

    folder/  config.json, model.safetensors (or shards), tokenizer.json
             vqvae/  the image tokenizer with its decoder             (else VQ_TOKENIZER is fetched)

facebook/chameleon-7b answers alone: its head's rows of image codes were left untrained. Anole trained those rows, from
new values and with text masked out, so that codes are scored among themselves.
Prompts, guidance and filters: text2image.py of Anole, and Meta's inference code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hermesflow.engine.decoders.autoregressive import CodeSamplingParams
from hermesflow.engine.image_tokenizers.vqgan import VQGAN
from hermesflow.engine.token_layout import Ids, Layout
from hermesflow.engine.transformer import Transformer
from hermesflow.engine.weights import save_tensors
from hermesflow.models import llama, loading, vqgan
from hermesflow.models.causal import FETCHED, CausalModel, load_parts, on_meta
from hermesflow.models.hub import find_folder
from hermesflow.models.images import fit_image
from hermesflow.models.model import PromptFormat
from hermesflow.models.text_tokenizers import FileTokenizer
from hermesflow.runtime.files import InputError, make_folder, read_json, shown, write_json

MODEL_TYPE = "chameleon"
VQ_FOLDER, VQ_TOKENIZER = "vqvae", "leloy/Anole-7b-v0.1-vqvae-hf"
"""Folder beside the weights, and hub id, of the image tokenizer with its decoder."""
WEIGHTS = llama.weight_table("model.", "lm_head")
PROMPTS = PromptFormat(
    caption_question="Give a caption for this image.",
    max_prompt_tokens=512,
    max_caption_tokens=100,
    max_answer_tokens=100,
)
SAMPLING = CodeSamplingParams(guidance_scale=2.0, temperature=0.7, top_p=0.9)
_TOKENS = {"bos": "<s>", "eot": "</s>", "boi": "<racm3:break>", "eoi": "<eoss>", "turn": "<reserved08706>"}
_CODE_NAME = re.compile(r"IMGIMG([A-J]+)Z")
_IMAGE_TOKENIZER = "model.vqmodel."
_DEFAULTS = {"rms_norm_eps": 1e-5, "vocab_size": 65_536}


@dataclass(frozen=True, kw_only=True)
class ChameleonLayout(Layout):
    """Codes lie in the middle of the vocabulary, in an order of their own; turn ends what a user says."""

    vocab_size: int
    code_ids: Ids
    image_grid: tuple[int, int]
    bos: int
    eot: int
    boi: int
    eoi: int
    turn: int
    image_mode = prefix_mode = "causal"
    codes_apart = True

    @property
    def codebook_size(self) -> int:
        """As many as there are ids."""
        return len(self.code_ids)

    @property
    def num_image_tokens(self) -> int:
        """Of the grid."""
        return self.image_grid[0] * self.image_grid[1]

    @cached_property
    def text_ids(self) -> Ids:
        """All but the image codes'."""
        return Ids([token for token in range(self.vocab_size) if token not in self.code_ids])

    @property
    def before_image(self) -> tuple[int, ...]:
        """boi."""
        return (self.boi,)

    @property
    def after_image(self) -> tuple[int, ...]:
        """eoi."""
        return (self.eoi,)

    def text_prompt(self, text_ids: Sequence[int]) -> list[int]:
        """Condition of an image: [bos, text, turn]; without text bos alone."""
        return [self.bos, *text_ids, self.turn] if text_ids else [self.bos]

    def image_prefix(self, codes: Sequence[int]) -> list[int]:
        """An image to be understood: [bos, boi, codes, eoi]."""
        return [self.bos, *self.image(codes)]

    def question(self, text_ids: Sequence[int]) -> list[int]:
        """What is asked of an image: [text, turn]."""
        return [*text_ids, self.turn]


class ChameleonModel(CausalModel):
    """A model of Chameleon's class."""

    def fit(self, image: Image.Image) -> np.ndarray:
        """As Meta's code does: the shorter side by Lanczos, the center of the longer one."""
        return fit_image(image, self.image_size, Image.Resampling.LANCZOS)

    def tokenizer_tensors(self) -> dict[str, Tensor]:
        """All but the decoder."""
        tensors = vqgan.tokenizer_tensors(self.vq_tokenizer, vqgan.CHAMELEON, _IMAGE_TOKENIZER)
        decoder = f"{_IMAGE_TOKENIZER}decoder."
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(decoder)}

    def write(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Writes the published layout, with the whole image tokenizer in vqvae/."""
        super().write(folder, dtype)
        whole = vqgan.tokenizer_tensors(self.vq_tokenizer, vqgan.CHAMELEON)
        beside = make_folder(folder / VQ_FOLDER)
        save_tensors(whole, beside / "model.safetensors")
        write_json(beside / "config.json", vqgan.chameleon_dict(self.vq_tokenizer.config, self.image_size))


class ChameleonFamily:
    """Opens checkpoints of Chameleon's class."""

    files = (*FETCHED, f"{VQ_FOLDER}/*")

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
    ) -> ChameleonModel:
        """Opens a checkpoint; see Family.load. vq_tokenizer is load_model's."""
        path, config = folder / "config.json", _DEFAULTS | dict(config)
        tokenizer, codes = FileTokenizer(folder), config.get("vq_config") or {}
        size, of_codes = codes.get("resolution", 512), vqgan.chameleon_config(codes)
        side = size // of_codes.downsampling
        more = {"qk_norm_per_head": True, "block": "post" if config.get("swin_norm") else "sequential"}
        shape = llama.transformer_config(config, MODEL_TYPE, {}, config["vocab_size"], "Chameleon", **more)
        layout = make_layout(tokenizer, config["vocab_size"], (side, side))
        parts = on_meta(lambda: {"transformer": Transformer(shape)}, path)
        load_parts(parts, folder, _tensors, re.escape(_IMAGE_TOKENIZER) + ".*", dtype, device)

        def open_tokenizer(device: torch.device) -> VQGAN:
            beside = folder / VQ_FOLDER
            source = find_folder(
                vq_tokenizer or (str(beside) if beside.is_dir() else VQ_TOKENIZER), FETCHED, "image tokenizer"
            )
            whole = vqgan.chameleon_config(read_json(source / "config.json"))
            return vqgan.load_image_tokenizer(source, whole, vqgan.CHAMELEON, device=device)

        settings = (tokenizer, layout, size, PROMPTS, SAMPLING, open_tokenizer)
        return ChameleonModel(folder, parts, _tensors, *settings)


FAMILY = ChameleonFamily()


def make_layout(tokenizer: FileTokenizer, vocab_size: int, grid: tuple[int, int]) -> ChameleonLayout:
    """The vocabulary by its tokens' names: an image code's name holds its number, A for 0 and so on.

    Raises: InputError if a token is missing, or the codes are not 0, 1, 2, ...
    """
    found = ((_CODE_NAME.fullmatch(name), token) for name, token in tokenizer.vocabulary.items())
    codes = {
        int(match[1].translate(str.maketrans("ABCDEFGHIJ", "0123456789"))): token for match, token in found if match
    }
    if not codes or sorted(codes) != list(range(len(codes))):
        raise InputError(f"{tokenizer.folder}: the tokenizer's image codes (IMGIMG..Z) have gaps; restore it")
    highest = max(tokenizer.vocabulary.values())
    if type(vocab_size) is not int or highest >= vocab_size:
        raise InputError(
            f"{tokenizer.folder}: the tokenizer has ids up to {highest}, config.json's vocab_size is "
            f"{shown(vocab_size)}; give the tokenizer that belongs to the checkpoint"
        )
    ids = {name: tokenizer.id(token) for name, token in _TOKENS.items()}
    return ChameleonLayout(
        vocab_size=vocab_size, code_ids=Ids([codes[code] for code in range(len(codes))]), image_grid=grid, **ids
    )


def _tensors(parts: nn.ModuleDict) -> dict[str, Tensor]:
    return loading.published_tensors(WEIGHTS, parts["transformer"])
