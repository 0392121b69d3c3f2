"""Checkpoints in a family's published layout: config.json with the family's class and weights under its names.

    FOLDER/  config.json  pytorch_model.safetensors (or any of WEIGHT_FILES)
             llm/  configuration and text tokenizer of the language model      (else llm_model_path is fetched)
             magvitv2/  the image tokenizer, in its own published layout       (else the family's hub id is fetched)
             clip/  the vision encoder, in the variant that sees through CLIP  (else the family's hub id is fetched)
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from hermesflow.engine.token_layout import TokenLayout
from hermesflow.engine.transformer import Transformer
from hermesflow.engine.vq_tokenizer import VQTokenizer, VQTokenizerConfig
from hermesflow.engine.weights import WEIGHT_FILES, load_weights, own_tensors, read_tensors, save_tensors

from .families import FAMILIES, Family, make_layout, published_tensors, transformer_config
from .files import InputError, atomic_folder, make_folder, read_json, reason_of, shown, write_json
from .hub import find_folder
from .models import Model, load_model, make_config
from .text_tokenizers import PretrainedTokenizer
from .vision import CLIP_FILES, ClipEncoder, load_clip_encoder

LLM_FOLDER, VQ_FOLDER, VISION_FOLDER = "llm", "magvitv2", "clip"
CHECKPOINT_FILES = ("config.json", *WEIGHT_FILES, "*-of-*.safetensors", "*-of-*.bin")
_LLM_FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "tokenizer.model",
)  # fmt: skip
_WEIGHTS = "pytorch_model.safetensors"  # the name that Show-o's from_pretrained looks for first
_CONFIG_FIELDS = {
    "vocab_size": int, "llm_vocab_size": int, "codebook_size": int, "num_vq_tokens": int, "llm_model_path": str,
    "w_clip_vit": bool,
}  # fmt: skip
_VQ_CLASS = "MAGVITv2"


class PublishedModel(Model):
    """A model of a published family; the image tokenizer is opened when it is first needed."""

    def __init__(
        self, family: Family, config: Mapping[str, Any], transformer: Transformer, projector: nn.Module | None,
        text_tokenizer: PretrainedTokenizer, layout: TokenLayout, folder: Path, vq_tokenizer: str | None,
    ) -> None:  # fmt: skip
        """
        Args:
            family, config: the description, and the checkpoint's config.json.
            transformer, projector, text_tokenizer, layout: the parts; a projector where the model sees through CLIP.
            folder: the checkpoint's folder.
            vq_tokenizer: folder or hub id of the image tokenizer; None: beside the checkpoint, else the family's.
        """
        side = math.isqrt(layout.num_image_tokens)
        super().__init__(
            transformer, None, text_tokenizer, layout, side * family.pixels_per_token,
            family.prompts if projector is None else family.vision_prompts, family.sampling,
        )  # fmt: skip
        self.family, self.config, self.projector, self.folder = family, dict(config), projector, folder
        self.llm_files = {
            name: (text_tokenizer.folder / name).read_bytes()
            for name in _LLM_FILES
            if (text_tokenizer.folder / name).is_file()
        }
        self._vq_source = vq_tokenizer

    @cached_property
    def vq_tokenizer(self) -> VQTokenizer:
        """The image tokenizer in fp32, since codes are signs; convert it to trade some of them for speed.

        Raises: InputError if it is neither beside the checkpoint nor on the hub, or does not fit the checkpoint.
        """
        beside = self.folder / VQ_FOLDER
        source = self._vq_source or (str(beside) if beside.is_dir() else self.family.vq_tokenizer)
        loaded = load_vq_tokenizer(source, self.engine.device)
        for name, value, expected in (
            ("codes", loaded.config.codebook_size, self.layout.codebook_size),
            ("pixels a token", loaded.config.downsampling, self.family.pixels_per_token),
        ):
            if value != expected:
                raise InputError(f"{source}: has {value} {name}, the model {expected}; give the model's own tokenizer")
        return loaded

    @cached_property
    def vision_encoder(self) -> ClipEncoder:
        """What the variant of w_clip_vit sees through. Raises: InputError if it cannot be had or does not fit."""
        beside = self.folder / VISION_FOLDER
        source = str(beside) if beside.is_dir() else self.family.vision_encoder
        return load_clip_encoder(find_folder(source, CLIP_FILES, "vision encoder"), self.projector)

    @property
    def views_codes(self) -> bool:
        """Whether it sees images as their codes, and not as features of a vision encoder."""
        return self.projector is None

    def view_images(self, images: Iterable[Image.Image]) -> Tensor:
        """What the model sees of images of any size: codes int64 [n, N], or features [n, F, D]."""
        return super().view_images(images) if self.views_codes else self.vision_encoder.encode(list(images))

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
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
        save_tensors(_tensors(self.family, parts), folder / _WEIGHTS, dtype)
        for name, data in self.llm_files.items():
            (folder / LLM_FOLDER / name).write_bytes(data)
        save_vq_tokenizer(self.vq_tokenizer, make_folder(folder / VQ_FOLDER))


def load_published(
    folder: Path, config: Mapping[str, Any], device: torch.device | str | None, dtype: torch.dtype | None,
    vq_tokenizer: str | None,
) -> PublishedModel:  # fmt: skip
    """Opens a checkpoint whose config.json names a class of FAMILIES.

    Args:
        folder: the checkpoint's folder.
        config: its config.json.
        device, dtype, vq_tokenizer: see load_model.
    Raises: InputError on an unknown class, a wrong configuration, weights that do not fit, or files that cannot be had.
    """
    family = FAMILIES.get(str(config.get("_class_name")))
    if family is None:
        raise InputError(
            f"{folder / 'config.json'}: unknown _class_name {shown(config.get('_class_name'))}; known: "
            f"{', '.join(FAMILIES)}; restore it from its source"
        )
    _check_config(folder / "config.json", config)
    llm = _llm_folder(folder, config["llm_model_path"])
    language_model = read_json(llm / "config.json")
    try:
        shape = transformer_config(family, language_model, config["vocab_size"])
    except InputError as error:
        raise InputError(f"{llm / 'config.json'}: {error}") from error
    text_tokenizer = PretrainedTokenizer(llm, family.special_tokens)
    text_tokenizer.check(config["llm_vocab_size"])
    try:
        system_ids = text_tokenizer.encode(family.system_prompt) if config["w_clip_vit"] else ()
        layout = make_layout(family, config, text_tokenizer.bos, text_tokenizer.eos, system_ids)
    except ValueError as error:
        raise InputError(f"{folder / 'config.json'}: {error}; restore it from its source") from error
    try:
        parts = nn.ModuleDict()
        with torch.device("meta"):
            parts["transformer"] = Transformer(shape)
            if config["w_clip_vit"]:
                parts["projector"] = _projector(family, folder, shape.hidden_size)
        load_weights(
            parts, folder, functools.partial(_tensors, family), ignored=family.old_buffers, dtype=dtype, device=device
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    parts.eval()
    projector = parts["projector"] if config["w_clip_vit"] else None
    return PublishedModel(
        family, config, parts["transformer"], projector, text_tokenizer, layout, folder, vq_tokenizer
    )


def export_model(source: str, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes a model in its family's published layout, all at once.

    Args:
        source: a run's folder, whose last trained round is taken, or what load_model opens.
        folder: where to; a new or an empty one.
        dtype: of the weights; None keeps theirs.
    Raises: InputError if there is no such model, its family has no published layout, or the folder holds anything.
    """
    rounds = sorted(Path(source).glob("round-*/model"), key=lambda path: int(path.parent.name.removeprefix("round-")))
    if not rounds and (Path(source) / "config.toml").is_file():
        raise InputError(f"{source}: no round of this run is trained yet; run it first, or give a model")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: there is something already; choose another folder, or remove it")
    model = load_model(str(rounds[-1]) if rounds else source)
    if not isinstance(model, PublishedModel):
        raise InputError(f"{source}: its family has no published layout; its folder is what load_model opens")
    with atomic_folder(folder) as temporary:
        model.save(temporary, dtype)


def load_vq_tokenizer(source: str, device: torch.device | str | None = None) -> VQTokenizer:
    """Opens an image tokenizer in MAGVIT-v2's published layout, in fp32.

    Args:
        source: a folder, or a hub id such as "showlab/magvitv2".
        device: where the weights go; None is the CPU.
    Raises: InputError if it cannot be had, or its files are damaged or do not fit.
    """
    folder = find_folder(source, CHECKPOINT_FILES, "image tokenizer", "showlab/magvitv2")
    path = folder / "config.json"
    values = read_json(path)
    if not isinstance(values, dict) or values.get("_class_name") != _VQ_CLASS:
        raise InputError(f"{path}: not the configuration of a {_VQ_CLASS}; give the folder of the image tokenizer")
    shape = {name: value for name, value in values.items() if not name.startswith("_")}
    try:
        config = make_config(VQTokenizerConfig, shape)
        with torch.device("meta"):
            tokenizer = VQTokenizer(config)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise InputError(f"{path}: not the shape of an image tokenizer ({reason_of(error)}); restore it") from error
    try:
        load_weights(tokenizer, folder, ignored=r"quantize\..*", dtype=torch.float32, device=device)
    except ValueError as error:
        raise InputError(str(error)) from error
    return tokenizer.eval()


def save_vq_tokenizer(tokenizer: VQTokenizer, folder: Path) -> None:
    """Writes an image tokenizer in MAGVIT-v2's published layout, its constant code book included."""
    bits = torch.arange(tokenizer.config.code_bits - 1, -1, -1)
    signs = (torch.arange(tokenizer.config.codebook_size)[:, None] >> bits) % 2 * 2 - 1
    constants = {"quantize.embedding": signs.float(), "quantize.power_vals": 2**bits}
    published = VQTokenizerConfig()
    shape = {} if tokenizer.config == published else tokenizer.config.to_dict()
    write_json(folder / "config.json", {"_class_name": _VQ_CLASS, **shape})
    save_tensors(own_tensors(tokenizer) | constants, folder / _WEIGHTS)


def _tensors(family: Family, parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Every published tensor's name -> the place in the modules "transformer" and "projector" that it fills."""
    found = published_tensors(family, parts["transformer"])
    if "projector" in parts:
        found |= dict(zip(family.projector, own_tensors(parts["projector"]).values(), strict=True))
    return found


def _projector(family: Family, folder: Path, hidden_size: int) -> nn.Sequential:
    """Features of the vision encoder -> embeddings; the first weight on disk gives its widths."""
    first = read_tensors(folder).get(family.projector[0])
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


def _llm_folder(folder: Path, path: str) -> Path:
    """Where the language model's configuration and tokenizer are: inside the checkpoint, in a folder, or on the hub."""
    inside = [folder / part for part in (path, LLM_FOLDER) if not Path(part).is_absolute() and ".." not in part]
    found = next((place for place in inside if path and os.path.isfile(place / "config.json")), None)
    try:
        return found or find_folder(path, _LLM_FILES, "language model (llm_model_path)", "microsoft/phi-1_5")
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from error


def _is_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith(("/", ".", "~")) and not Path(path).is_dir()
