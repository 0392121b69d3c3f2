"""Seeds of single draws: pure functions of what is drawn, whatever is drawn beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np


def candidate_seed(seed: int, record_id: str, kind: str, index: int) -> int:
    """The seed of one candidate, 63 bits."""
    text = json.dumps([seed, record_id, kind, index])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def candidate_seeds(seed: int, record_ids: Sequence[str], kind: str, count: int) -> np.ndarray:
    """Of the first `count` candidates of each record, int64 [len(record_ids), count]."""
    rows = [[candidate_seed(seed, id, kind, index) for index in range(count)] for id in record_ids]
    return np.array(rows, dtype=np.int64)


def shuffled_epochs(seed: Sequence[int], count: int, positions: Sequence[int]) -> list[tuple[int, int]]:
    """Entries of an endless row of epochs, each of which has the numbers below `count` in an order of its own.

    Args:
        seed: of the orders.
        count: numbers of an epoch.
        positions: in the row, from 0.
    Returns: (number, epoch) of each position.
    """
    epochs = {position // count for position in positions}
    order = {epoch: np.random.default_rng([*seed, epoch]).permutation(count) for epoch in epochs}
    return [(int(order[position // count][position % count]), position // count) for position in positions]
