"""The warning Events about children: quota, Pod Security, storage and volumes complain in no other way.

Events carry no labels and kopf watches by nothing else, hence a small watch of our own, narrowed to warnings.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from finetune.controller.observed import Warned
from finetune.controller.resources import EVENTS
from finetune.controller.rest import Api, ApiError
from finetune.controller.store import Key, Store

log = logging.getLogger(__name__)

_KINDS = ("Job", "Pod", "PersistentVolumeClaim")
_KNOWN_OTHERWISE = ("FailedScheduling", "BackOff", "Failed", "Unhealthy")
"""Reasons whose news the pod's own status brings: not worth the memory."""

_WARNINGS = {"fieldSelector": "type=Warning"}


async def follow(
    api: Api, store: Store, namespace: str | None, enqueue: Callable[[Key], None], listed: asyncio.Event
) -> None:
    """List, then watch the warnings of a namespace (or the cluster) for ever; `listed` is set after the first list."""
    path = EVENTS.path(namespace)
    while True:
        try:
            page = await api.get(path, {**_WARNINGS, "resourceVersion": "0"})
            for item in page.get("items") or ():
                take_in(store, item, enqueue)
            version = page["metadata"]["resourceVersion"]
            del page
            listed.set()
            while True:
                async for change in api.watch(path, {**_WARNINGS, "resourceVersion": version}):
                    item = change["object"]
                    if change["type"] == "ERROR":
                        raise ApiError(int(item.get("code", 410)), str(item.get("reason")), str(item.get("message")))
                    version = item["metadata"]["resourceVersion"]
                    if change["type"] in ("ADDED", "MODIFIED"):
                        take_in(store, item, enqueue)
        except (ApiError, OSError, TimeoutError) as error:
            log.info("the watch of Events begins anew: %r", error)
            await asyncio.sleep(1.0)


def take_in(store: Store, item: dict[str, Any], enqueue: Callable[[Key], None]) -> None:
    """One Event: remember it if it may concern a child."""
    about = item.get("involvedObject") or {}
    if about.get("kind") not in _KINDS or item.get("reason") in _KNOWN_OTHERWISE:
        return
    warned = Warned(
        kind=about["kind"],
        name=str(about.get("name", "")),
        uid=str(about.get("uid", "")),
        reason=str(item.get("reason", "")),
        message=str(item.get("message", ""))[:2048],
    )
    if key := store.warn(warned, str(about.get("namespace", ""))):
        enqueue(key)
