"""Compares the store with the server: once in full before the first decision, then by metadata every so often.

A watch may skip a deletion (kopf's does after each relist) or stand still without an error. What is gone is removed
here; what stays behind is fetched, and when that happens twice in a row the watch counts as dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from finetune.controller.resources import Resource
from finetune.controller.rest import METADATA_ONLY, Api, ApiError, ConfigurationError
from finetune.controller.store import Key, Store

log = logging.getLogger(__name__)

_PAGE = "100"
_TOLERATED_ROUNDS = 2
_GRACE_SECONDS = 3.0
"""A watch that lives brings a change well within this."""


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
    _behind: set[tuple[str, str, str]] = field(default_factory=set)

    async def fill(self) -> None:
        """List everything in full. Until this is done nothing may be decided: an absent child might just be unread."""
        for resource in self.watched:
            for namespace in self.namespaces:
                async for page in self._pages(resource, namespace):
                    for item in page.get("items") or ():
                        self.store.feed({**item, "kind": resource.kind})
            await self._compare(resource)

    async def run(self, seconds: float) -> None:
        """Compare every so often, for ever."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.round()
            except (ApiError, OSError, TimeoutError) as error:
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
            seen: dict[tuple[str, str], tuple[str, int]] = {}
            version = 0
            async for page in self._pages(resource, namespace, METADATA_ONLY):
                version = version or int(page["metadata"]["resourceVersion"])
                for item in page.get("items") or ():
                    metadata = item["metadata"]
                    seen[metadata["namespace"], metadata["name"]] = metadata["uid"], int(metadata["resourceVersion"])
            self.forget_missing(resource, namespace, {uid for uid, _ in seen.values()}, version)
            if self._older(resource, seen):
                await asyncio.sleep(grace)
                for place in self._older(resource, seen):
                    behind.add((resource.kind, *place))
                    await self._fetch(resource, *place)
        return behind

    def forget_missing(self, resource: Resource, namespace: str | None, uids: set[str], version: int) -> None:
        """Remove what a list of that resourceVersion should have held and did not."""
        for place, (uid, known_version) in self.store.versions(resource.kind).items():
            mine = namespace is None or place[0] == namespace
            if mine and known_version <= version and uid not in uids:
                self._tell(self.store.remove(resource.kind, *place, uid=uid))

    def _older(self, resource: Resource, seen: dict[tuple[str, str], tuple[str, int]]) -> list[tuple[str, str]]:
        """What the store has not seen in the version that the server listed."""
        known = self.store.versions(resource.kind)
        return [place for place, (_, newest) in seen.items() if known.get(place, ("", 0))[1] < newest]

    async def _fetch(self, resource: Resource, namespace: str, name: str) -> None:
        with contextlib.suppress(ApiError):
            self._tell(self.store.feed(await self.api.get(resource.path(namespace, name))))

    def _tell(self, key: Key | None) -> None:
        if key is not None:
            self.enqueue(key)

    async def _pages(
        self, resource: Resource, namespace: str | None, accept: str = ""
    ) -> AsyncIterator[dict[str, Any]]:
        """A list, page by page: managedFields and annotations make even the metadata of 1,000 pods a burden."""
        query = {"limit": _PAGE} | ({"labelSelector": resource.selector} if resource.selector else {})
        while True:
            try:
                page = await self.api.get(resource.path(namespace), query, accept=accept)
            except ApiError as error:
                if error.status == 404:
                    raise ConfigurationError(
                        f"the API server does not know {resource.plural}.{resource.group}; "
                        "apply manifests/crd.yaml, or install the Helm chart with crd.install"
                    ) from error
                raise
            yield page
            token = page["metadata"].get("continue")
            if not token:
                return
            query["continue"] = token
