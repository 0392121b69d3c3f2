"""Work in parts, a file each, that processes share: those of torchrun take turns, workers claim what nobody has.

What a part holds may not depend on who makes it, or beside whom.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hermesflow.runtime.claims import Claims
from hermesflow.runtime.distributed import rank, world_size
from hermesflow.runtime.progress import track

_LOOK_AGAIN = 1.0  # seconds, where all parts that are left are others'


def make_parts(
    paths: Sequence[Path],
    make: Callable[[int], None],
    what: str,
    *,
    claims: Claims | None = None,
    check: Callable[[int], None] = lambda number: None,
) -> Iterator[int]:
    """Makes the parts that are not there yet, with a line of progress.

    Args:
        paths: of the parts, in one folder.
        make: writes the part of a number, whole.
        what: the parts are of, for the progress.
        claims: of a worker, in a folder that all workers share; None: every world_size()-th part is this process's.
        check: raises if a part that was there before is of something else; not asked of parts of other workers.
    Yields: the numbers of parts that are there: without claims this process's, in order; with claims all, as this
        process sees them made, by whomever.
    """
    if claims is None:
        numbers = range(rank(), len(paths), world_size())
        for number in track(numbers, what, "batches"):
            if paths[number].exists():
                check(number)
            else:
                make(number)
            yield number
        return
    made = _made(paths)
    yield from sorted(made)
    yield from track(_shared(paths, make, made, claims), what, "batches", total=len(paths), completed=len(made))


def _shared(paths: Sequence[Path], make: Callable[[int], None], made: set[int], claims: Claims) -> Iterator[int]:
    """The numbers of parts that are made from now on, of the worker's own at once."""
    while left := [number for number in range(len(paths)) if number not in made]:
        was = len(made)
        for number in left:
            if paths[number].exists():
                continue  # counted below
            with claims.take(paths[number].stem) as is_mine:
                if is_mine and not paths[number].exists():
                    make(number)
                    made.add(number)
                    yield number
        others = _made(paths) - made
        made |= others
        yield from sorted(others)
        if len(made) == was:
            time.sleep(_LOOK_AGAIN)


def _made(paths: Sequence[Path]) -> set[int]:
    """The numbers of those that are there, by one look at their folder."""
    there = set(os.listdir(paths[0].parent)) if paths else set()
    return {number for number, path in enumerate(paths) if path.name in there}
