"""Chameleon (Meta, arXiv 2405.09818) and Anole (GAIR, arXiv 2407.06135): one joint vocabulary, images code by code.

    as transformers publishes them:
    folder/  config.json, model.safetensors (or shards), tokenizer.json
             vqvae/      the image tokenizer with its decoder         (else VQ_TOKENIZER is fetched)

    as Meta and GAIR do:
    folder/  models/7b/  params.json, consolidate_params.json, consolidated.pth
             tokenizer/  text_tokenizer.json, vqgan.yaml, vqgan.ckpt

facebook/chameleon-7b answers alone: its head's rows of image codes were left untrained. Anole trained those rows, from
new values and with text masked out, so that codes are scored among themselves.
Prompts, guidance and filters: text2image.py of Anole, and Meta's inference code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hermesflow.engine.decoders.autoregressive import CodeSamplingParams
from hermesflow.engine.image_tokenizers.vqgan import VQGAN
from hermesflow.engine.token_layout import Ids
from hermesflow.engine.transformer import Transformer, TransformerConfig
from hermesflow.engine.weights import read_tensors, save_tensors
from hermesflow.models import llama, loading, vqgan
from hermesflow.models.causal import CausalLayout, CausalModel
from hermesflow.models.checkpoint import FETCHED, load_parts, on_meta
from hermesflow.models.hub import find_folder
from hermesflow.models.images import fit_image
from hermesflow.models.model import PromptFormat
from hermesflow.models.text_tokenizers import FileTokenizer
from hermesflow.runtime.files import InputError, make_folder, read_bytes, read_json, shown, write_json

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
META_TABLE = {
    "embed": ["tok_embeddings"],
    "blocks.*.attention_norm": ["layers.*.attention_norm"],
    "blocks.*.attention.qkv": [f"layers.*.attention.w{name}" for name in "qkv"],
    "blocks.*.attention.q_norm": ["layers.*.attention.q_normalization"],
    "blocks.*.attention.k_norm": ["layers.*.attention.k_normalization"],
    "blocks.*.attention.out": ["layers.*.attention.wo"],
    "blocks.*.mlp_norm": ["layers.*.ffn_norm"],
    "blocks.*.mlp.up": ["layers.*.feed_forward.w1", "layers.*.feed_forward.w3"],
    "blocks.*.mlp.down": ["layers.*.feed_forward.w2"],
    "norm": ["norm"],
    "head": ["output"],
}
"""Our modules -> those of Meta's; rows of a head, and of its norms, are in pairs there, in halves here."""
META = Path("models/7b")
META_CONFIGS = tuple(str(META / name) for name in ("params.json", "consolidate_params.json"))
META_WEIGHTS = str(META / "consolidated.pth")
META_TOKENIZER, META_VQ_CONFIG, META_VQ_WEIGHTS = (
    f"tokenizer/{name}" for name in ("text_tokenizer.json", "vqgan.yaml", "vqgan.ckpt")
)
_TOKENS = {"bos": "<s>", "eot": "</s>", "boi": "<racm3:break>", "eoi": "<eoss>", "turn": "<reserved08706>"}
_CODE_NAME = re.compile(r"IMGIMG([A-J]+)Z")
_IMAGE_TOKENIZER = "model.vqmodel."
_DEFAULTS = {"rms_norm_eps": 1e-5, "vocab_size": 65_536}


@dataclass(frozen=True, kw_only=True)
class ChameleonLayout(CausalLayout):
    """Codes lie in the middle of the vocabulary, in an order of their own; turn ends what a user says."""

    vocab_size: int
    code_ids: Ids
    image_grid: tuple[int, int]
    bos: int
    eot: int
    boi: int
    eoi: int
    turn: int
    codes_apart = True

    @property
    def codebook_size(self) -> int:
        """As many as there are ids."""
        return len(self.code_ids)

    @cached_property
    def text_ids(self) -> Ids:
        """All but the image codes'."""
        return Ids([token for token in range(self.vocab_size) if token not in self.code_ids])

    def text_prompt(self, text_ids: Sequence[int]) -> list[int]:
        """Condition of an image: [bos, text, turn]; without text bos alone."""
        return [self.bos, *text_ids, self.turn] if text_ids else [self.bos]

    def image_prefix(self, codes: Sequence[int]) -> list[int]:
        """An image to be understood: [bos, boi, codes, eoi]."""
        return [self.bos, *self.image(codes)]

    def question(self, text_ids: Sequence[int]) -> list[int]:
        """A question about an image: [text, turn]."""
        return [*text_ids, self.turn]


class ChameleonModel(CausalModel):
    """A model of Chameleon's class."""

    def fit(self, image: Image.Image) -> np.ndarray:
        """As Meta's code does: the shorter side by Lanczos, the center of the longer one."""
        return fit_image(image, self.image_size, Image.Resampling.LANCZOS, floor)

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


class MetaChameleonModel(ChameleonModel):
    """The same, from Meta's layout."""

    kept = (*META_CONFIGS, META_TOKENIZER, META_VQ_CONFIG)
    norm_shapes: Mapping[str, torch.Size]
    """Of the norms of queries and keys in the file: a row for all heads, as published, or for some."""

    def write(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Writes Meta's layout. Heads that share a norm's row must agree in it, as they do until it is trained; else
        each gets a row, which Meta's own code does not read."""
        self.write_kept(folder)
        make_folder(folder / META)
        tensors = _to_pairs(self.published_tensors(), self.norm_shapes, self.transformer.config.head_dim)
        save_tensors(tensors, folder / META_WEIGHTS, dtype)
        save_tensors(vqgan.tokenizer_tensors(self.vq_tokenizer, vqgan.CHAMELEON), folder / META_VQ_WEIGHTS)


class ChameleonFamily:
    """Opens checkpoints of Chameleon's class."""

    markers = ("config.json", META_CONFIGS[0])
    files = (*FETCHED, f"{VQ_FOLDER}/*", *META_CONFIGS, META_WEIGHTS, META_TOKENIZER, META_VQ_CONFIG, META_VQ_WEIGHTS)

    def claims(self, config: Any) -> bool:
        """By config.json's model_type, or by the model that params.json describes."""
        if not isinstance(config, dict):
            return False
        model = config.get("model")
        return config.get("model_type") == MODEL_TYPE or (isinstance(model, dict) and "n_heads" in model)

    def load(
        self,
        folder: Path,
        config: Mapping[str, Any],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        vq_tokenizer: str | None = None,
    ) -> ChameleonModel:
        """Opens a checkpoint; see Family.load. vq_tokenizer is load_model's."""
        if isinstance(config.get("model"), Mapping):
            return _load_meta(folder, config, device, dtype, vq_tokenizer)
        path, config = folder / "config.json", _DEFAULTS | dict(config)
        tokenizer, codes = FileTokenizer(folder), config.get("vq_config") or {}
        with loading.errors_of(path):
            of_codes = vqgan.chameleon_config(codes)
        size = codes.get("resolution", 512)
        side = size // of_codes.downsampling
        more = {"qk_norm_per_head": True, "block": _block(config, path)}
        with loading.errors_of(path):
            shape = llama.transformer_config(config, MODEL_TYPE, {}, config["vocab_size"], "Chameleon", **more)
        layout = make_layout(tokenizer, config["vocab_size"], (side, side))
        parts = on_meta(lambda: {"transformer": Transformer(shape)}, path)
        load_parts(parts, folder, _tensors, re.escape(_IMAGE_TOKENIZER) + ".*", dtype, device)

        def open_tokenizer(device: torch.device) -> VQGAN:
            beside = folder / VQ_FOLDER
            return _open_tokenizer(vq_tokenizer or (str(beside) if beside.is_dir() else VQ_TOKENIZER), device)

        settings = (tokenizer, layout, size, PROMPTS, SAMPLING, open_tokenizer)
        return ChameleonModel(folder, parts, _tensors, *settings)


FAMILY = ChameleonFamily()


def _load_meta(
    folder: Path,
    params: Mapping[str, Any],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    vq_tokenizer: str | None,
) -> MetaChameleonModel:
    """Opens a checkpoint in Meta's layout, by its params.json."""
    tokenizer = FileTokenizer(folder / "tokenizer", name=Path(META_TOKENIZER).name)
    weights, code_weights = folder / META_WEIGHTS, folder / META_VQ_WEIGHTS
    shapes, code_shapes = _shapes(weights), _shapes(code_weights)
    shape = _meta_shape(params, shapes, folder)
    with loading.errors_of(code_weights):
        of_codes = vqgan.config_of_shapes(code_shapes)
    size = _resolution(folder / META_VQ_CONFIG)
    side = size // of_codes.downsampling
    layout = make_layout(tokenizer, shape.vocab_size, (side, side))
    parts = on_meta(lambda: {"transformer": Transformer(shape)}, folder / META_CONFIGS[0])

    def given(parts: nn.ModuleDict) -> dict[str, Tensor]:
        """The first rows of each norm, as many as the file has."""
        found = _meta_tensors(parts)
        for name in filter(_is_norm, found):
            rows, of_file = len(found[name]), shapes.get(name, ())
            if len(of_file) == 1:
                found[name] = found[name][0]
            elif of_file and 0 < of_file[0] < rows and rows % of_file[0] == 0:
                found[name] = found[name][: of_file[0]]
        return found

    load_parts(parts, weights, given, r"rope\.freqs", dtype, device)
    _to_halves(given(parts), _meta_tensors(parts), shape.head_dim)

    def open_tokenizer(device: torch.device) -> VQGAN:
        if vq_tokenizer is not None:
            return _open_tokenizer(vq_tokenizer, device)
        return vqgan.load_image_tokenizer(code_weights, of_codes, vqgan.CHAMELEON, device=device)

    settings = (tokenizer, layout, size, PROMPTS, SAMPLING, open_tokenizer)
    model = MetaChameleonModel(folder, parts, _meta_tensors, *settings)
    model.norm_shapes = {name: shapes[name] for name in filter(_is_norm, _meta_tensors(parts))}
    return model


def _shapes(path: Path) -> dict[str, torch.Size]:
    try:
        return {name: tensor.shape for name, tensor in read_tensors(path).items()}
    except ValueError as error:
        raise InputError(str(error)) from error


def _meta_shape(params: Mapping[str, Any], shapes: Mapping[str, torch.Size], folder: Path) -> TransformerConfig:
    """Of ModelArgs in Meta's chameleon/inference/transformer.py, with the widths that the weights have."""
    more = read_json(folder / META_CONFIGS[1]) if (folder / META_CONFIGS[1]).is_file() else {}
    if not isinstance(more, Mapping):
        raise InputError(f"{folder / META_CONFIGS[1]}: expected an object, got {shown(more)}; restore it")
    params = {**params, **params["model"], **more}
    if params.get("qk_normalization") is False:
        raise InputError(f"{folder / META_CONFIGS[0]}: qk_normalization false is not supported; give a model with it")
    vocab_size, mlp_size = (
        (*shapes.get(f"{name}.weight", ()), 0)[0] for name in ("tok_embeddings", "layers.0.feed_forward.w1")
    )
    given = {
        "model_type": MODEL_TYPE,
        "hidden_size": params.get("dim"),
        "num_hidden_layers": params.get("n_layers"),
        "num_attention_heads": params.get("n_heads"),
        "num_key_value_heads": params.get("n_kv_heads"),
        "intermediate_size": mlp_size,
        "rms_norm_eps": params.get("norm_eps", 1e-5),
        "rope_theta": params.get("rope_theta", 10_000.0),
    }
    block = _block(params, folder / "models/7b/params.json")
    more = {"qk_norm_per_head": True, "block": block}
    with loading.errors_of(folder / META_CONFIGS[0]):
        return llama.transformer_config(given, MODEL_TYPE, {}, vocab_size, "Chameleon", **more)


def _block(given: Mapping[str, Any], path: Path) -> str:
    """Where norms stand."""
    after = given.get("swin_norm", False)
    if after not in (True, False, None):
        raise InputError(f"{path}: swin_norm: expected true or false, got {shown(after)}; restore it from its source")
    return "post" if after else "sequential"


def _resolution(path: Path) -> int:
    """Side of an image in pixels, which vqgan.yaml alone says."""
    text = read_bytes(path).decode("utf-8", "replace")
    found = re.search(r"^\s*resolution:\s*(\d{1,5})\s*$", text, re.MULTILINE)
    if not found:
        raise InputError(f"{path}: says no resolution; restore it from its source")
    return int(found[1])


def _meta_tensors(parts: nn.ModuleDict) -> dict[str, Tensor]:
    return loading.published_tensors(META_TABLE, parts["transformer"])


def _is_norm(name: str) -> bool:
    return "_normalization." in name


def _is_rotated(name: str) -> bool:
    return name.endswith((".wq.weight", ".wk.weight"))


def _reordered(rows: Tensor, by: tuple[int, int]) -> Tensor:
    """Rows of heads of d: by (d / 2, 2) from pairs to halves, by (2, d / 2) back."""
    return rows.unflatten(0, (-1, *by)).transpose(1, 2).flatten(0, 2)


def _to_halves(given: Mapping[str, Tensor], whole: Mapping[str, Tensor], head_dim: int) -> None:
    """In place: rows that are rotated together, in pairs, become halves, and a norm's rows are repeated for heads."""
    by = (head_dim // 2, 2)
    for name, target in whole.items():
        if _is_rotated(name):
            target.copy_(_reordered(target, by))
        elif _is_norm(name):
            rows = _reordered(given[name].flatten(), by).view(-1, head_dim)
            target.copy_(rows.repeat_interleave(len(target) // len(rows), 0))


def _to_pairs(tensors: Mapping[str, Tensor], norm_shapes: Mapping[str, torch.Size], head_dim: int) -> dict[str, Tensor]:
    """The way back. Heads that share a norm's row and no longer agree get a row each."""
    by, found = (2, head_dim // 2), dict(tensors)
    for name, tensor in tensors.items():
        if _is_rotated(name):
            found[name] = _reordered(tensor, by)
        elif _is_norm(name):
            rows = _reordered(tensor.flatten(), by).view(-1, head_dim)
            shared = rows.unflatten(0, (norm_shapes[name].numel() // head_dim, -1))
            is_shared = torch.equal(shared, shared[:, :1].expand_as(shared))
            found[name] = shared[:, 0].reshape(norm_shapes[name]) if is_shared else rows
    return found


def _open_tokenizer(name: str, device: torch.device) -> VQGAN:
    """An image tokenizer as transformers publishes it, a folder or a hub id."""
    source = find_folder(name, FETCHED, "image tokenizer")
    with loading.errors_of(source / "config.json"):
        whole = vqgan.chameleon_config(read_json(source / "config.json"))
    return vqgan.load_image_tokenizer(source, whole, vqgan.CHAMELEON, device=device)


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
