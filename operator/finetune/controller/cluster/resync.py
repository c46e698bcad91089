"""Compares the store with the server: once in full before the first decision, then by metadata every so often.

A watch may skip a deletion (kopf's does after each relist) or stand still without an error. What is gone is removed
here; what stays behind is fetched, and when that happens twice in a row the watch counts as dead.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from finetune.controller.cluster.access import ConfigurationError
from finetune.controller.cluster.backoff import UNREACHABLE, BackOff, passing, until_answered
from finetune.controller.cluster.client import METADATA_ONLY, Api, ApiError
from finetune.controller.cluster.resources import Resource
from finetune.controller.cluster.store import Key, Store

log = logging.getLogger(__name__)

_PAGE = "100"
_TOLERATED_ROUNDS = 2
_GRACE_SECONDS = 3.0
"""A watch that lives brings a change well within this."""


Versions = dict[tuple[str, str], tuple[str, int]]
"""UID and resourceVersion of objects, by namespace and name."""

_Read = TypeVar("_Read")


@dataclass
class Resync:
    """The comparison, for one namespace or the whole cluster each."""

    api: Api
    store: Store
    namespaces: tuple[str | None, ...]
    watched: tuple[Resource, ...]
    enqueue: Callable[[Key], None]
    lagging_rounds: int = 0
    rounds: int = 0
    refused: bool = False
    """Whether the last comparison was refused: rights or a definition are missing, and may come back."""

    _behind: set[tuple[str, str, str]] = field(default_factory=set)

    async def fill(self) -> None:
        """List everything in full. Until this is done nothing may be decided: an absent child might just be unread.

        Waits as long as the server cannot answer. Raises ConfigurationError for what no waiting would change."""
        for resource in self.watched:
            try:
                for namespace in self.namespaces:
                    await _anew_when_expired(functools.partial(self._read, resource, namespace))
                await self._compare(resource)
            except ApiError as error:
                raise _final(error, resource) from error

    async def _read(self, resource: Resource, namespace: str | None) -> None:
        """Feed the store with one list."""
        async for page in self._pages(resource, namespace):
            for item in page.get("items") or ():
                self.store.feed({**item, "kind": resource.kind})

    async def run(self, seconds: float) -> None:
        """Compare every so often, for ever."""
        while True:
            await asyncio.sleep(seconds)
            await self.compare()

    async def compare(self) -> None:
        """One comparison, if it is possible now."""
        try:
            await self.round()
            self.refused = False
        except UNREACHABLE as error:
            self.refused = not passing(error)
            log.warning("the store could not be compared with the server: %r", error)

    async def round(self) -> None:
        """One comparison of all kinds."""
        behind: set[tuple[str, str, str]] = set()
        for resource in self.watched:
            behind |= await self._compare(resource, _GRACE_SECONDS)
        again = behind & self._behind
        self.lagging_rounds = self.lagging_rounds + 1 if again else 0
        self._behind = behind
        self.rounds += 1
        if again:
            log.warning("the watches lag behind: %s", sorted(again)[:5])
        if self.rounds % 10 == 0:
            for key in self.store.job_keys():
                self.enqueue(key)

    @property
    def healthy(self) -> bool:
        """Whether the watches bring what happens."""
        return self.lagging_rounds < _TOLERATED_ROUNDS

    async def _compare(self, resource: Resource, grace: float = 0.0) -> set[tuple[str, str, str]]:
        """Remove what is gone, fetch what the watch has not brought within the grace; the latter is returned."""
        behind = set()
        for namespace in self.namespaces:
            seen, version = await _anew_when_expired(functools.partial(self._versions, resource, namespace))
            self.forget_missing(resource, namespace, {uid for uid, _ in seen.values()}, version)
            if self._older(resource, seen):
                await asyncio.sleep(grace)
                for place in self._older(resource, seen):
                    behind.add((resource.kind, *place))
                    await self._fetch(resource, *place)
        return behind

    async def _versions(self, resource: Resource, namespace: str | None) -> tuple[Versions, int]:
        """What one list holds, and its resourceVersion."""
        seen: Versions = {}
        version = 0
        async for page in self._pages(resource, namespace, METADATA_ONLY):
            version = version or int(page["metadata"]["resourceVersion"])
            for item in page.get("items") or ():
                metadata = item["metadata"]
                seen[metadata["namespace"], metadata["name"]] = metadata["uid"], int(metadata["resourceVersion"])
        return seen, version

    def forget_missing(self, resource: Resource, namespace: str | None, uids: set[str], version: int) -> None:
        """Remove what a list of that resourceVersion should have held and did not."""
        for place, (uid, known_version) in self.store.versions(resource.kind).items():
            mine = namespace is None or place[0] == namespace
            if mine and known_version <= version and uid not in uids:
                self._tell(self.store.remove(resource.kind, *place, uid=uid, version=version))

    def _older(self, resource: Resource, seen: Versions) -> list[tuple[str, str]]:
        """What the store has not seen in the version that the server listed."""
        return [
            place for place, (uid, version) in seen.items() if self.store.lacks(resource.kind, *place, uid, version)
        ]

    async def _fetch(self, resource: Resource, namespace: str, name: str) -> None:
        """Read one object, as long as it is in view: whoever lost its label meanwhile is none of ours."""
        query = {"fieldSelector": f"metadata.name={name}", **_selected(resource)}
        read = functools.partial(self.api.get, resource.path(namespace), query)
        for item in (await until_answered(read, f"{resource.kind} {namespace}/{name} cannot be read")).get(
            "items"
        ) or ():
            self._tell(self.store.feed({**item, "kind": resource.kind}))

    def _tell(self, key: Key | None) -> None:
        if key is not None:
            self.enqueue(key)

    async def _pages(
        self, resource: Resource, namespace: str | None, accept: str = ""
    ) -> AsyncIterator[dict[str, Any]]:
        """A list, page by page: managedFields and annotations make even the metadata of 1,000 pods a burden."""
        query = {"limit": _PAGE} | _selected(resource)
        while True:
            list_page = functools.partial(self.api.get, resource.path(namespace), query, accept=accept)
            page = await until_answered(list_page, f"{resource.plural} cannot be listed")
            yield page
            token = page["metadata"].get("continue")
            if not token:
                return
            query["continue"] = token


def _selected(resource: Resource) -> dict[str, str]:
    return {"labelSelector": resource.selector} if resource.selector else {}


async def _anew_when_expired(read: Callable[[], Awaitable[_Read]]) -> _Read:
    """What `read` makes of a list; from its beginning again when the server forgot where we were (410)."""
    waits = BackOff()
    while True:
        try:
            return await read()
        except ApiError as error:
            if error.status != 410:
                raise
            await asyncio.sleep(waits.after(error))


def _final(error: ApiError, resource: Resource) -> ConfigurationError:
    """The sentence for a list that the server will not give, however often it is asked."""
    name = f"{resource.plural}.{resource.group}".rstrip(".")
    if error.status == 404:
        remedy = "apply manifests/crd.yaml, or install the Helm chart with crd.install"
        return ConfigurationError(f"the API server does not know {name}; {remedy}")
    if error.status == 401:
        return ConfigurationError(f"the API server does not accept the operator's credentials: {error.message}")
    remedy = "; the Helm chart's RBAC (rbac.create) allows it" if error.status == 403 else ""
    return ConfigurationError(f"{name} cannot be listed: {error}{remedy}")
