"""Specs that are nearly right: every field of the CRD's schema, changed in every way that its type suggests.

Two valid jobs between them have (nearly) every field; what neither has is put in. The order is always the same.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from finetune.api.crd import crd
from tests.integration.bad_specs import GOOD
from tests.merge_patch import merged

Path = tuple[str | int, ...]
MISSING = object()

ADDED: dict[str, Any] = {
    "layout": "Staged",
    "model": {"revision": "main", "chatTemplate": {"text": "{{ messages }}"}},
    "credentials": [{"secretName": "hub"}, {"secretName": "store"}],
    "tokens": {"add": [{"content": "<think>", "init": {"copyOf": "<s>"}}, {"content": "</think>"}]},
    "dataset": {
        "sources": [
            {"uri": "hf://datasets/org/data", "split": "train[:100]", "weight": 1.0, "maxRepeats": 2},
            {"uri": "pvc://data/rows.jsonl", "format": "Messages", "fileFormat": "JSONL", "weight": 2.0},
        ],
        "validation": {"fraction": 0.1, "duplicates": "Kept"},
        "maxLength": 512,
        "packing": "Enabled",
        "buckets": 4,
    },
    "training": {
        "epochs": 2,
        "nodes": 2,
        "batchSize": 4,
        "learningRate": 1e-5,
        "evaluateEverySteps": 10,
        "nodeSelector": {"gpu": "big"},
        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "priorityClassName": "low",
        "resources": {"limits": {"nvidia.com/gpu": "1", "memory": "8Gi"}, "requests": {"cpu": "2"}},
        "checkpoint": {"everySteps": 5, "keep": 3},
    },
    "prepare": {"nodeSelector": {"pool": "cpu"}, "resources": {"limits": {"memory": "4Gi"}}},
    "workspace": {"size": "5Gi", "storageClassName": "fast", "accessModes": ["ReadWriteMany"]},
    "cache": {"claimName": "shared"},
    "output": {"uri": "pvc://models/out", "format": "Merged"},
    "retry": {"limit": 5},
    "suspend": False,
    "activeDeadlineSeconds": 3600,
    "ttlSecondsAfterFinished": 60,
}
LEARNED: dict[str, Any] = {
    "tokens": {"add": None, "learn": {"source": {"uri": "hf://datasets/org/corpus"}, "size": 64}},
    "dataset": {
        "sources": [{"uri": "pvc://data/pairs.jsonl"}],
        "validation": {"source": {"uri": "pvc://data/v.jsonl"}},
    },
    "training": {"objective": "Preference", "method": "LoRA", "lora": {"rank": 8}},
    "output": {"uri": "pvc://models/adapter", "format": "Adapter"},
}
_PAIRS = 900
_TEXTS = ("", " ", "x" * 5000, "ü\u202e\U0001f600", "../..", "{{ x }}", "a\nb", "-", "0", "null")
_NUMBERS = (0, -1, 1, 2**31, 2**63 - 1, 0.5, 1e300)
_OTHERS: Mapping[str, tuple[Any, ...]] = {
    "string": (7, True, [], {}),
    "integer": ("7", True, [], {}, 1.5),
    "number": ("7", True, [], {}),
    "boolean": ("true", 1, [], {}),
    "array": ("x", 1, {}, True),
    "object": ("x", 1, [], True),
}


class Mutation(NamedTuple):
    """One job, and the fields in it that are not as they were."""

    name: str
    job: dict[str, Any]
    fields: tuple[str, ...]


BASES = [merged(GOOD, {"spec": ADDED}), merged(GOOD, {"spec": LEARNED}), GOOD]
"""The jobs that are mutated; a field that stands in none of them is put into the last."""


def mutations() -> list[Mutation]:
    """All of them: each field by itself, and many pairs."""
    schema = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    singles: dict[str, tuple[dict[str, Any], Path, Any]] = {}
    for base in BASES:
        for path, value in _changes(schema, base["spec"], ("spec",)):
            if _stands(base, path[:-1]) or base is BASES[-1]:
                singles.setdefault(f"{path}={value!r}", (base, path, value))
    found = [_made(base, [(path, value)]) for base, path, value in singles.values()]
    rng = random.Random(12)
    of_base = [[item for item in singles.values() if item[0] is base] for base in BASES]
    for _ in range(_PAIRS):
        (base, *one), (_, *other) = rng.sample(rng.choice(of_base), 2)
        found.append(_made(base, [tuple(one), tuple(other)]))
    return found


def _stands(document: Any, path: Path) -> bool:
    """Whether there is something at the path."""
    for step in path:
        there = step < len(document) if isinstance(document, list) else isinstance(document, dict) and step in document
        if not there:
            return False
        document = document[step]
    return True


def _made(base: dict[str, Any], changes: list[Any]) -> Mutation:
    job = copy.deepcopy(base)
    job["metadata"]["name"] = "mutant"
    for path, value in changes:
        _put(job, path, value)
    name = " and ".join(f"{_text(path)}={_short(value)}" for path, value in changes)
    return Mutation(name, job, tuple(_text(path) for path, _ in changes))


def _put(document: Any, path: Path, value: Any) -> None:
    """Set or remove what lies there; whatever stands in the way of the path is replaced."""
    for step, following in itertools.pairwise(path):
        empty: Any = [] if isinstance(following, int) else {}
        if isinstance(step, int):
            document.extend(copy.deepcopy(empty) for _ in range(step + 1 - len(document)))
        there = document[step] if isinstance(step, int) else document.get(step)
        if not isinstance(there, type(empty)):
            document[step] = empty
        document = document[step]
    last = path[-1]
    if isinstance(last, int):
        document[last : last + 1] = [] if value is MISSING else [copy.deepcopy(value)]
    elif value is MISSING:
        document.pop(last, None)
    else:
        document[last] = copy.deepcopy(value)


def _changes(schema: Mapping[str, Any], value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """What may be done to a field, and to everything below it."""
    yield path, MISSING
    yield path, None
    kind = schema.get("type", "string")
    yield from ((path, other) for other in _OTHERS[kind])
    if "enum" in schema:
        first = str(schema["enum"][0])
        yield from ((path, other) for other in (*schema["enum"], first.lower(), f"{first}s", ""))
    elif kind in ("integer", "number"):
        bounds = [schema[key] for key in ("minimum", "maximum") if key in schema]
        near = [bound + step for bound in bounds for step in (-1, 0, 1)]
        yield from ((path, number) for number in dict.fromkeys((*_NUMBERS, *near)))
    elif kind == "string":
        limits = [schema[key] + step for key in ("minLength", "maxLength") if key in schema for step in (-1, 0, 1)]
        yield from ((path, text) for text in (*_TEXTS, *("a" * max(0, limit) for limit in limits)))
        if isinstance(value, str):
            yield from ((path, text) for text in (value.upper(), f" {value}", f"{value}/", value[:-1], value + value))
    elif kind == "boolean":
        yield from ((path, flag) for flag in (True, False))
    elif kind == "array":
        items = value if isinstance(value, list) else []
        yield path, []
        if items:
            yield path, [*items, items[0]]
            yield path, [items[0]] * (int(schema.get("maxItems", 40)) + 1)
        yield from _changes(schema["items"], items[0] if items else None, (*path, 0))
    elif kind == "object":
        yield (*path, "notAField"), 1
        inner = value if isinstance(value, dict) else {}
        for name, child in schema.get("properties", {}).items():
            yield from _changes(child, inner.get(name), (*path, name))
        if isinstance(values := schema.get("additionalProperties"), dict):
            yield from (((*path, key), "x") for key in ("", "a b", "x" * 300, "ok"))
            key = next(iter(inner), "key")
            yield from _changes(values, inner.get(key), (*path, key))


def _text(path: Path) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)[1:]


def _short(value: Any) -> str:
    text = "missing" if value is MISSING else repr(value)
    return text if len(text) < 40 else f"{text[:30]}... ({len(text)})"
