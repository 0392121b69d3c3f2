"""Work that processes of any number of machines share over one folder: who makes which file, without a server.

A claim is a file beside the work. Whoever makes it has it, and renews its time while at work; one that is not renewed
belongs to a process that is gone, and is taken over. Times are those of the folder's own file system, so that the
clocks of the machines do not matter. Two may still make the same file where one was thought gone: what they make must
be equal, and be written whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

from hermesflow.runtime.files import make_folder, write_problem

GONE_AFTER = 60.0
"""Seconds without a renewal after which a claim's process is taken for gone."""


class Claims:
    """The claims of one process in a folder."""

    def __init__(self, folder: Path, gone_after: float | None = None) -> None:
        """
        Args:
            folder: of the claims; made if need be.
            gone_after: seconds; None is GONE_AFTER.
        Raises: InputError if the folder cannot be written.
        """
        self._folder, self._gone_after = make_folder(folder), gone_after or GONE_AFTER
        self.owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._clock = self._folder / f".{self.owner}"

    @contextlib.contextmanager
    def take(self, name: str) -> Iterator[bool]:
        """Yields: whether this process has the claim for the block, in which it is renewed; another may have it.

        Raises: InputError if the folder cannot be written.
        """
        path = self._folder / name
        if not self._make(path):
            yield False
            return
        ended = threading.Event()
        thread = threading.Thread(target=self._renew, args=(path, ended), daemon=True)
        thread.start()
        try:
            yield True
        finally:
            ended.set()
            thread.join()
            if self._owner_of(path) == self.owner:  # not one that was taken over
                path.unlink(missing_ok=True)

    def _make(self, path: Path) -> bool:
        try:
            self._remove_if_gone(path)
            with open(path, "x", encoding="utf-8") as file:
                file.write(self.owner)
        except FileExistsError:
            return False
        except OSError as error:
            raise write_problem(path, error) or error from error
        return True

    def _remove_if_gone(self, path: Path) -> None:
        """Under a lock, so that nobody removes what another has just made."""
        if not self._is_gone(path):
            return
        with open(self._folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self._is_gone(path):
                path.unlink(missing_ok=True)

    def _is_gone(self, path: Path) -> bool:
        try:
            renewed = path.stat().st_mtime
        except FileNotFoundError:
            return False
        self._clock.write_text("")
        now = self._clock.stat().st_mtime
        self._clock.unlink()
        return now - renewed > self._gone_after

    def _renew(self, path: Path, ended: threading.Event) -> None:
        while not ended.wait(self._gone_after / 6):
            with contextlib.suppress(OSError):
                if self._owner_of(path) == self.owner:
                    os.utime(path)

    def _owner_of(self, path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return ""
