"""Whether a training gets on: each of its processes gives a sign of life after every step, and who sees none for too
long has all of them say where they stand, and ends them.

The watch is kept by the pod's first process, for a training that hangs may hold Python's lock. The stacks are written
by a handler in C (`faulthandler`), which needs no lock either.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

PULSE = "FINETUNE_PULSE"
"""A folder of this pod's own, for the signs."""

_STACKS = signal.SIGUSR1
_LAST_WORDS = 2.0
"""Seconds that the stacks have to get into the log."""

log = logging.getLogger(__name__)


def show_stacks_when_asked() -> None:
    """From now on this process writes the stacks of all its threads to the log when it is asked to."""
    faulthandler.register(_STACKS, all_threads=True)


def beat() -> None:
    """This process has got on."""
    if folder := os.environ.get(PULSE):
        with suppress(OSError):
            Path(folder, str(os.getpid())).touch()


class Watchman:
    """Watches the signs of life in a folder, until it is dismissed."""

    def __init__(
        self, folder: Path, seconds: float, processes: Callable[[], Iterable[int]], end: Callable[[], None]
    ) -> None:
        """`processes` are those that are asked where they stand when none has got on for `seconds`; `end` ends them."""
        self.found_hanging = False
        self._folder, self._seconds, self._processes, self._end = folder, seconds, processes, end
        self._dismissed = threading.Event()
        threading.Thread(target=self._watch, name="watchman", daemon=True).start()

    def dismiss(self) -> None:
        self._dismissed.set()

    def _watch(self) -> None:
        seen, since = self._signs(), time.monotonic()
        while not self._dismissed.wait(min(5.0, self._seconds / 10)):
            now = self._signs()
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since >= self._seconds:
                self._tell_and_end()
                return

    def _signs(self) -> dict[str, int]:
        """Compared with themselves only, whatever clock the file system has."""
        with suppress(OSError):
            return {item.name: item.stat().st_mtime_ns for item in os.scandir(self._folder)}
        return {}

    def _tell_and_end(self) -> None:
        log.error("no step for %g s: the stacks of all threads follow", self._seconds)
        for process in self._processes():
            with suppress(ProcessLookupError):
                os.kill(process, _STACKS)
        if not self._dismissed.wait(_LAST_WORDS):
            self.found_hanging = True
            self._end()
