"""The definition of FineTuneJob that the API server serves: whoever upgrades the operator may have left it as it was.

What it does not know of our status is not written: the server would drop unknown fields in silence, visit after visit,
and refuse a status with an unknown word in it, and the job would stand still. It is read from the server's OpenAPI
document, which every client may read.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

from finetune.api import GROUP, KIND, PLURAL, VERSION
from finetune.api.crd import structural
from finetune.api.schema import Model
from finetune.api.spec import FineTuneJobSpec
from finetune.api.status import FineTuneJobStatus
from finetune.controller.cluster.backoff import UNREACHABLE, until_answered
from finetune.controller.cluster.client import ApiError
from finetune.controller.decision.transitions import event_about

log = logging.getLogger(__name__)

_PATH = f"/openapi/v3/apis/{GROUP}/{VERSION}"
_EVERY_SECONDS = 120.0
_NAMED = 10

Schema = Mapping[str, Any]


class Reader(Protocol):
    async def get(self, path: str) -> dict[str, Any]: ...


class Definition:
    """What the server knows of our API; everything, until it is read."""

    def __init__(self, api: Reader) -> None:
        self._api = api
        self._status: Schema = {}
        self.unknown: tuple[str, ...] = ()
        """Fields of spec and status that the server does not know, and words (`status.phase=Queued`)."""

    @property
    def warning(self) -> str:
        """The sentence for whoever has to upgrade it; empty when there is nothing to say."""
        if not self.unknown:
            return ""
        more = f" and {len(self.unknown) - _NAMED} more" if len(self.unknown) > _NAMED else ""
        return (
            f"the definition {PLURAL}.{GROUP} on the API server is older than this operator, and what it does not know "
            f"is not written: {', '.join(self.unknown[:_NAMED])}{more}; apply manifests/crd.yaml, or upgrade the Helm "
            "chart with crd.install"
        )

    def storable(self, status: dict[str, Any]) -> dict[str, Any]:
        """What the server can store of the status."""
        return dict(_fitting(status, self._status) or {})

    async def read(self) -> bool:
        """Read it anew; whether there is another warning than before. Where nobody may read it, all counts as known."""
        get = functools.partial(self._api.get, _PATH)
        try:
            served = _served(await until_answered(get, f"the definition {PLURAL}.{GROUP} cannot be read"))
        except ApiError as error:
            log.info("whether the definition %s.%s is up to date cannot be read: %s", PLURAL, GROUP, error)
            return False
        parts: dict[str, type[Model]] = {"spec": FineTuneJobSpec, "status": FineTuneJobStatus}
        fields = served.get("properties") or {}
        found = (_unknown(structural(model), fields.get(part) or {}, part) for part, model in parts.items())
        before, self.unknown = self.unknown, tuple(path for paths in found for path in paths) if fields else ()
        self._status = fields.get("status") or {}
        if self.unknown != before:
            log.warning(self.warning or f"the definition {PLURAL}.{GROUP} is up to date now")
        return self.unknown != before

    async def read_again(self) -> bool:
        """The same, after a while."""
        await asyncio.sleep(_EVERY_SECONDS)
        try:
            return await self.read()
        except UNREACHABLE as error:
            log.info("the definition %s.%s could not be read: %r", PLURAL, GROUP, error)
            return False


def event(warning: str, namespace: str, lease: str, instance: str) -> dict[str, Any]:
    """The Event that tells an administrator, about the operator's own Lease. The same warning has the same name."""
    about = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "name": lease, "namespace": namespace}
    return event_about(about, warning, "Warning", "DefinitionOutdated", warning, datetime.now(UTC), instance)


def _served(document: Mapping[str, Any]) -> Schema:
    """The schema of FineTuneJob in an OpenAPI document; empty when it is not in there (yet)."""
    wanted = {"group": GROUP, "version": VERSION, "kind": KIND}
    schemas = (document.get("components") or {}).get("schemas") or {}
    return next((item for item in schemas.values() if wanted in item.get("x-kubernetes-group-version-kind", ())), {})


def _unknown(ours: Schema, served: Schema, path: str) -> Iterator[str]:
    """The paths of what the served schema does not know of ours."""
    if _open(served):
        return
    known = served.get("properties") or {}
    for name, field in (ours.get("properties") or {}).items():
        if name in known:
            yield from _unknown(field, known[name], f"{path}.{name}")
        else:
            yield f"{path}.{name}"
    if "items" in ours:
        yield from _unknown(ours["items"], served.get("items") or {}, f"{path}[]")
    for word in ours.get("enum") or ():
        if "enum" in served and word not in served["enum"]:
            yield f"{path}={word}"


def _fitting(value: Any, schema: Schema) -> Any:
    """The value without unknown fields and words; None when nothing is left, or nothing that would be complete."""
    if _open(schema):
        return value
    if "enum" in schema and value not in schema["enum"]:
        return None
    if isinstance(value, list):
        items = (_fitting(item, schema.get("items") or {}) for item in value)
        return [item for item in items if item is not None]
    if not isinstance(value, dict) or "properties" not in schema:
        return value
    fields = {name: _fitting(item, schema["properties"][name]) for name, item in value.items() if _has(schema, name)}
    kept = {name: item for name, item in fields.items() if item is not None}
    incomplete = any(name in value and name not in kept for name in schema.get("required") or ())
    return None if incomplete or (value and not kept) else kept


def _has(schema: Schema, name: str) -> bool:
    return name in schema["properties"]


def _open(schema: Schema) -> bool:
    return not schema or bool(schema.get("x-kubernetes-preserve-unknown-fields"))
