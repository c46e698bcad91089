"""Who sent a report: from a bearer token to the FineTuneJob, by the API server's word and owner references only.

Nothing that a pod says about itself is believed, and no name is trusted: the token names a pod and its UID, the pod's
controller is a Job, the Job's controller a FineTuneJob, each checked by UID.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from finetune.api.contract import CONTAINERS, TOKEN_AUDIENCE, Step
from finetune.controller.cluster.client import ApiError
from finetune.controller.cluster.resources import FINETUNEJOBS, JOBS, PODS, TOKEN_REVIEWS, Resource
from finetune.controller.cluster.store import Store
from finetune.controller.decision.observed import Object, container_statuses, job_of_pod, parent_of, terminal

_CACHE_SECONDS = 300.0
_CACHE_SIZE = 10_000
_REVIEWS_AT_ONCE = 8
"""Whoever sends invented tokens keeps the API server no busier than this."""

_NOBODYS = "the pod belongs to no FineTuneJob"
_EXTRA = "authentication.kubernetes.io/"


class UnauthorizedError(Exception):
    """The token is not valid for us."""


class ForbiddenError(Exception):
    """The token is valid, but its bearer has nothing to report."""


class ReviewApi(Protocol):
    async def get(self, path: str) -> dict[str, Any]: ...
    async def create(self, path: str, body: dict[str, Any]) -> dict[str, Any]: ...


@dataclass(frozen=True)
class _Bearer:
    namespace: str
    pod: str
    uid: str


class Senders:
    """Answers whose report it is."""

    def __init__(self, api: ReviewApi, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._api, self._store, self._clock = api, store, clock
        self._reviews = asyncio.Semaphore(_REVIEWS_AT_ONCE)
        self._known: OrderedDict[bytes, tuple[float, _Bearer]] = OrderedDict()

    async def job_of(self, token: str) -> tuple[Object, Step]:
        """The job whose pod holds the token, and the step the pod is at; UnauthorizedError or ForbiddenError else."""
        bearer = await self._review(token)
        pod = await self._object(PODS, bearer.namespace, bearer.pod, bearer.uid)
        if terminal(pod):
            raise ForbiddenError("the pod has ended")
        if (owner := job_of_pod(pod)) is None:
            raise ForbiddenError(_NOBODYS)
        job = await self._object(JOBS, bearer.namespace, *owner)
        if (owner := parent_of(job)) is None:
            raise ForbiddenError(_NOBODYS)
        return await self._object(FINETUNEJOBS, bearer.namespace, *owner), _running_step(pod)

    async def _review(self, token: str) -> _Bearer:
        digest = hashlib.sha256(token.encode()).digest()
        if (known := self._known.get(digest)) and known[0] > self._clock():
            return known[1]
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [TOKEN_AUDIENCE]},
        }
        async with self._reviews:
            status = (await self._api.create(TOKEN_REVIEWS.path(), body)).get("status") or {}
        if not status.get("authenticated") or TOKEN_AUDIENCE not in (status.get("audiences") or ()):
            raise UnauthorizedError("the token is not valid here")
        user = status.get("user") or {}
        extra = {key: (value or [""])[0] for key, value in (user.get("extra") or {}).items()}
        _, _, account = str(user.get("username", "")).partition("system:serviceaccount:")
        pod, uid = extra.get(f"{_EXTRA}pod-name", ""), extra.get(f"{_EXTRA}pod-uid", "")
        if not account or not pod or not uid:
            raise ForbiddenError("the token is not bound to a pod")
        bearer = _Bearer(account.partition(":")[0], pod, uid)
        self._known[digest] = (self._clock() + _CACHE_SECONDS, bearer)
        while len(self._known) > _CACHE_SIZE:
            self._known.popitem(last=False)
        return bearer

    async def _object(self, resource: Resource, namespace: str, name: str, uid: str) -> Object:
        known = self._store.get(resource.kind, namespace, name)
        if known is not None and known["metadata"]["uid"] == uid:
            return known
        try:
            found = await self._api.get(resource.path(namespace, name))
        except ApiError as error:
            if error.status != 404:
                raise
            raise ForbiddenError(f"the {resource.kind} {name} is gone") from error
        if found["metadata"]["uid"] != uid:
            raise ForbiddenError(f"the {resource.kind} {name} is another one")
        return found


def _running_step(pod: Object) -> Step:
    """The step whose container runs; before the kubelet's first word, the first of the pod that has not ended."""
    statuses = container_statuses(pod)
    for wanted in ("running", "waiting"):
        for step, name in CONTAINERS.items():
            if any(status.get("name") == name and wanted in (status.get("state") or {}) for status in statuses):
                return step
    raise ForbiddenError("no step of the pod is running")
