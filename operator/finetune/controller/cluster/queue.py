"""The work queue: each job at most once, never visited by two workers at a time, with delayed returns.

What may start work or end it goes first; what only changes what a status says waits for it, though never long: a burst
of new jobs starts as soon as it can, and the status of those that run is then told once instead of five times.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from finetune.controller.cluster.store import Key

PATIENCE_SECONDS = 5.0
"""How long news may wait behind work; then every other visit is theirs."""


class WorkQueue:
    """Keys that wait for a visit."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._work: dict[Key, None] = {}
        self._news: dict[Key, float] = {}
        self._news_last = False
        self._again: dict[Key, bool] = {}
        """Those that came up while they were visited, and whether with work."""
        self._visited: set[Key] = set()
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._wake = asyncio.Event()
        self._closed = False

    def __len__(self) -> int:
        return len(self._work) + len(self._news) + len(self._again)

    def add(self, key: Key, *, news: bool = False) -> None:
        """Visit the job as soon as a worker is free; once, however often it is added meanwhile. With `news` after
        those that have work to start or to end."""
        if self._closed or key in self._work:
            return
        if key in self._visited:
            self._again[key] = news and self._again.get(key, True)
        elif news:
            self._news.setdefault(key, self._clock())
        else:
            self._news.pop(key, None)
            self._work[key] = None
        self._wake.set()

    def add_after(self, key: Key, seconds: float) -> None:
        """Visit the job after a while, unless a later call names another time."""
        self.forget(key)
        if not self._closed:
            self._timers[key] = asyncio.get_running_loop().call_later(max(0.0, seconds), self._due, key)

    def forget(self, key: Key) -> None:
        """Drop the delayed visit."""
        if timer := self._timers.pop(key, None):
            timer.cancel()

    def _due(self, key: Key) -> None:
        self._timers.pop(key, None)
        self.add(key)

    async def work(self, visit: Callable[[Key], Awaitable[None]]) -> None:
        """A worker: visits until the queue is closed. `visit` must not raise."""
        while True:
            while not (self._work or self._news):
                if self._closed:
                    return
                self._wake.clear()
                await self._wake.wait()
            key = self._next()
            self._visited.add(key)
            try:
                await visit(key)
            finally:
                self._visited.discard(key)
                if key in self._again:
                    self.add(key, news=self._again.pop(key))

    def _next(self) -> Key:
        oldest = next(iter(self._news.items()), None)
        overdue = oldest is not None and self._clock() - oldest[1] > PATIENCE_SECONDS and not self._news_last
        self._news_last = oldest is not None and (overdue or not self._work)
        if self._news_last and oldest is not None:
            del self._news[oldest[0]]
            return oldest[0]
        key = next(iter(self._work))
        del self._work[key]
        return key

    def close(self) -> None:
        """Begin no further visit; workers return when theirs is over."""
        self._closed = True
        self._work.clear()
        self._news.clear()
        self._again.clear()
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._wake.set()
