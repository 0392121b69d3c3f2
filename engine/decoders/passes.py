"""Splits work over many images into even passes, and into smaller ones when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable

from hermesflow.engine.memory_planner import is_out_of_memory

logger = logging.getLogger(__name__)


def split_evenly(rows: list[int], most: int) -> list[list[int]]:
    """Parts of at most `most` rows, all but the last of one length."""
    size = -(-len(rows) // -(-len(rows) // most)) if rows else 1
    return [rows[start : start + size] for start in range(0, len(rows), size)]


class MemoryBound:
    """Calls a function on rows; when memory runs out it halves their number and keeps that bound."""

    def __init__(self, name: str, keeps: Callable[[], bool], release: Callable[[], None]) -> None:
        """
        Args:
            name: of the decoder, for the log.
            keeps: says whether memory is kept from call to call, which is given back before fewer rows are tried.
            release: gives it back, and what the device's cache holds.
        """
        self._name, self._keeps, self._release = name, keeps, release
        self._max_spans: int | None = None

    def call(self, rows: list[int], function: Callable[[list[int]], None], spans_of_row: int) -> None:
        """function(rows), cut into parts that fit in memory; it may be called again for rows at which it failed.

        Raises: what function raises, unless memory ran out and fewer rows can be tried.
        """
        pending = [rows]
        while pending:
            rows = pending.pop(0)
            most = len(rows) if self._max_spans is None else max(1, self._max_spans // spans_of_row)
            if len(rows) > most:
                pending[:0] = [rows[start : start + most] for start in range(0, len(rows), most)]
                continue
            try:
                function(rows)
                continue
            except (RuntimeError, MemoryError) as error:
                kept = self._keeps()
                if not is_out_of_memory(error) or (len(rows) == 1 and not kept):
                    raise
            # Only here, after the error and what its frames held are gone.
            self._release()
            if not kept:
                self._max_spans = len(rows) // 2 * spans_of_row
                logger.warning(
                    "%s: out of memory with %d sequences in a pass; continuing with %d",
                    self._name,
                    len(rows) * spans_of_row,
                    self._max_spans,
                )
            pending.insert(0, rows)
