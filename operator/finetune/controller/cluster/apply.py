"""Carries out a decision: the status first, then children, suspensions and deletions; every answer feeds the store.

The order makes a crash harmless: what status says happens next is decided again from what exists.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from finetune.api.contract import JOB_LABEL, SUSPENDED_LABEL
from finetune.api.status import Progress
from finetune.controller.cluster.backoff import until_answered
from finetune.controller.cluster.client import ApiError
from finetune.controller.cluster.patch import merge_patch
from finetune.controller.cluster.resources import BY_KIND, CLAIMS, EVENTS, FINETUNEJOBS, PODS
from finetune.controller.cluster.store import Store, job_of
from finetune.controller.decision.decide import Child, Decision, document
from finetune.controller.decision.observed import Object, Observed, condition_of, owner_uid, status_of
from finetune.controller.decision.stages import waits, workspace
from finetune.controller.decision.stages.signals import NODE_LOST
from finetune.controller.decision.transitions import event, transitions

FIELD_MANAGER = waits.MANAGER
"""Owner of everything in a FineTuneJob's status but the live progress."""

PROGRESS_MANAGER = "finetune-progress"
"""Owner of `status.progress`: any replica may receive a pod's report and write it."""

_DENIED = " denied "
"""Webhooks deny `the request`, admission policies `request`."""

_DRAIN_SECONDS = 5.0
_EVENTS_AT_ONCE = 4
"""Events wait for one another, not status writes for Events, where a webhook makes them slow."""
_EVENTS_WAITING = 1000
_EVENT_SECONDS = 300.0


Storable = Callable[[dict[str, Any]], dict[str, Any]]
"""What the served definition can store of a status."""


def as_it_is(status: dict[str, Any]) -> dict[str, Any]:
    """All of it."""
    return status


class NotLeadingError(Exception):
    """The lease is lost: not one more write."""


class Writer(Protocol):
    """The writes that a decision needs; the API client, or a model of the server in the simulation."""

    async def get(self, path: str) -> dict[str, Any]: ...
    async def create(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]: ...
    async def merge(self, path: str, body: Mapping[str, Any], manager: str) -> dict[str, Any]: ...
    async def delete(self, path: str, uid: str, grace_seconds: int | None = None) -> None: ...


@dataclass(frozen=True)
class Applied:
    """What the server said against it; the decision is then made again with that knowledge."""

    conflict: str = ""
    """Why a child could not be created, as a sentence. It may pass."""

    refused: str = ""
    """Why it never will be."""

    found: bool = False
    """A child was there already, and nobody had told us."""

    @property
    def again(self) -> bool:
        return bool(self.conflict or self.refused or self.found)


@dataclass
class Applier:
    """Writes decisions of one replica, as long as it leads."""

    api: Writer
    store: Store
    identity: str = ""
    leading: Callable[[], bool] = lambda: True
    storable: Storable = as_it_is

    _told: set[asyncio.Task[None]] = field(default_factory=set)
    _turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_EVENTS_AT_ONCE))

    async def apply(self, observed: Observed, decision: Decision) -> Applied:
        """Carry the decision out. Raises ApiError when the server cannot be reached or the job changed meanwhile."""
        job = observed.job
        for child, change in decision.keep:
            self._check()
            path = BY_KIND[child.kind].path(observed.namespace, child.name)
            self.store.feed(await self.api.merge(path, {"metadata": {"uid": child.uid, **change}}, FIELD_MANAGER))
        if decision.status is not None:
            job = await self._write_status(observed, decision)
        if decision.progress is not None:
            self._check()
            self.store.feed(await write_progress(self.api, job, decision.progress, self.storable))
        for child, wanted in decision.suspend:
            self._check()
            path = BY_KIND[child.kind].path(observed.namespace, child.name)
            labels = {SUSPENDED_LABEL: "true" if wanted else None}
            body = {"metadata": {"uid": child.uid, "labels": labels}, "spec": {"suspend": wanted}}
            self.store.feed(await self.api.merge(path, body, FIELD_MANAGER))
        for child in decision.force:
            await self._remove_by_force(observed, child)
        for child in decision.delete:
            self._check()
            await self.api.delete(BY_KIND[child.kind].path(observed.namespace, child.name), child.uid)
        found = False
        for body in decision.create:
            applied = await self._create(observed, body)
            if applied.conflict or applied.refused:
                return applied
            found |= applied.found
        return Applied(found=found)

    async def _remove_by_force(self, observed: Observed, pod: Child) -> None:
        """What Kubernetes itself does to pods of machines that are out of service: said to have failed, then removed.
        The Job controller counts the pod as disrupted and lets it go; its finalizer is left to it."""
        self._check()
        path = PODS.path(observed.namespace, pod.name)
        shown = await self.api.get(path)
        conditions = (shown.get("status") or {}).get("conditions") or []
        if not condition_of(shown, "DisruptionTarget"):
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            said = "the machine is lost, and spec.training.onNodeLost is ForceDelete"
            disrupted = {"type": "DisruptionTarget", "status": "True", "reason": NODE_LOST, "message": said}
            conditions = [*conditions, disrupted | {"lastTransitionTime": now}]
        metadata = {"uid": pod.uid, "resourceVersion": shown["metadata"]["resourceVersion"]}
        body = {"metadata": metadata, "status": {"phase": "Failed", "conditions": conditions}}
        self.store.feed(await self.api.merge(f"{path}/status", body, FIELD_MANAGER))
        self._check()
        await self.api.delete(path, pod.uid, grace_seconds=0)

    async def _write_status(self, observed: Observed, decision: Decision) -> Object:
        assert decision.status is not None
        self._check()
        before = observed.status
        patch = merge_patch(self.storable(document(before)), self.storable(document(decision.status)))
        if not patch:
            return observed.job
        written = await _merge_status(self.api, observed.job, patch, FIELD_MANAGER)
        self.store.feed(written)
        for transition in transitions(before, decision.status):
            self.post(event(observed, transition, datetime.now(UTC), self.identity))
        return written

    async def _create(self, observed: Observed, body: dict[str, Any]) -> Applied:
        self._check()
        resource, name = BY_KIND[body["kind"]], body["metadata"]["name"]
        try:
            self.store.feed(await self.api.create(resource.path(observed.namespace), body))
            return Applied()
        except ApiError as error:
            if error.status != 409 or error.reason != "AlreadyExists":
                return _refusal(error, f"{body['kind']} {name}")
        try:
            existing = await self.api.get(resource.path(observed.namespace, name))
        except ApiError as error:
            if error.status != 404:
                raise
            return Applied(conflict=f"waiting for {body['kind']} {name} to be gone")
        if _made_for(existing) == observed.uid and "deletionTimestamp" not in existing["metadata"]:
            if job_of(existing) != (observed.namespace, observed.name):
                label = f"{JOB_LABEL}={observed.name}"
                return Applied(conflict=f"the {body['kind']} {name} has lost its label {label}: put it back")
            return Applied(found=self.store.feed(existing) is not None)
        whose = "of the former job of this name" if _made_for(existing) else "that is not the operator's"
        return Applied(conflict=f"waiting for {body['kind']} {name} {whose} to be gone")

    def _check(self) -> None:
        if not self.leading():
            raise NotLeadingError

    def post(self, body: dict[str, Any]) -> None:
        """Post an Event beside the work, which does not wait for it. News that nobody took for long is dropped."""
        if len(self._told) >= _EVENTS_WAITING:
            return
        about = body["involvedObject"]
        create = functools.partial(self.api.create, EVENTS.path(about["namespace"]), body)
        what = f"{about['namespace']}/{about['name']}: an Event is not posted yet"

        async def post() -> None:
            # Told already (409), or the namespace goes (403, 404).
            with contextlib.suppress(ApiError, TimeoutError):
                async with asyncio.timeout(_EVENT_SECONDS), self._turns:
                    await until_answered(create, what)

        task = asyncio.get_running_loop().create_task(post())
        self._told.add(task)
        task.add_done_callback(self._told.discard)

    async def drain(self) -> None:
        """Wait until the Events are posted, within reason: they are news, not state."""
        if self._told:
            _, late = await asyncio.wait(self._told, timeout=_DRAIN_SECONDS)
            for task in late:
                task.cancel()


def _made_for(existing: Object) -> str | None:
    """The UID of the job that an object was made for; a claim may outlive that job and then has no owner."""
    return workspace.made_for(existing) if existing["kind"] == CLAIMS.kind else owner_uid(existing)


def _refusal(error: ApiError, child: str) -> Applied:
    """What a refused create means; raises the error when it is not about the child.

    An admission plug-in (quota, limits, a webhook, a policy) may think otherwise later, whatever its status code, and
    a webhook that cannot be asked (500) may come back. What the API itself finds wrong with the object stays wrong."""
    if error.status in (403, 409, 500) or _DENIED in error.message:
        return Applied(conflict=f"the {child} cannot be created: {error.message}")
    if error.status in (400, 413, 422):
        return Applied(refused=f"the server does not accept the {child}: {error.message}")
    raise error


async def write_progress(api: Writer, job: Object, progress: Progress, storable: Storable = as_it_is) -> dict[str, Any]:
    """Write `status.progress`, and nothing else, of that very job."""
    shown = status_of(job).progress
    before, after = (
        storable({"progress": item.wire()} if item else {}).get("progress", {}) for item in (shown, progress)
    )
    patch = merge_patch(before, after)
    return await _merge_status(api, job, {"progress": patch}, PROGRESS_MANAGER)


async def _merge_status(api: Writer, job: Object, patch: dict[str, Any], manager: str) -> dict[str, Any]:
    """Merge into the status of the very object that was read; anything else there is a conflict.

    Only the resourceVersion can say so: on the status of a custom resource, the server ignores a UID in the body, and
    a job that was deleted and applied again would inherit the status of its predecessor. What the patch does not name
    stays, whoever wrote it: the other writer's part, and fields that only a newer operator knows.
    """
    metadata = job["metadata"]
    path = FINETUNEJOBS.path(metadata["namespace"], metadata["name"], "status")
    body = {"metadata": {"resourceVersion": metadata["resourceVersion"]}, "status": patch}
    return await api.merge(path, body, manager)
