"""Leader election on a coordination.k8s.io Lease.

Written here because the client library's own cannot create a Lease, goes on renewing when the work has died, and goes
on working when a renewal hangs. Ours measures with a monotonic clock, limits every call, and answers `leading()` with
no before anybody else can take over.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Protocol

from finetune.controller.cluster.backoff import UNREACHABLE, passing
from finetune.controller.cluster.client import ApiError
from finetune.controller.cluster.resources import LEASES

log = logging.getLogger(__name__)

_SAFETY = 0.8
"""Share of the lease after which a leader that cannot renew stops writing."""


class LeaseApi(Protocol):
    async def get(self, path: str) -> dict[str, Any]: ...
    async def create(self, path: str, body: dict[str, Any]) -> dict[str, Any]: ...
    async def replace(self, path: str, body: dict[str, Any]) -> dict[str, Any]: ...


class Lease:
    """One replica's hold on the lease."""

    def __init__(
        self,
        api: LeaseApi,
        namespace: str,
        name: str,
        identity: str,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api, self._namespace, self._name, self._identity = api, namespace, name, identity
        self._seconds, self._clock = seconds, clock
        self._until = float("-inf")
        self._seen: tuple[str, float] = ("", float("-inf"))

    def leading(self) -> bool:
        """Whether this replica may write now."""
        return self._clock() < self._until

    async def acquire(self) -> None:
        """Wait until this replica leads."""
        while not await self._try():  # noqa: ASYNC110 - it asks a server
            await asyncio.sleep(self._seconds / 6)
        log.info("%s leads", self._identity)

    async def hold(self) -> None:
        """Renew for as long as it works; returns when the lease is lost."""
        while self.leading():
            await asyncio.sleep(self._seconds / 5)
            await self._try()
        log.error("%s lost the lease", self._identity)

    async def release(self) -> None:
        """Let the next one lead at once; to be called after the last write."""
        if not self.leading():
            return
        self._until = float("-inf")
        try:
            async with asyncio.timeout(self._seconds / 3):
                lease = await self._api.get(LEASES.path(self._namespace, self._name))
                if lease["spec"].get("holderIdentity") == self._identity:
                    lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
                    await self._api.replace(LEASES.path(self._namespace, self._name), lease)
        except UNREACHABLE as error:
            log.info("the lease was not released: %r", error)

    async def _try(self) -> bool:
        """One attempt to take or renew the lease."""
        began = self._clock()
        try:
            async with asyncio.timeout(self._seconds / 3):
                won = await self._take()
        except UNREACHABLE as error:
            log.log(logging.INFO if passing(error) else logging.WARNING, "the lease was not renewed: %r", error)
            return False
        if won:
            self._until = began + self._seconds * _SAFETY
        return won

    async def _take(self) -> bool:
        path = LEASES.path(self._namespace, self._name)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        mine = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": max(1, round(self._seconds)),
            "renewTime": now,
        }
        try:
            lease = await self._api.get(path)
        except ApiError as error:
            if error.status != 404:
                raise
            metadata = {"name": self._name, "namespace": self._namespace}
            spec = {**mine, "acquireTime": now, "leaseTransitions": 0}
            await self._api.create(
                LEASES.path(self._namespace),
                {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec},
            )
            return True
        spec = lease["spec"]
        holder = spec.get("holderIdentity") or ""
        if holder not in ("", self._identity) and not self._expired(lease):
            self._until = float("-inf")
            return False
        if holder != self._identity:
            mine |= {"acquireTime": now, "leaseTransitions": int(spec.get("leaseTransitions") or 0) + 1}
        lease["spec"] = {**spec, **mine}
        await self._api.replace(path, lease)
        return True

    def _expired(self, lease: dict[str, Any]) -> bool:
        """Whether the lease stood still for its own duration, by our clock: the holder's clock may be wrong."""
        version = str(lease["metadata"]["resourceVersion"])
        if version != self._seen[0]:
            self._seen = (version, self._clock())
        return self._clock() - self._seen[1] >= float(lease["spec"].get("leaseDurationSeconds") or self._seconds)
