"""What the server would not let a job create, and when it is asked again: quotas, names that are taken, webhooks that
are down.

Remembered from visit to visit, so that a job that is held up costs next to nothing and its message stands still. What
may change the answer, an edit of the job or news of its children, has it asked at once.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from finetune.controller.cluster.backoff import BackOff
from finetune.controller.cluster.store import Key
from finetune.controller.decision.observed import Observed

_FIRST_SECONDS, _LONGEST_SECONDS = 3.0, 120.0


def _waits() -> BackOff:
    return BackOff(first=_FIRST_SECONDS, longest=_LONGEST_SECONDS)


@dataclass
class Refusal:
    """The server's words, and when to ask again."""

    words: str
    again_at: datetime
    waits: BackOff = field(default_factory=_waits)
    state: Hashable = None
    """The job and its children, as they were when the server said so."""


class Refusals:
    """The refusals that stand, of all jobs."""

    def __init__(self) -> None:
        self._standing: dict[Key, Refusal] = {}

    def add(self, key: Key, words: str, now: datetime) -> None:
        """The server refused: the next time after 3 s, 6 s ... 2 min, in whole seconds as decisions count."""
        refusal = self._standing.setdefault(key, Refusal(words, now))
        later = now + timedelta(seconds=1 + refusal.waits.after())
        refusal.words, refusal.again_at, refusal.state = words, later.replace(microsecond=0), None

    def of(self, key: Key, observed: Observed, now: datetime) -> Refusal | None:
        """The refusal that stands against the job; due at once when the job is not what it was any more."""
        refusal = self._standing.get(key)
        if refusal is None:
            return None
        state = _state(observed)
        if refusal.state is None:  # the first look after the refusal: what the same visit wrote is no news
            refusal.state = state
        elif refusal.state != state:
            refusal.state, refusal.again_at = state, now.replace(microsecond=0)
            refusal.waits.reset()
        return refusal

    def forget(self, key: Key) -> None:
        """Nothing stands against the job any more."""
        self._standing.pop(key, None)


def _state(observed: Observed) -> Hashable:
    children = (*observed.jobs, *observed.claims)
    return (
        (observed.uid, observed.generation),
        frozenset((item["metadata"]["uid"], item["metadata"]["resourceVersion"]) for item in children),
        frozenset(pod["metadata"]["uid"] for pod in observed.pods),
    )
