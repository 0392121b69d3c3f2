"""How large batches may be: free memory, and what the model needs for a token.

Bytes are the model's own arithmetic. A token that is cached costs its keys and values in every layer. A token that is
computed costs the tensors of one block, which are freed before the next: see activation_bytes. An answer's row costs
its logits. Beyond some tokens a pass more of them bring no speed, so a batch has a bound however much memory is free.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from hermesflow.engine.transformer import Transformer, TransformerConfig

SHARE = 0.9
"""Of the free memory a batch may take; the rest is for the caller, and for what the arithmetic leaves out."""
LOGITS_COPIES = 2
"""fp32 copies of an answer's logits that sampling holds at once."""

_LOGGER = logging.getLogger(__name__)
_GIB = 1 << 30


class MemoryPlanner:
    """Sizes the batches of one model, once for each kind of work, and says so in the log.

    The bound stays what it was at first, so that batches keep their shapes; where memory has become less since then,
    the decoders halve it.
    """

    def __init__(self, transformer: Transformer) -> None:
        self._transformer = transformer
        self._planned: dict[str, int] = {}

    def max_tokens(
        self, work: str, most: dict[str, int], *, vocab_size: int = 0, tokens_per_row: int = 1, computed: bool = True
    ) -> int:
        """How many tokens a pass may compute and cache.

        Args:
            work: the kind of work, for the log.
            most: device type -> tokens beyond which throughput stays level.
            vocab_size: of the logits that are held at once, for one row of every tokens_per_row tokens; 0: no logits.
            tokens_per_row: at least 1.
            computed: False if all but a few tokens are only cached.
        Returns: at least 1.
        """
        if work not in self._planned:
            weight = self._transformer.embed.weight
            bytes_of = token_bytes if computed else kv_bytes
            each = bytes_of(self._transformer.config, weight.itemsize)
            each += vocab_size * 4 * LOGITS_COPIES // tokens_per_row
            free, count = free_bytes(weight.device), most.get(weight.device.type, most["cpu"])
            if not math.isinf(free):
                count = max(1, min(count, int(SHARE * free) // each))
            self._planned[work] = count
            of_free = "" if math.isinf(free) else f" of {free / _GIB:.1f} GiB free"
            _LOGGER.debug("%s: up to %s tokens a pass (%.2g GiB%s)", work, f"{count:,}", count * each / _GIB, of_free)
        return self._planned[work]


def token_bytes(config: TransformerConfig, itemsize: int) -> int:
    """Bytes of a token that is computed and cached, logits aside."""
    return kv_bytes(config, itemsize) + activation_bytes(config, itemsize)


def kv_bytes(config: TransformerConfig, itemsize: int) -> int:
    """Bytes of a token's keys and values in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize


def activation_bytes(config: TransformerConfig, itemsize: int) -> int:
    """Bytes of a computed token at the worst moment of a block.

    Attention holds the residual, the normed input, q, k and v before and after norm and rotation, the last in fp32, and
    its result twice, before and after its projection. The MLP holds the residual before and after attention, the normed
    input, its up projection (twice as wide if gated), the activation (and its product, if gated), on the CPU that once
    more with its rows filled up (kernels/matmul.py), and its result.
    """
    heads = (config.num_heads + config.num_kv_heads) * config.head_dim
    values = config.num_kv_heads * config.head_dim
    attention = 4 * config.hidden_size * itemsize + (2 * heads + values) * itemsize + 2 * heads * 4
    wide = 5 if config.gated else 3
    mlp = 4 * config.hidden_size * itemsize + wide * config.mlp_size * itemsize
    return max(attention, mlp)


def free_bytes(device: torch.device) -> float:
    """Bytes that can be allocated on a device now; infinity where the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return host_free_bytes()


def host_free_bytes(root: Path = Path("/")) -> float:
    """Bytes that this process can allocate: what the system has available, and what its control groups allow.

    Args:
        root: where proc/ and sys/ are; another one for a test.
    Returns: the least of them, or infinity where none is known.
    """
    return min([math.inf, *_available(root / "proc/meminfo"), *_cgroup_rooms(root)])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the host has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "not enough memory" in str(error)


def _available(path: Path) -> Iterator[int]:
    for line in _lines(path):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            yield int(value.split()[0]) * 1024


def _cgroup_rooms(root: Path) -> Iterator[int]:
    """What is left of the limit of each control group, version 1 or 2, that the process is in."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, name = line.split(":", 2)
        if not controllers:
            mount, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = mount / name.lstrip("/")
        for folder in (group, *group.parents):  # in a container the group's name may be one of the host: then its root
            most, used = (_lines(folder / file) for file in (limit, usage))
            if most and used and most[0].isdecimal():
                # Files that were read and not looked at since are dropped when the memory is needed.
                cached = [int(row.split()[1]) for row in _lines(folder / "memory.stat") if row.startswith("inactive_f")]
                yield max(0, int(most[0]) - int(used[0]) + sum(cached))
            if folder == mount:
                break


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
