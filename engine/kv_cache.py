"""Key/value storage of span trees."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every cached token, allocated once.

    It begins as zeros: attention may read a slot that holds no token yet, and gives it the weight 0.
    Layout: keys and values are [num_layers, capacity, num_kv_heads, head_dim]; a token's row is its SpanTree slot, so
    that spans which share an ancestor share its rows.
    """

    def __init__(
        self,
        num_layers: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (num_layers, capacity, num_kv_heads, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    @property
    def capacity(self) -> int:
        """Number of token slots."""
        return self.keys.shape[1]

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores key and value [T, num_kv_heads, head_dim] at slots [T]; returns the layer's whole storage."""
        for storage, new in ((self.keys[layer], key), (self.values[layer], value)):
            new = new.to(storage.dtype)
            if _is_wide(storage) and _is_wide(new):  # an index computed for each 16 bytes, not for each number
                storage, new = storage.view(torch.complex128), new.view(torch.complex128)
            storage.index_copy_(0, slots, new)
        return self.keys[layer], self.values[layer]


def _is_wide(x: Tensor) -> bool:
    """Whether x consists of aligned runs of 16 bytes."""
    steps = (*x.stride()[:-1], x.shape[-1], x.storage_offset())
    return x.stride(-1) == 1 and not any(step * x.itemsize % 16 for step in steps)
