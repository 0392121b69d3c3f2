"""The processes of a run that torchrun started; without it, one process that this module is silent in.

    torchrun --nproc-per-node 8 -m hermesflow selfplay ...       (PYTHONSAFEPATH=1)

Every function may be called in a single process, where it does nothing.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from hermesflow.engine.transformer import Transformer

from .models import Model

_PATIENCE = datetime.timedelta(days=1)
"""A process that died is told at once by the others' broken connections; one that evaluates alone may take hours."""


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Joins the processes that torchrun started, for as long as the block runs.

    Args:
        device: of the settings, "cpu" or "cuda...": gloo or NCCL. "auto" takes CUDA where there is one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    on_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_cuda else "gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes the files that all share."""
    return rank() == 0


def barrier() -> None:
    """Waits until all processes are here."""
    if world_size() > 1:
        dist.barrier()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' values, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather(value: Any) -> list[Any]:
    """Every process's value, in all of them, by rank."""
    values = [value]
    if world_size() > 1:
        values = [None] * world_size()
        dist.all_gather_object(values, value)
    return values


def shard(transformer: Transformer, dtype: torch.dtype) -> None:
    """FSDP2: every process keeps its part of the weights, in place; passes are computed in dtype, gradients summed in
    float32. One process alone keeps all of them: passes in dtype, weights and optimizer in float32."""
    if not dist.is_initialized():
        backend = "nccl" if transformer.embed.weight.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    # Positions are rotated in float32 whatever the weights are, so inputs of layers are left as they come.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in transformer.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(transformer, mp_policy=policy)


def unshard(model: Model) -> None:
    """Puts a plain transformer in the place of the sharded one: whole in the first process, empty elsewhere."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model.transformer, options=options)
    device = model.transformer.embed.weight.device
    with torch.device("meta"):
        transformer = Transformer(model.transformer.config)
    if is_main():
        transformer.load_state_dict(weights, assign=True)
        transformer.to(device)
    model.transformer = transformer
    model.__dict__.pop("engine", None)
    if world_size() == 1:
        dist.destroy_process_group()
