"""Lists and watches of our own, for the kinds that are many: a job's children and their warning Events.

kopf watches FineTuneJobs. A child's event would cost it 2 ms (a worker, a logger, a diff for each object, all unused
here) and ours 0.1 ms; Events cannot be narrowed by kopf at all. After a relist, whatever is missing counts as deleted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from finetune.controller.cluster.backoff import UNREACHABLE, BackOff, passing
from finetune.controller.cluster.client import Api, ApiError

log = logging.getLogger(__name__)

_PAGE = "100"
_SHORT_SECONDS = 1.0
_LONGEST_SECONDS = 10.0
"""The longest pause before a broken watch begins anew: until then its news come with the comparison only."""

Item = dict[str, Any]


async def follow(
    api: Api,
    path: str,
    query: Mapping[str, str],
    see: Callable[[str, Item], None],
    relisted: Callable[[set[str], int], None] = lambda uids, version: None,
    listed: asyncio.Event | None = None,
) -> None:
    """Call `see(change, object)` for everything at the path, for ever.

    After each list `relisted` gets the UIDs that exist and the list's resourceVersion; `listed` is set after the first.
    """
    waits = BackOff(_LONGEST_SECONDS)
    while True:
        try:
            uids: set[str] = set()
            pages = {**query, "limit": _PAGE}
            while True:
                page = await api.get(path, pages)
                for item in page.get("items") or ():
                    uids.add(item["metadata"]["uid"])
                    see("ADDED", item)
                token = page["metadata"].get("continue")
                if not token:
                    break
                pages["continue"] = token
            version = page["metadata"]["resourceVersion"]
            relisted(uids, int(version))
            if listed is not None:
                listed.set()
            while True:
                began = time.monotonic()
                async for change in api.watch(path, {**query, "resourceVersion": version}):
                    item = change["object"]
                    if change["type"] == "ERROR":
                        raise ApiError(int(item.get("code") or 410), str(item.get("reason")), str(item.get("message")))
                    version = item["metadata"]["resourceVersion"]
                    if change["type"] != "BOOKMARK":
                        see(change["type"], item)
                if time.monotonic() - began > _SHORT_SECONDS:
                    waits.reset()
                else:  # a server that ends each watch at once is not asked without a pause
                    await asyncio.sleep(waits.after())
        except UNREACHABLE as error:
            log.log(logging.INFO if passing(error) else logging.WARNING, "the watch of %s begins anew: %r", path, error)
            await asyncio.sleep(waits.after(error))
