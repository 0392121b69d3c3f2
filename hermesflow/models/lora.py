"""Low-rank adapters (LoRA) around a transformer's layers: trained through peft, loaded with or without it."""

from __future__ import annotations

import importlib.util
import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from hermesflow.config import TrainConfig
from hermesflow.engine.transformer import Linear, Transformer
from hermesflow.engine.weights import WEIGHT_DTYPES, read_tensors
from hermesflow.runtime.distributed import is_main
from hermesflow.runtime.files import InputError, StrPath, atomic_folder, read_json, shown

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_VARIANTS = (
    "use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save",
    "target_parameters", "trainable_token_indices", "bias",
)  # fmt: skip
"""Settings of peft that give its files another meaning."""


class Adapters:
    """The adapters that stand around a transformer's layers while it is trained."""

    def __init__(self, transformer: Transformer, config: TrainConfig, seed: int) -> None:
        """Puts new ones, which change nothing yet, around the layers; only they are trained.

        Args:
            transformer: changed in place.
            config: lora_rank, lora_alpha and lora_targets.
            seed: their initial weights are a pure function of it.
        Raises: InputError if peft is not installed, or a target is no layer.
        """
        if importlib.util.find_spec("peft") is None:
            raise InputError("train.lora_rank: peft is not installed; run: pip install peft, or set it to 0")
        from peft import LoraConfig, get_peft_model

        targets = sorted({name.rpartition(".")[2] for name in _layers(transformer)})
        for target in config.lora_targets or ("",):
            if target not in targets:
                raise InputError(f"train.lora_targets: no layer {shown(target)}; there are {', '.join(targets)}")
        self._trained = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
        lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=list(config.lora_targets))
        with torch.random.fork_rng(devices=[]):  # peft draws on the CPU
            torch.default_generator.manual_seed(seed)
            self._model = get_peft_model(transformer, lora)

    def off(self) -> AbstractContextManager:
        """The transformer without them, for a block."""
        return self._model.disable_adapter()

    def save(self, folder: Path) -> None:
        """Writes adapter_model.safetensors and adapter_config.json, as peft and load_adapter read them.

        The first process writes; where weights are sharded all must call it. Raises: InputError if it cannot write.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        weights = get_model_state_dict(self._model, options=options)
        if is_main():
            with atomic_folder(folder) as temporary:
                self._model.save_pretrained(temporary, state_dict=weights)

    def merge(self) -> None:
        """Adds them to the weights; the transformer is a plain one again, of which what was trained before is."""
        transformer = self._model.merge_and_unload()
        for name, parameter in transformer.named_parameters():
            parameter.requires_grad_(name in self._trained)


def load_adapter(transformer: Transformer, folder: StrPath) -> None:
    """Adds the adapters that Adapters.save or peft wrote to a transformer's weights, in place.

    Args:
        transformer: the one that they were trained on, on any device.
        folder: holds adapter_config.json and adapter_model.safetensors; peft need not be installed.
    Raises: InputError if a file is missing, damaged, no plain LoRA, or made for other layers or shapes; then the
        transformer is as it was.
    """
    rank, scale = _read_config(Path(folder, _CONFIG))
    path = Path(folder, _WEIGHTS)
    try:
        tensors = read_tensors(path)
    except ValueError as error:
        raise InputError(str(error)) from error
    layers, factors = _layers(transformer), {}
    for name in sorted({name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in tensors}):
        a, b = (tensors.pop(f"{_PREFIX}{name}.lora_{part}.weight", None) for part in "AB")
        if name not in layers or a is None or b is None:
            raise InputError(f"{path}: {shown(name)} is no adapter of a layer; give the model that it was made for")
        _check_factors(f"{path}: {name}", layers[name].weight, rank, a, b)
        factors[name] = a, b
    if tensors or not factors:
        raise InputError(f"{path}: holds no adapters, or more than them; restore it from its source")
    with torch.no_grad():
        for name, (a, b) in factors.items():
            weight = layers[name].weight
            weight += scale * (b.to(weight) @ a.to(weight))


def _layers(transformer: Transformer) -> dict[str, Linear]:
    """The layers that can have an adapter: the head and the embedding are read as weights, past any adapter."""
    return {name: module for name, module in transformer.named_modules() if isinstance(module, Linear)}


def _read_config(path: Path) -> tuple[int, float]:
    """Rank, and the factor of the adapters' output."""
    config: Any = read_json(path)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InputError(f"{path}: not the configuration of LoRA adapters; give a folder that peft or hermesflow wrote")
    for name in _VARIANTS:
        if config.get(name) not in (None, False, "none", [], {}):
            raise InputError(f"{path}: {name} is {shown(config[name])}, only plain LoRA is read; merge it with peft")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise InputError(f"{path}: r is {shown(rank)}, lora_alpha {shown(alpha)}; restore it from its source")
    return rank, alpha / rank


def _check_factors(where: str, weight: Tensor, rank: int, a: Tensor, b: Tensor) -> None:
    expected = [rank, weight.shape[1]], [len(weight), rank]
    if (list(a.shape), list(b.shape)) != expected:
        raise InputError(
            f"{where} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, expected {expected[0]} and {expected[1]}; "
            "give the model that it was made for"
        )
    if any(factor.dtype not in WEIGHT_DTYPES or not factor.isfinite().all() for factor in (a, b)):
        raise InputError(f"{where} holds NaN, infinity or integers; restore it from its source")
