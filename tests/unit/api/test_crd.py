import json
from pathlib import Path

import yaml

from finetune.api.crd import MUTABLE, crd

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


def test_everything_but_the_mutable_fields_is_frozen_after_the_start():
    frozen = {
        field
        for rule in schema()["x-kubernetes-validations"]
        for field in schema()["properties"]["spec"]["properties"]
        if f"self.spec.{field} ==" in rule["rule"]
    }
    assert frozen == set(schema()["properties"]["spec"]["properties"]) - set(MUTABLE)
