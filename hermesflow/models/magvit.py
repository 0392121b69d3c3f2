"""Image tokenizers in MAGVIT-v2's published layout: config.json and weights, which several families share."""

from __future__ import annotations

from pathlib import Path

import torch

from hermesflow.engine.image_tokenizers.magvit import VQTokenizer, VQTokenizerConfig
from hermesflow.engine.weights import WEIGHT_FILES, load_weights, own_tensors, save_tensors
from hermesflow.models.hub import find_folder
from hermesflow.models.loading import make_config
from hermesflow.runtime.files import InputError, read_json, reason_of, write_json

_CLASS = "MAGVITv2"
_FILES = ("config.json", *WEIGHT_FILES, "*-of-*.safetensors", "*-of-*.bin")


def load_vq_tokenizer(source: str, device: torch.device | str | None = None) -> VQTokenizer:
    """Opens an image tokenizer in MAGVIT-v2's published layout, in fp32.

    Args:
        source: a folder, or a hub id such as "showlab/magvitv2".
        device: where the weights go; None is the CPU.
    Raises: InputError if it cannot be had, or its files are damaged or do not fit.
    """
    folder = find_folder(source, _FILES, "image tokenizer", "showlab/magvitv2")
    path = folder / "config.json"
    values = read_json(path)
    if not isinstance(values, dict) or values.get("_class_name") != _CLASS:
        raise InputError(f"{path}: not the configuration of a {_CLASS}; give the folder of the image tokenizer")
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
    write_json(folder / "config.json", {"_class_name": _CLASS, **shape})
    save_tensors(own_tensors(tokenizer) | constants, folder / "pytorch_model.safetensors")
