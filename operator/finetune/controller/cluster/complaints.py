"""The warning Events about children: quota, Pod Security, storage and volumes complain in no other way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetune.controller.cluster.store import Key, Store
from finetune.controller.decision.observed import Warned

WARNINGS = {"fieldSelector": "type=Warning"}

_KINDS = ("Job", "Pod", "PersistentVolumeClaim")
_KNOWN_OTHERWISE = ("FailedScheduling", "BackOff", "Failed", "Unhealthy")
"""Reasons whose news the pod's own status brings: not worth the memory."""


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
