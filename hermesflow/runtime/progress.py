"""Progress of long work: a bar with rate and time left on a terminal, elsewhere a line in the log now and then."""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from hermesflow.runtime.distributed import is_main

Item = TypeVar("Item")

_LOGGER = logging.getLogger(__name__)
_LINES = 10  # at most, of each piece of work
_QUIET_SECONDS = 5  # before a line, so that short work has none

_stage = ""  # of what the work is a part, such as "round 1 of 3, curation"
_logging = False  # whether some work logs its progress; work inside it does not
_display: Progress | None = None  # the one that is on screen; a track inside another adds its line to it


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Names the phase that all work inside belongs to, such as "round 1 of 3, curation"."""
    global _stage
    before, _stage = _stage, name
    try:
        yield
    finally:
        _stage = before


class track(Generic[Item]):  # noqa: N801 - read as a verb where it is used
    """Iterate and show how far it is: `for record in track(records, "captions", "records"): ...`.

    Args:
        items: what to iterate over, or a number n for range(n).
        description: what is being done, in a word or two.
        unit: what is counted, for the rate; plural.
        total: how many items there will be, where `items` has no length.
        completed: how many were done before a resumed run.
    """

    def __init__(
        self,
        items: Iterable[Item] | int,
        description: str,
        unit: str = "steps",
        *,
        total: int | None = None,
        completed: int = 0,
    ) -> None:
        self._items = range(items) if isinstance(items, int) else items
        self._description = f"{_stage}: {description}" if _stage else description
        self._unit = unit
        self._completed = completed
        if total is None and hasattr(self._items, "__len__"):
            total = len(self._items) + completed
        self._total = total
        self._progress: Progress | None = None
        self._task = None
        self._note = ""

    def note(self, text: str) -> None:
        """Show a short text behind the bar, such as the loss."""
        self._note = text
        if self._progress is not None:
            self._progress.update(self._task, note=text)

    def __iter__(self) -> Iterator[Item]:
        global _display
        if not is_main():
            yield from self._items
            return
        console = Console(stderr=True)
        if not console.is_terminal:
            yield from self._logged()
            return
        outermost = _display is None
        if outermost:
            _display = _new_display(console)
            _display.start()
        self._progress = _display
        self._task = _display.add_task(
            self._description, total=self._total, completed=self._completed, unit=self._unit, note=""
        )
        try:
            for item in self._items:
                yield item
                self._progress.advance(self._task)
        finally:
            if outermost:
                self._progress.stop()
                _display = None
            else:
                self._progress.remove_task(self._task)
            self._progress = None

    def _logged(self) -> Iterator[Item]:
        """The items; the outermost work says how far it is."""
        global _logging
        if _logging or not self._total:
            yield from self._items
            return
        _logging = True
        try:
            began = logged_at = time.monotonic()
            for number, item in enumerate(self._items, self._completed + 1):
                yield item
                is_tenth = number * _LINES // self._total > (number - 1) * _LINES // self._total
                if is_tenth and time.monotonic() - logged_at >= _QUIET_SECONDS:
                    logged_at = time.monotonic()
                    each = (logged_at - began) / (number - self._completed)
                    note = f", {self._note}" if self._note else ""
                    _LOGGER.info(
                        "%s: %d of %d %s, %s %s/s%s, %.0f s left",
                        self._description,
                        number,
                        self._total,
                        self._unit,
                        f"{1 / each:.3g}" if each else "many",
                        self._unit,
                        note,
                        each * (self._total - number),
                    )
        finally:
            _logging = False


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.3g} {task.fields['unit']}/s" if speed else "")


def _new_display(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
