"""Slots against a plain occupancy map."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hermesflow.engine.slot_allocator import SlotAllocator

pieces = st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.lists(st.tuples(pieces, st.sets(st.integers(0, 30))), max_size=8))
def test_placed_spans_never_meet(capacity, rounds):
    """Rounds of placing, after each of which some spans leave; what does not fit changes nothing."""
    spans = []
    for groups, leaving in rounds:
        starts, regions = (np.array([span[part] for span in spans], dtype=np.int64) for part in (0, 1))
        slots = SlotAllocator(capacity, starts, regions)
        for group in (groups, groups[:1]):
            lengths, from_end = zip(*group, strict=True)
            placed = slots.place(lengths, from_end=from_end)
            if placed is None:
                free = capacity - sum(length for _, length in spans)
                assert spans or sum(lengths) > free, "an empty cache takes whatever it can hold"
                continue
            spans += zip(placed, lengths, strict=True)
            taken = [slot for start, length in spans for slot in range(start, start + length)]
            assert len(set(taken)) == len(taken) and min(taken) >= 0 and max(taken) < capacity
        spans = [span for index, span in enumerate(spans) if index not in leaving]


def test_first_fit_from_either_end():
    slots = SlotAllocator(20, np.array([12, 5]), np.array([3, 2]))  # free: 0 to 5, 7 to 12, 15 to 20
    assert slots.place([4, 4, 2], from_end=[False, True, False]) == [0, 16, 7]
    assert slots.place([4], from_end=[False]) is None
    assert slots.place([1, 3, 1], from_end=[False, True, True]) == [4, 9, 15]
    assert slots.place([1], from_end=[True]) is None
    assert SlotAllocator(3, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)).place([3], from_end=[True]) == [0]
