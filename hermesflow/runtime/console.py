"""What a command tells on stderr: the library's log, and errors as a line for the user."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hermesflow.runtime.files import InputError, invalid_text, write_problem


def escape_what_cannot_be_printed() -> None:
    """An output of few characters, such as ASCII, and a name that is no Unicode must not stop a command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _StderrHandler(logging.Handler):
    """Prints to what stderr is at the time: a progress bar stands in for it while it is on screen."""

    def emit(self, record: logging.LogRecord) -> None:
        from hermesflow.runtime.distributed import is_main

        if is_main():
            print(f"hermesflow: {record.getMessage()}", file=sys.stderr)


@contextmanager
def log_on_stderr(lowest: int) -> Iterator[None]:
    """Shows what the library logs while a command runs, from a level on."""
    logger, handler = logging.getLogger("hermesflow"), _StderrHandler(lowest)
    level = logger.level
    logger.setLevel(lowest)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def user_message(error: Exception) -> str | None:
    """What the user should read, or None if the error is a fault of ours that deserves a traceback."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return invalid_text(error)
    if isinstance(error, OSError):
        path = error.filename or "output"
        return str(write_problem(path, error) or f"{path}: {error.strerror or error}")
    distributed = sys.modules.get("hermesflow.runtime.distributed")
    if distributed is not None and distributed.is_lost(error):
        return distributed.LOST
    registry = sys.modules.get("hermesflow.kernels.registry")  # loaded wherever its error can come from
    if registry is not None and isinstance(error, registry.BackendError):
        return str(error)
    nan_cause = sys.modules.get("hermesflow.engine.nan_cause")
    if nan_cause is not None and isinstance(error, nan_cause.NotFiniteError):
        return str(error)
    return None


def may_tell() -> bool:
    """Of the processes that torchrun started, the first that ends says why."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    from hermesflow.runtime import distributed

    return distributed.may_tell()
