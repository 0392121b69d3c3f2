"""The transformer that is trained, made ready as the settings say: precision, shards, adapters, recomputation."""

from __future__ import annotations

from pathlib import Path

import torch

from hermesflow.config import TrainConfig
from hermesflow.engine.model_work import ModelWork
from hermesflow.models.lora import Adapters
from hermesflow.models.model import Model, model_digest
from hermesflow.runtime.distributed import shard, unshard, world_size


class Policy:
    """The transformer that is trained, made ready as the settings say."""

    def __init__(self, model: Model, config: TrainConfig, seed: int, first: Model | None = None) -> None:
        """Changes model.transformer in place; finish makes it a plain one again.

        Args:
            model: its transformer is on its device, in float32 and whole.
            config: dtype, compile, activation_checkpointing and the adapters' settings are used.
            seed: of new adapters.
            first: the model before self-play, whole and left as it is, if the reference is to be that; None: the
                reference is the policy before its first step.
        Raises: InputError as Adapters does.
        """
        self._model, self.transformer, self.config = model, model.transformer, config
        self.device = self.transformer.embed.weight.device
        on_cuda = self.device.type == "cuda"
        dtype = torch.bfloat16 if config.dtype == "bfloat16" or (config.dtype == "auto" and on_cuda) else torch.float32
        self.is_sharded = world_size() > 1 or dtype != torch.float32
        self.first = None if first is None else first.transformer
        self.digest = model_digest(first or model)  # of the reference's weights, while they are whole
        self.work = ModelWork(config=self.transformer.config, layout=model.layout, dtype=dtype)
        self.adapters = Adapters(self.transformer, config, seed) if config.lora_rank else None
        self.transformer.prepare_training(compiled=config.compile, checkpointed=config.activation_checkpointing)
        if self.is_sharded:
            shard(self.transformer, dtype)
        self.transformer.train()

    def finish(self, folder: Path) -> None:
        """Merges adapters, which go to folder/adapter too, and leaves model.transformer whole, in evaluation mode."""
        self.transformer.prepare_training(compiled=False, checkpointed=False)
        if self.adapters is not None:
            self.adapters.save(folder / "adapter")
            self.adapters.merge()
        if self.is_sharded:
            self._model.transformer = unshard(self.transformer)
        self._model.transformer.eval()
