"""Low-rank adapters (LoRA) around a transformer's layers, by peft."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager
from pathlib import Path

from hermesflow.engine.transformer import Transformer

from .config import TrainConfig
from .files import InputError, atomic_folder


class Adapters:
    """The adapters that stand around a transformer's layers."""

    def __init__(self, transformer: Transformer, config: TrainConfig) -> None:
        """Puts new ones, which change nothing yet, around the layers; only they are trained."""
        if importlib.util.find_spec("peft") is None:
            raise InputError("train.lora_rank: peft is not installed; run: pip install peft, or set it to 0")
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=list(config.lora_targets))
        self._model = get_peft_model(transformer, lora)

    def off(self) -> AbstractContextManager:
        """The transformer without them, for a block."""
        return self._model.disable_adapter()

    def save(self, folder: Path) -> None:
        """adapter_model.safetensors and adapter_config.json, as peft loads them."""
        with atomic_folder(folder) as temporary:
            self._model.save_pretrained(temporary)

    def merge(self) -> None:
        """Adds them to the weights; the transformer is a plain one again."""
        self._model.merge_and_unload()
