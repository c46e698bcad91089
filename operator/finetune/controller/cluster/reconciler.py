"""One visit to one job: observe, decide, apply; and what happens when that does not work."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from finetune.controller.cluster.apply import Applied, Applier, NotLeadingError
from finetune.controller.cluster.backoff import BackOff
from finetune.controller.cluster.client import ApiError
from finetune.controller.cluster.queue import WorkQueue
from finetune.controller.cluster.refusals import Refusals
from finetune.controller.cluster.resources import FINETUNEJOBS
from finetune.controller.cluster.store import Key, Store
from finetune.controller.decision.decide import decide
from finetune.controller.decision.stages.pod import PodSettings

log = logging.getLogger(__name__)

_PASSES = 3
"""What the server said of a decision is known to the next one, within one visit: its words, and that they passed."""


@dataclass
class Reconciler:
    """What the queue's workers do."""

    store: Store
    queue: WorkQueue
    applier: Applier
    settings: Callable[[], PodSettings]
    visited: Callable[[float], None] = lambda seconds: None
    """Told how long each visit took."""

    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    last_visit: float = field(default_factory=time.monotonic)
    _refusals: Refusals = field(default_factory=Refusals)
    _waits: dict[Key, BackOff] = field(default_factory=dict)

    async def visit(self, key: Key) -> None:
        """Bring one job forward. Never raises: a worker that dies would be missed by nobody."""
        started = time.perf_counter()
        try:
            await self._reconcile(key)
            self._waits.pop(key, None)
        except NotLeadingError:
            self.queue.forget(key)
        except ApiError as error:
            if error.status in (404, 409):
                await self._look_again(key)
            else:
                log.warning("%s/%s: %s", *key, error)
            self._later(key, error)
        except (OSError, TimeoutError) as error:
            log.warning("%s/%s: the API server cannot be reached: %r", *key, error)
            self._later(key, error)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("%s/%s: the decision failed; this is a bug of the operator", *key)
            self._later(key, error)
        finally:
            self.last_visit = time.monotonic()
            self.visited(time.perf_counter() - started)

    async def _reconcile(self, key: Key) -> None:
        self.queue.forget(key)
        applied = Applied()
        for _ in range(_PASSES):
            observed, now = self.store.observe(key), self.now()
            if observed is None:
                self._refusals.forget(key)
                return
            if observed.lost_latch:
                log.warning("%s/%s: status.%s cannot be read; the job is left alone", *key, observed.lost_latch)
            refusal = self._refusals.of(key, observed, now)
            if refusal is not None:
                observed = replace(observed, conflicts=(refusal.words,), again_at=refusal.again_at)
            decision = decide(replace(observed, refused=applied.refused), now, self.settings())
            if decision.again_at is not None:
                self.queue.add_after(key, (decision.again_at - now).total_seconds() + 0.05)
            applied = await self.applier.apply(observed, decision)
            if applied.conflict:
                self._refusals.add(key, applied.conflict, now)
            elif refusal is not None and refusal.again_at <= now:  # what it was about is done, or wanted no longer
                self._refusals.forget(key)
                if not decision.create:
                    return
            elif not applied.again:
                return
        self.queue.add(key)  # what the last pass found, nobody else tells of

    async def _look_again(self, key: Key) -> None:
        """The server knows the job otherwise than the store does: ask it."""
        known = self.store.get(FINETUNEJOBS.kind, *key)
        try:
            self.store.feed(await self.applier.api.get(FINETUNEJOBS.path(*key)))
        except ApiError as error:
            if error.status == 404 and known is not None:
                self.store.remove(FINETUNEJOBS.kind, *key, uid=str(known["metadata"]["uid"]))
        except (OSError, TimeoutError) as error:
            log.warning("%s/%s: the API server cannot be reached: %r", *key, error)

    def _later(self, key: Key, error: Exception) -> None:
        self.queue.add_after(key, self._waits.setdefault(key, BackOff()).after(error))
