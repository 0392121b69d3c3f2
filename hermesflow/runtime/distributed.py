"""The processes of a run that torchrun started; without it, one process that this module is silent in.

    torchrun --nproc-per-node 8 -m hermesflow selfplay ...       (PYTHONSAFEPATH=1)

Every function may be called in a single process, where it does nothing. In several, all processes call those that wait
for one another, in the same order; on_main's work is alone, as in a single process.

A process that dies ends the others: they find their connections broken, or torchrun sends them SIGTERM. Only the first
to speak reports it.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from hermesflow.engine.transformer import Transformer
from hermesflow.runtime.files import InputError, atomic_folder

_Result = TypeVar("_Result")
_PATIENCE = datetime.timedelta(days=1)
"""A dead process breaks the others' connections at once; one that evaluates alone may take hours."""
_RESUMES = "the same command resumes where the run stopped, with any number of processes"
LOST = f"another process of this run is gone (killed, out of memory, or its machine lost); {_RESUMES}"
TERMINATED = f"stopped by torchrun, since another process is gone or the run was asked to end; {_RESUMES}"

_is_alone = False  # on_main's work
_own_group: dist.ProcessGroup | None = None  # of one process, which shard made


def is_launched() -> bool:
    """Whether torchrun started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_device(device: str) -> str:
    """The device of this process, for model.device: of "auto" and "cuda" each process takes its own.

    Raises: InputError if there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    count = torch.cuda.device_count()
    if is_launched() and device.startswith("cuda:"):
        raise InputError(f"model.device {device}: all processes would share it; set it to cuda, and each takes its own")
    if is_launched() and device == "cuda":
        number = int(os.environ["LOCAL_RANK"])
        if number >= count:
            raise InputError(
                f"torchrun: process {number} of this machine has no CUDA device, torch sees {count}; "
                f"give --nproc-per-node {max(count, 1)}, or model.device cpu"
            )
        return f"cuda:{number}"
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= count:
        raise InputError(
            f"model.device {device}: torch sees {count} CUDA devices here; choose another, or cpu "
            "(hermesflow doctor shows more)"
        )
    return device


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """Joins the processes that torchrun started, for as long as the block runs; only the first prints.

    Args:
        device: of the settings; see local_device. CUDA takes NCCL, the CPU gloo.
    """
    if not is_launched():
        yield
        return
    _tell_of_termination()
    device = local_device(device)
    if device != "cpu":
        torch.cuda.set_device(device)
    backend, device_id = ("gloo", None) if device == "cpu" else ("nccl", torch.device(device))
    dist.init_process_group(backend, timeout=_PATIENCE, device_id=device_id)
    with contextlib.ExitStack() as stack:
        if not is_main():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8", errors="replace"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield
    # Not after an error: leaving together is what the others could no longer do.
    dist.destroy_process_group()


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process cannot be reached."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def may_tell() -> bool:
    """Whether this process is the first whose end is to be reported; the others should be silent."""
    if not is_launched():
        return True
    try:
        return _store().add("hermesflow/reported", 1) == 1
    except (RuntimeError, ValueError):  # torchrun itself is gone
        return is_main()


@functools.cache
def _store() -> dist.Store:
    """torchrun's, which outlives this process; a connection of its own, since a collective may hold the group's."""
    store, _, _ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=60)))
    return store


def _tell_of_termination() -> None:
    """From now on SIGTERM ends this process with a line, also while it waits for another one in a collective."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    # Python runs a handler only between its own steps; the system writes the signal's number to the socket at once.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_wait_for_termination, args=(receiver, sender), daemon=True).start()


def _wait_for_termination(receiver: socket.socket, sender: socket.socket) -> None:
    """The sender is kept open."""
    while receiver.recv(1) != bytes([signal.SIGTERM]):
        pass
    if may_tell():
        print(f"hermesflow: error: {TERMINATED}", file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGTERM)


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() and not _is_alone else 1


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


def on_main(work: Callable[[], _Result]) -> _Result:
    """Runs work in the first process, as if there were no other; all wait for its result, which is small."""
    global _is_alone
    if world_size() == 1:
        return work()
    results: list[Any] = [None]
    if is_main():
        _is_alone = True
        try:
            results = [work()]
        finally:
            _is_alone = False
    dist.broadcast_object_list(results)
    return results[0]


@contextlib.contextmanager
def shared_folder(path: Path) -> Iterator[Path]:
    """atomic_folder for all processes, which fill the one temporary folder together."""
    with contextlib.ExitStack() as stack:
        yield on_main(lambda: stack.enter_context(atomic_folder(path)))
        barrier()
    barrier()


def shard(transformer: Transformer, dtype: torch.dtype) -> None:
    """Leaves each process its part of the weights (FSDP2), in place; one process alone keeps all of them.

    Args:
        transformer: whole, in float32, which weights and optimizer stay.
        dtype: of the passes; gradients are summed in float32.
    """
    global _own_group
    if not dist.is_initialized():
        backend = "nccl" if transformer.embed.weight.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        _own_group = dist.group.WORLD
    # Positions are rotated in float32 whatever the weights are, so inputs of layers are left as they come.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in transformer.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(transformer, mp_policy=policy)


def reshard(transformer: Transformer) -> None:
    """Lets go of the whole weights that passes without a gradient leave behind: they are not those that are trained."""
    if isinstance(transformer, FSDPModule):
        transformer.reshard()


@contextlib.contextmanager
def gathered(transformer: Transformer) -> Iterator[None]:
    """Every process has the whole weights for as long as the block runs, and passes in it wait for no other process."""
    sharded = [module for module in transformer.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(module is not transformer, recurse=False)
            module.reshard()


def unshard(sharded: Transformer) -> Transformer:
    """A plain transformer with the weights of a sharded one: whole in the first process, empty elsewhere."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(sharded, options=options)
    with torch.device("meta"):
        whole = sharded.skeleton()
    trained = {name for name, parameter in sharded.named_parameters() if parameter.requires_grad}
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_(name in trained)
    if is_main():
        whole.load_state_dict(weights, assign=True)
        if whole.config.tie_embeddings:
            whole.head.weight = whole.embed.weight
        whole.to(sharded.embed.weight.device)
    if dist.group.WORLD is _own_group:
        dist.destroy_process_group()
    return whole
