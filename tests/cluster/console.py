"""What the user sees: steps with their time on stderr, live on a terminal, one line each elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

CONSOLE = Console(stderr=True, highlight=False)


class ClusterError(Exception):
    """Something the user can mend; the message says how."""


class Step:
    """A step in progress; its title may change while it runs."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.started = time.monotonic()

    def elapsed(self) -> str:
        seconds = time.monotonic() - self.started
        return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"

    def __rich__(self) -> str:
        return f"{self.title} ({self.elapsed()})"


def say(text: str) -> None:
    """One line for the user."""
    CONSOLE.print(text, soft_wrap=True)


@contextmanager
def step(title: str) -> Iterator[Step]:
    """Shows that something takes time, and how long it took."""
    current = Step(title)
    if CONSOLE.is_terminal:
        with CONSOLE.status(current):
            yield current
    else:
        yield current
    say(f"{current.title}: {current.elapsed()}")
