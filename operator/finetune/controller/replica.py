"""One replica of the operator: its parts, and the order in which they start and stop.

Every replica watches, serves health and receives progress; the one that holds the lease also decides. Whatever ends
first ends the process: a replica that lost its lease or its watch starts anew instead of limping on.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from finetune.api import KIND
from finetune.controller.cluster import complaints, definition
from finetune.controller.cluster.apply import Applier
from finetune.controller.cluster.client import Api
from finetune.controller.cluster.lease import Lease
from finetune.controller.cluster.patience import Patience
from finetune.controller.cluster.queue import WorkQueue
from finetune.controller.cluster.reconciler import Reconciler
from finetune.controller.cluster.resources import EVENTS, FINETUNEJOBS, Resource, watched
from finetune.controller.cluster.resync import Resync
from finetune.controller.cluster.store import Key, Store
from finetune.controller.cluster.watches import follow
from finetune.controller.decision.observed import over
from finetune.controller.decision.stages.pod import PodSettings
from finetune.controller.serving import health, progress
from finetune.controller.serving.metrics import Metrics
from finetune.controller.serving.senders import Senders
from finetune.controller.serving.trust import Trust
from finetune.controller.settings import Settings

log = logging.getLogger(__name__)

_DRAIN_SECONDS = 20.0
_LOST = "the lease was lost before the first decision"

Watch = Callable[["Replica", asyncio.Event], Coroutine[Any, Any, None]]
"""Runs the watches until the event is set; each change goes to `Replica.saw`."""


class Replica:
    """The parts, wired."""

    def __init__(self, settings: Settings, api: Api, of_lease: Api) -> None:
        """`of_lease` has connections of its own: a renewal waits for no other request."""
        self.settings = settings
        self.api = api
        self.store = Store()
        self.queue = WorkQueue()
        self.metrics = Metrics()
        self.lease = Lease(of_lease, settings.namespace, settings.lease, settings.identity, settings.lease_seconds)
        self.trust = Trust(api, settings.namespace, settings.ca_secret, _hosts(settings), self.lease.leading)
        self.watched = watched(settings.operator)
        self.resync = Resync(api, self.store, settings.namespaces or (None,), self.watched, self.enqueue)
        self.patience = Patience()
        self.definition = definition.Definition(api)
        self.applier = Applier(api, self.store, settings.identity, self.lease.leading, self.definition.storable)
        self.reconciler = Reconciler(
            self.store, self.queue, self.applier, self._pod_settings, self.metrics.reconcile_seconds.observe
        )
        self.writer = progress.ProgressWriter(api, self.store, now=progress.clock, storable=self.definition.storable)
        self._deciding = False
        self._filled = False
        api.counted = self.metrics.count_write
        self.metrics.show(self.store, lambda: len(self.queue), self.lease.leading, lambda: len(self.definition.unknown))
        self.health = health.Health(
            watching=lambda: self.resync.healthy,
            waiting=lambda: len(self.queue),
            last_visit=lambda: self.reconciler.last_visit,
            leading=self.lease.leading,
            notes=lambda: [self.definition.warning] if self.definition.warning else [],
            not_ready={
                "the lists of the watched kinds": lambda: not self._filled,
                "the watch of FineTuneJobs": lambda: bool(self.patience.trouble),
                "the comparison with the server": lambda: self.resync.refused,
                "the progress service's certificate": lambda: self._reporting and not self.trust.ready.is_set(),
            },
        )

    def saw(self, kind: str, change: str | None, item: dict[str, Any]) -> None:
        """A watch brought something: remember it, and visit the job it concerns."""
        metadata = item["metadata"]
        if change == "DELETED":
            key = self.store.remove(kind, metadata["namespace"], metadata["name"], metadata["uid"], last=item)
        else:
            key = self.store.feed({**item, "kind": kind})
        if key is not None:
            self.enqueue(key, news=change != "DELETED" and kind != KIND and not over({**item, "kind": kind}))

    def enqueue(self, key: Key, *, news: bool = False) -> None:
        """Visit the job, if this replica decides; after others, when there is nothing but news of it."""
        if self._deciding:
            self.queue.add(key, news=news)

    async def run(self, watch: Watch, stop: asyncio.Event) -> None:
        """Until `stop` is set or some part ends."""
        async with contextlib.AsyncExitStack() as servers:
            await servers.enter_async_context(
                _serve(health.application(self.health, self.metrics), self.settings.http_port)
            )
            if self._reporting:
                senders = Senders(self.api, self.store)
                app = progress.application(senders, self.writer, self.metrics)
                await servers.enter_async_context(_serve(app, self.settings.progress_port, self.trust.context))
            await self._run_tasks(watch, stop)

    async def _run_tasks(self, watch: Watch, stop: asyncio.Event) -> None:
        watches_stop = asyncio.Event()
        tasks = self.health.tasks
        listed = [asyncio.Event() for _ in self._followed()]
        for (resource, namespace), event in zip(self._followed(), listed, strict=True):
            name = f"{resource.plural} of {namespace or 'the cluster'}"
            tasks[name] = asyncio.create_task(self._follow(resource, namespace, event))
        tasks["the definition"] = asyncio.create_task(self._compare_definition())
        if self._reporting:
            tasks["trust"] = asyncio.create_task(self.trust.run())
        tasks["decisions"] = asyncio.create_task(self._decide(listed))
        # kopf cancels whatever started after it: it comes last, and is told to stop last.
        tasks["watches"] = asyncio.create_task(watch(self, watches_stop))
        stopping = asyncio.create_task(_wait(stop))
        try:
            done, _ = await asyncio.wait({stopping, *tasks.values()}, return_when=asyncio.FIRST_COMPLETED)
            failures = [task.exception() for task in done if task is not stopping and not task.cancelled()]
        finally:
            await self._stop(tasks, watches_stop)
            stopping.cancel()
        for failure in failures:
            if failure is not None:
                raise failure

    def _followed(self) -> list[tuple[Resource, str | None]]:
        kinds = (*(resource for resource in self.watched if resource.kind != FINETUNEJOBS.kind), EVENTS)
        return [(resource, namespace) for resource in kinds for namespace in self.resync.namespaces]

    async def _follow(self, resource: Resource, namespace: str | None, listed: asyncio.Event) -> None:
        path = resource.path(namespace)
        if resource is EVENTS:
            warn = functools.partial(complaints.take_in, self.store, enqueue=functools.partial(self.enqueue, news=True))
            await follow(self.api, path, complaints.WARNINGS, lambda change, item: warn(item), listed=listed)
        else:
            query = {"labelSelector": resource.selector}
            see = functools.partial(self.saw, resource.kind)
            relisted = functools.partial(self.resync.forget_missing, resource, namespace)
            await follow(self.api, path, query, see, relisted, listed)

    async def _compare_definition(self) -> None:
        """Notice, for ever, when somebody upgrades the definition, or takes a step back."""
        while True:
            if await self.definition.read_again():
                self._tell_of_definition()

    def _tell_of_definition(self) -> None:
        if self.lease.leading() and (warning := self.definition.warning):
            settings = self.settings
            self.applier.post(definition.event(warning, settings.namespace, settings.lease, settings.identity))

    async def _decide(self, listed: list[asyncio.Event]) -> None:
        """Lead: list everything, then let the workers decide; returns when the lease is lost."""
        await self.resync.fill()
        await self.definition.read()
        self._filled = True
        resync = asyncio.create_task(self.resync.run(self.settings.resync_seconds))
        workers: list[asyncio.Task[None]] = []
        try:
            await self._unless_ended(self.lease.acquire(), resync, "the comparison with the server ended")
            hold = asyncio.create_task(self.lease.hold())
            try:
                if self._reporting:
                    await self._unless_ended(self.trust.ready.wait(), hold, _LOST)
                for event in listed:
                    await self._unless_ended(event.wait(), hold, _LOST)
                # The former leader may have written a moment ago: what it wrote must be known before the first visit.
                await self._unless_ended(self.resync.fill(), hold, _LOST)
                self._tell_of_definition()
                self._deciding = True
                for key in self.store.job_keys():
                    self.enqueue(key)
                visit = self.reconciler.visit
                workers += [asyncio.create_task(self.queue.work(visit)) for _ in range(self.settings.workers)]
                ended, _ = await asyncio.wait({hold, resync, *workers}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                self._deciding = False
                self.queue.close()
                if workers:
                    await asyncio.wait(workers, timeout=_DRAIN_SECONDS)
                await self.applier.drain()
                hold.cancel()
                await asyncio.shield(self.lease.release())
            for task in ended:
                task.result()
        finally:
            for task in (resync, *workers):
                task.cancel()

    @staticmethod
    async def _unless_ended(work: Awaitable[object], guard: asyncio.Task[None], what: str) -> None:
        """Wait for the work, or for the end of what it needs: then raise its error, or `what` as one."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, guard}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                guard.result()
                raise RuntimeError(what)
            task.result()
        finally:
            task.cancel()  # a replica that is stopped must not win the lease a moment later

    async def _stop(self, tasks: dict[str, asyncio.Task[None]], watches_stop: asyncio.Event) -> None:
        """Finish the visits under way, release the lease, then stop watching."""
        tasks["decisions"].cancel()
        await asyncio.wait({tasks["decisions"]}, timeout=_DRAIN_SECONDS + 10)
        self.writer.close()
        watches_stop.set()
        await asyncio.wait({tasks["watches"]}, timeout=10)
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)

    @property
    def _reporting(self) -> bool:
        return bool(self.settings.progress_url)

    def _pod_settings(self) -> PodSettings:
        settings = self.settings
        return PodSettings(
            steps_image=settings.steps_image,
            train_image=settings.train_image,
            image_pull_policy=settings.image_pull_policy,
            image_pull_secrets=settings.image_pull_secrets,
            hf_endpoint=settings.hf_endpoint,
            force_delete=settings.force_delete,
            progress_url=settings.progress_url,
            progress_ca=self.trust.bundle,
        )


def _hosts(settings: Settings) -> tuple[str, ...]:
    host = urlsplit(settings.progress_url).hostname or "localhost"
    return tuple(dict.fromkeys((host, "localhost")))


async def _wait(stop: asyncio.Event) -> None:
    await stop.wait()


@contextlib.asynccontextmanager
async def _serve(app: web.Application, port: int, context: Any = None) -> Any:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, port=port, ssl_context=context).start()
        yield
    finally:
        await runner.cleanup()
