"""The CRD's own rules, evaluated here: a job is told what the API server would say before anything is sent.

The rules are read from the generated schema, so that there is one list of them. Rules about changes (`oldSelf`) need
the object in the cluster and are left to the server.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from finetune.api.crd import crd
from finetune.api.schema import RULES


class Broken(NamedTuple):
    """A rule that does not hold."""

    path: tuple[str | int, ...]
    message: str


def schema() -> dict[str, Any]:
    """The schema of a whole FineTuneJob."""
    root: dict[str, Any] = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return root


def broken(document: dict[str, Any]) -> list[Broken]:
    """Every rule that the document, with its defaults filled in, breaks."""
    return list(_broken(schema(), document, ()))


def _broken(node: dict[str, Any], value: Any, path: tuple[str | int, ...]) -> Iterator[Broken]:
    import cel  # slow to import, and only needed to check

    for rule in node.get(RULES, ()):
        if "oldSelf" not in rule["rule"] and cel.evaluate(rule["rule"], {"self": value}) is not True:
            yield Broken(path, rule["message"])
    if isinstance(value, dict):
        for name, child in value.items():
            below = node.get("properties", {}).get(name) or node.get("additionalProperties")
            if isinstance(below, dict):
                yield from _broken(below, child, (*path, name))
    elif isinstance(value, list):
        yield from _duplicates(node, value, path)
        for index, child in enumerate(value):
            yield from _broken(node["items"], child, (*path, index))


def _duplicates(node: dict[str, Any], items: list[Any], path: tuple[str | int, ...]) -> Iterator[Broken]:
    """What `x-kubernetes-list-type: map` refuses."""
    keys = node.get("x-kubernetes-list-map-keys", ())
    seen: set[tuple[str, ...]] = set()
    for index, item in enumerate(items if keys else ()):
        identity = tuple(str(item.get(key)) for key in keys)
        if identity in seen:
            yield Broken((*path, index), f"{', '.join(identity)!r} is listed twice")
        seen.add(identity)
