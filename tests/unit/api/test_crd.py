import json
from pathlib import Path

import yaml

from finetune.api.crd import MENDABLE, MUTABLE, crd

ROOT = Path(__file__).parents[3]
LAST_APPLIED_LIMIT = 262_144
"""Bytes of annotations: client-side apply keeps the whole object in one."""


def schema():
    return crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def nodes(node, path=""):
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    if "items" in node:
        yield from nodes(node["items"], f"{path}[]")


def test_the_manifest_is_what_the_models_say():
    assert yaml.safe_load((ROOT / "manifests/crd.yaml").read_text()) == crd(), "stale: run `make generate`"


def test_client_side_apply_has_room_for_it():
    assert len(json.dumps(crd())) < LAST_APPLIED_LIMIT


def test_every_field_has_a_description():
    bare = [path for path, node in nodes(schema()) if path and "description" not in node and path.count(".") > 1]
    assert not [path for path in bare if path not in (".apiVersion", ".kind", ".metadata") and not path.endswith("[]")]


def test_every_list_and_text_of_the_spec_is_bounded():
    unbounded = [
        path
        for path, node in nodes(schema()["properties"]["spec"])
        if (node.get("type") == "array" and "maxItems" not in node)
        or (node.get("type") == "string" and "maxLength" not in node and "enum" not in node)
        or (node.get("type") == "integer" and "maximum" not in node and "enum" not in node)
    ]
    assert unbounded == []


def test_every_field_is_mutable_mendable_or_frozen_after_the_start():
    bound = {}
    for rule in schema()["x-kubernetes-validations"][1:]:
        path = rule["message"].split()[0].removeprefix("spec.")
        assert f"self.spec.{path}" in rule["rule"]
        bound[path] = "oldSelf.status.phase in" in rule["rule"]
    assert {path for path, mendable in bound.items() if mendable} == set(MENDABLE)

    def unbound(node, parent=""):
        """The fields that no rule binds, as a whole or in all of their parts."""
        for name, child in node["properties"].items():
            path = f"{parent}{name}"
            if any(other.startswith(f"{path}.") for other in (*bound, *MUTABLE)):
                yield from unbound(child, f"{path}.")
            elif path not in bound:
                yield path

    assert set(unbound(schema()["properties"]["spec"])) == set(MUTABLE)
