"""The work queue: each job at most once, never visited by two workers at a time, with delayed returns.

Jobs that nobody took up yet go before others, three to one: a burst of new jobs starts soon, and the running ones'
status still does not wait for its end.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from finetune.controller.cluster.store import Key


class WorkQueue:
    """Keys that wait for a visit."""

    def __init__(self) -> None:
        self._new: deque[Key] = deque()
        self._ready: deque[Key] = deque()
        self._turn = 0
        self._waiting: set[Key] = set()
        self._visited: set[Key] = set()
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._wake = asyncio.Event()
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, key: Key, *, new: bool = False) -> None:
        """Visit the job as soon as a worker is free; once, however often it is added meanwhile."""
        if self._closed or key in self._waiting:
            return
        self._waiting.add(key)
        if key not in self._visited:
            (self._new if new else self._ready).append(key)
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
            while not (self._new or self._ready):
                if self._closed:
                    return
                self._wake.clear()
                await self._wake.wait()
            key = self._next()
            self._waiting.discard(key)
            self._visited.add(key)
            try:
                await visit(key)
            finally:
                self._visited.discard(key)
                if key in self._waiting:
                    self._ready.append(key)
                    self._wake.set()

    def _next(self) -> Key:
        self._turn = (self._turn + 1) % 4
        preferred, other = (self._ready, self._new) if self._turn == 0 else (self._new, self._ready)
        return (preferred or other).popleft()

    def close(self) -> None:
        """Begin no further visit; workers return when theirs is over."""
        self._closed = True
        self._new.clear()
        self._ready.clear()
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._wake.set()
