"""First-fit ranges of a cache's slots, given out on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class SlotAllocator:
    """What is free of capacity slots, given the spans that are there: their first slots and their regions [S].

    It lives as long as one round of placing; the next one is made from the tree as it is then, so that a span's slots
    are free exactly when it has left.
    """

    def __init__(self, capacity: int, starts: np.ndarray, regions: np.ndarray) -> None:
        order = np.argsort(starts, kind="stable")
        ends = np.concatenate([[0], (starts + regions)[order]]).tolist()
        begins = np.concatenate([starts[order], [capacity]]).tolist()
        self._gaps = [gap for gap in zip(ends, begins, strict=True) if gap[0] < gap[1]]

    def place(self, lengths: Sequence[int], *, from_end: Sequence[bool]) -> list[int] | None:
        """First slots of pieces of these lengths, all of them or None.

        Each takes the first gap that holds it, or the last one, at its end, where from_end says so: what is long and
        stays long lies apart from what comes and goes, and leaves it gaps that fit.
        """
        gaps, placed = list(self._gaps), []
        for length, at_end in zip(lengths, from_end, strict=True):
            order = range(len(gaps))[:: -1 if at_end else 1]
            index = next((index for index in order if gaps[index][1] - gaps[index][0] >= length), None)
            if index is None:
                return None
            first, end = gaps[index]
            start, rest = (end - length, (first, end - length)) if at_end else (first, (first + length, end))
            placed.append(start)
            gaps[index : index + 1] = [rest] if rest[0] < rest[1] else []
        self._gaps = gaps
        return placed
