"""The progress service: pods post live reports here, and any replica writes them to their job's `status.progress`.

Losing a report harms nothing, so the newest wins: each job is written at most once a second, whatever its pods send.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from finetune.api.contract import Step
from finetune.api.status import Progress
from finetune.controller.cluster.apply import Storable, Writer, as_it_is, write_progress
from finetune.controller.cluster.backoff import UNREACHABLE, BackOff, passing
from finetune.controller.cluster.client import ApiError
from finetune.controller.cluster.resources import FINETUNEJOBS
from finetune.controller.cluster.store import Store
from finetune.controller.decision.observed import Object, status_of
from finetune.controller.serving.metrics import Metrics
from finetune.controller.serving.senders import ForbiddenError, Senders, UnauthorizedError
from finetune.controller.serving.telemetry import MAX_BODY, BadReportError, Report, parse, progress

log = logging.getLogger(__name__)

_BETWEEN_WRITES_SECONDS = 1.0


class ProgressWriter:
    """Writes the newest report of each job, not more often than allowed."""

    def __init__(
        self,
        api: Writer,
        store: Store,
        *,
        between: float = _BETWEEN_WRITES_SECONDS,
        now: Callable[[], datetime],
        storable: Storable = as_it_is,
    ) -> None:
        self._api, self._store, self._between, self._now, self._storable = api, store, between, now, storable
        self._latest: dict[str, tuple[Object, Step, Report]] = {}
        self._shown: dict[str, Progress] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def put(self, job: Object, step: Step, report: Report) -> None:
        """Take a report in; an unwritten older one of the same job is forgotten."""
        uid = str(job["metadata"]["uid"])
        self._latest[uid] = (job, step, report)
        if uid not in self._tasks:
            task = asyncio.get_running_loop().create_task(self._write_all(uid))
            self._tasks[uid] = task

    async def _write_all(self, uid: str) -> None:
        waits = BackOff()
        try:
            while latest := self._latest.pop(uid, None):
                job, step, report = latest
                metadata = job["metadata"]
                known = self._store.get("FineTuneJob", metadata["namespace"], metadata["name"])
                if known is not None and known["metadata"]["uid"] == uid:
                    job = known
                document = progress(report, step, self._before(uid, job), self._now())
                try:
                    self._store.feed(await self._write(job, document))
                    self._shown[uid] = document
                    waits.reset()
                    pause = self._between
                except UNREACHABLE as error:
                    log.info("progress of %s/%s was not written: %s", metadata["namespace"], metadata["name"], error)
                    pause = max(self._between, waits.after(error))
                    if passing(error) or _conflict(error):  # try again, unless a newer report comes meanwhile
                        self._latest.setdefault(uid, latest)
                await asyncio.sleep(pause)
        finally:
            self._tasks.pop(uid, None)
            self._shown.pop(uid, None)

    async def _write(self, job: Object, document: Progress) -> dict[str, Any]:
        """Write it; if the job changed since it was read, read it once more."""
        try:
            return await write_progress(self._api, job, document, self._storable)
        except ApiError as error:
            if not _conflict(error):
                raise
            metadata = job["metadata"]
            newest = await self._api.get(FINETUNEJOBS.path(metadata["namespace"], metadata["name"]))
            if newest["metadata"]["uid"] != metadata["uid"]:
                raise ApiError(404, "NotFound", "the job is gone, and another one has its name") from error
        return await write_progress(self._api, newest, document, self._storable)

    def _before(self, uid: str, job: Object) -> Progress | None:
        return self._shown.get(uid) or status_of(job).progress

    def close(self) -> None:
        for task in list(self._tasks.values()):
            task.cancel()


def application(senders: Senders, writer: ProgressWriter, metrics: Metrics) -> web.Application:
    """The HTTP application; TLS is the listener's."""

    async def receive(request: web.Request) -> web.Response:
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer" or not token:
            return _answer(metrics, 401, "a bearer token is needed")
        try:
            body = await request.read()
            report = parse(body)
            job, step = await senders.job_of(token.strip())
        except BadReportError as error:
            return _answer(metrics, 400, str(error))
        except UnauthorizedError as error:
            return _answer(metrics, 401, str(error))
        except ForbiddenError as error:
            return _answer(metrics, 403, str(error))
        except UNREACHABLE as error:
            log.warning("a report could not be attributed: %r", error)
            return _answer(metrics, 503, "the API server cannot be reached; report again")
        if report.step and report.step in set(Step):
            step = Step(report.step)
        writer.put(job, step, report)
        return _answer(metrics, 200, "")

    app = web.Application(client_max_size=MAX_BODY)
    app.router.add_post("/{path:.*}", receive)
    return app


def _conflict(error: Exception) -> bool:
    return isinstance(error, ApiError) and error.status == 409


def clock() -> datetime:
    return datetime.now(UTC)


def _answer(metrics: Metrics, status: int, text: str) -> web.Response:
    metrics.reports.labels(str(status)).inc()
    return web.json_response({"message": text} if text else {}, status=status)
