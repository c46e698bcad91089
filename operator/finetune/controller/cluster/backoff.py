"""How long to wait before asking a server again that could not answer: what it asks for, else longer each time."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from finetune.controller.cluster.client import ApiError

log = logging.getLogger(__name__)

UNREACHABLE = (ApiError, OSError, TimeoutError)
"""What a request raises; which of it may pass is `passing`'s answer."""

_FIRST_SECONDS, _LONGEST_SECONDS = 0.2, 30.0
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_JITTER = 0.2
"""Up to this share on top, so that what was refused together does not come back together."""

_Answer = TypeVar("_Answer")


class BackOff:
    """The waits of one thing that is tried again and again."""

    def __init__(self, longest: float = _LONGEST_SECONDS, first: float | None = None) -> None:
        self._first, self._longest = first, longest
        self._failures = 0

    def after(self, error: Exception | None = None) -> float:
        """Seconds until the next try: the server's own Retry-After, or 0.2 s, 0.4 s ... half a minute, or as given."""
        asked = error.retry_after if isinstance(error, ApiError) else None
        if asked is not None:
            wait = min(max(asked, _FIRST_SECONDS), _LONGEST_SECONDS)
        else:
            wait = min(self._longest, (self._first or _FIRST_SECONDS) * 2.0 ** min(self._failures, 16))
            self._failures += 1
        return wait * (1 + random.uniform(0, _JITTER))  # noqa: S311 - no secret

    def reset(self) -> None:
        """It worked."""
        self._failures = 0


def passing(error: Exception) -> bool:
    """Whether the same request may well be answered later: a busy or starting server, a dropped connection."""
    return not isinstance(error, ApiError) or error.status in _PASSING or error.retry_after is not None


async def until_answered(ask: Callable[[], Awaitable[_Answer]], what: str) -> _Answer:
    """The answer, asked for until it comes. Raises the ApiError that waiting would not change."""
    waits = BackOff()
    while True:
        try:
            return await ask()
        except UNREACHABLE as error:
            if not passing(error):
                raise
            seconds = waits.after(error)
            log.warning("%s: %s; again in %.1f s", what, error or repr(error), seconds)
            await asyncio.sleep(seconds)


class Unending:
    """Waits without an end, each time it is iterated anew: for kopf, which gives up where its list of waits ends."""

    def __iter__(self) -> Iterator[float]:
        seconds = _FIRST_SECONDS
        while True:
            yield seconds
            seconds = min(_LONGEST_SECONDS, seconds * 2)
