"""The controller's own code (store, decide, apply, reconciler) run against the model server, with crashes and lag."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

from finetune.api import KIND
from finetune.api.contract import OPERATOR_LABEL
from finetune.controller.cluster.apply import Applier
from finetune.controller.cluster.queue import WorkQueue
from finetune.controller.cluster.reconciler import Reconciler
from finetune.controller.cluster.resources import WATCHED
from finetune.controller.cluster.store import Store
from finetune.controller.decision.observed import attempt_of, index_of, stage_of, terminal
from finetune.controller.decision.stages.pod import PodSettings
from tests.simulation.server import Server

KINDS = tuple(resource.kind for resource in WATCHED)
SETTINGS = PodSettings(steps_image="steps:1", train_image="train:1")


class Crash(BaseException):
    """The process dies here."""


class _Bugs(logging.Handler):
    """A decision that raises is a bug; the reconciler survives it, and the simulation must not."""

    def emit(self, record: logging.LogRecord) -> None:
        raise AssertionError(record.getMessage()) from (record.exc_info or (None, None))[1]


logging.getLogger("finetune.controller.cluster.reconciler").addHandler(_Bugs(logging.ERROR))


class Writes:
    """Passes writes on to the server; dies before or after a chosen one."""

    def __init__(self, server: Server, die_at: int | None = None, *, after: bool = False) -> None:
        self._server, self._die_at, self._after = server, die_at, after
        self.count = 0

    async def get(self, path: str) -> dict[str, Any]:
        return await self._server.get(path)

    async def create(self, path: str, body: Any) -> dict[str, Any]:
        if body["kind"] == "Event":
            return dict(body)
        return await self._write(lambda: self._server.create(path, body))

    async def merge(self, path: str, body: Any, manager: str) -> dict[str, Any]:
        return await self._write(lambda: self._server.merge(path, body, manager))

    async def delete(self, path: str, uid: str, grace_seconds: int | None = None) -> None:
        await self._write(lambda: self._server.delete(path, uid, grace_seconds))

    async def _write(self, write: Callable[[], Any]) -> Any:
        self.count += 1
        dying = self.count == self._die_at
        if dying and not self._after:
            raise Crash
        answer = await write()
        if dying:
            raise Crash
        return answer


class Operator:
    """One process of the operator: born with a complete list, fed by one watch for each kind, which may lag."""

    def __init__(
        self, server: Server, writes: Writes | None = None, settings: PodSettings = SETTINGS, name: str | None = None
    ) -> None:
        """With a name it sees only what carries that name in its label, as several operators of one cluster do."""
        self.server = server
        self.writes = writes or Writes(server)
        self.store = Store()
        self._name = name
        for item in server.objects.values():
            self._take_in("ADDED", item)
        self._seen = dict.fromkeys(KINDS, len(server.changes))
        self._reconciler = Reconciler(
            self.store,
            WorkQueue(),
            Applier(self.writes, self.store),
            lambda: settings,
            now=lambda: server.now,
        )

    def watch(self, most: Callable[[], int | None] = lambda: None) -> None:
        """Take in the next changes of each kind; all of them, or at most so many."""
        for kind in KINDS:
            left = most()
            while self._seen[kind] < len(self.server.changes) and left != 0:
                change, item = self.server.changes[self._seen[kind]]
                self._seen[kind] += 1
                if item["kind"] == kind:
                    left = left if left is None else left - 1
                    self._take_in(change, item)

    def _take_in(self, change: str, item: dict[str, Any]) -> None:
        metadata = item["metadata"]
        mine = self._name is None or self._name == metadata.get("labels", {}).get(OPERATOR_LABEL, "")
        if change == "DELETED" or not mine:
            self.store.remove(item["kind"], metadata["namespace"], metadata["name"], metadata["uid"], last=item)
        else:
            self.store.feed(item)

    async def visit(self) -> None:
        for key in self.store.job_keys():
            await self._reconciler.visit(key)
        await self._reconciler.applier.drain()


def finished(server: Server) -> bool:
    return all(job.get("status", {}).get("phase") in ("Complete", "Failed") for job in server.all(KIND))


def check(server: Server) -> None:
    """What must hold at every moment."""
    training = [pod for pod in server.all("Pod") if stage_of(pod) == "train" and not terminal(pod)]
    assert len({attempt_of(pod) for pod in training}) <= 1, "two attempts train at the same time"
    assert len({index_of(pod) for pod in training}) == len(training), "two pods of one index train at the same time"
    running = [pod for pod in server.all("Pod") if "running" in str(pod["status"].get("states")) and not terminal(pod)]
    assert len({pod["metadata"]["labels"]["finetune.dev/job-uid"] for pod in running}) <= 1, "a former job still runs"
    for uid, stage in set(server.succeeded):
        assert server.succeeded.count((uid, stage)) == 1, f"{stage} of {uid} ran again after it was done"


def outcome(server: Server, name: str = "tune") -> dict[str, Any]:
    """The end state, as far as it does not depend on when things happened."""
    status = server.objects[KIND, name]["status"]
    return {
        "phase": status["phase"],
        "conditions": {item["type"]: (item["status"], item["reason"]) for item in status["conditions"]},
        "attempts": {key: status["attempts"][key] for key in ("count", "failures", "preemptions")},
        "history": [(item["stage"], item["number"], item["outcome"]) for item in status["attempts"]["history"]],
        "training": status.get("training"),
        "children": sorted(f"{kind}/{name}" for kind, name in server.objects if kind not in ("Pod", KIND)),
    }


async def run(
    server: Server,
    writes: Writes | None = None,
    settings: PodSettings = SETTINGS,
    *,
    lag: random.Random | None = None,
    script: Callable[[Server, int], None] = lambda server, second: None,
    until: Callable[[Server], bool] = finished,
    seconds: int = 2_000,
) -> None:
    """Let the operator and the cluster run until the jobs are finished; a crashed operator starts again."""
    operator = Operator(server, writes, settings)
    for second in range(seconds):
        script(server, second)
        server.tick()
        check(server)
        operator.watch((lambda: lag.choice((0, 0, 1, 2, 50))) if lag else lambda: None)
        try:
            if lag is None or lag.random() < 0.7:
                await operator.visit()
        except Crash:
            operator = Operator(server, settings=settings)
        check(server)
        if until(server):
            return
        await asyncio.sleep(0)
    raise AssertionError(f"not finished after {seconds} s: {server.all(KIND)}")
