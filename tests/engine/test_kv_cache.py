"""What the cache stores, number by number."""

import pytest
import torch

from hermesflow.engine.kv_cache import KVCache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("head_dim", [64, 8, 6, 1])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
def test_rows_are_where_the_slots_say(dtype, head_dim, packed):
    """Heads that are no multiple of 16 bytes, and rows cut out of a wider tensor; NaN and -0 stay what they are."""
    slots = torch.tensor([4, 0, 7])
    cache = KVCache(2, 9, 3, head_dim, dtype=dtype)
    new = torch.randn(3, 9, head_dim).to(dtype)
    new[0, 0, 0], new[1, 3, -1] = float("nan"), -0.0
    key, value = (new[:, first : first + 3] for first in (0, 3))
    if packed:
        key, value = key.contiguous(), value.contiguous()
    keys, values = cache.write(1, slots, key, value)
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    for storage, given in ((keys, key), (values, value)):
        assert torch.equal(storage[slots].view(bits), given.contiguous().view(bits))
        assert not storage[torch.tensor([1, 2, 3, 5, 6, 8])].any()
    assert keys.data_ptr() == cache.keys[1].data_ptr() and not cache.keys[0].any()


def test_another_dtype_is_converted():
    cache = KVCache(1, 4, 2, 8, dtype=torch.bfloat16)
    key = torch.randn(2, 2, 8)
    keys, _ = cache.write(0, torch.tensor([1, 3]), key, key)
    assert torch.equal(keys[[1, 3]], key.bfloat16())
