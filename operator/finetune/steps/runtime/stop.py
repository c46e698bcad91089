"""A request to stop: SIGTERM, which a pod gets when it has to go.

Standard library only, for it comes before all else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

PREEMPTED = 75
"""`ExitCode.PREEMPTED`, which would cost an import."""

_report: Callable[[], None] | None = None


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """In here a request ends the process at once with exit code 75: what is not published counts for nothing anyway.
    A step that has more to lose installs a handler of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def report_with(report: Callable[[], None]) -> None:
    """What to leave behind when the process ends so."""
    global _report
    _report = report


def _end(number: int, frame: FrameType | None) -> None:
    try:
        if _report is not None:
            _report()
    finally:
        os._exit(PREEMPTED)
