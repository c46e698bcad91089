"""Health and metrics over HTTP, outside kopf: kopf's own probe stays green whatever has died.

Red means that a restart would help: a task has ended, the watches lag, or the workers stand still with work to do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from aiohttp import web

from finetune.controller.serving.metrics import Metrics

_STANDSTILL_SECONDS = 120.0


@dataclass
class Health:
    """What the probes look at."""

    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    watching: Callable[[], bool] = lambda: True
    waiting: Callable[[], int] = lambda: 0
    last_visit: Callable[[], float] = time.monotonic
    leading: Callable[[], bool] = lambda: False
    not_ready: Mapping[str, Callable[[], bool]] = field(default_factory=dict)
    notes: Callable[[], list[str]] = list
    """What whoever asks whether all is ready should know besides."""

    def problems(self) -> list[str]:
        """Why this process should be restarted; empty when it is well."""
        found = [f"the task {name} has ended" for name, task in self.tasks.items() if task.done()]
        if not self.watching():
            found.append("the watches lag behind the server")
        if self.leading() and self.waiting() and time.monotonic() - self.last_visit() > _STANDSTILL_SECONDS:
            found.append(f"{self.waiting()} jobs wait, and none was visited for {_STANDSTILL_SECONDS:.0f} s")
        return found

    def waits_for(self) -> list[str]:
        """What is missing before this process can serve."""
        return [name for name, missing in self.not_ready.items() if missing()]


def application(health: Health, metrics: Metrics) -> web.Application:
    """/healthz, /readyz and /metrics."""

    def probe(
        problems: Callable[[], list[str]], notes: Callable[[], list[str]] = list
    ) -> Callable[[web.Request], object]:
        async def answer(_: web.Request) -> web.Response:
            found = problems()
            return web.Response(status=503 if found else 200, text="\n".join([*(found or ["ok"]), *notes()]))

        return answer

    async def page(_: web.Request) -> web.Response:
        return web.Response(body=metrics.page(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    app = web.Application()
    app.router.add_get("/healthz", probe(health.problems))  # type: ignore[arg-type]
    app.router.add_get("/readyz", probe(health.waits_for, health.notes))  # type: ignore[arg-type]
    app.router.add_get("/metrics", page)
    return app
