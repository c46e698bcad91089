"""The CustomResourceDefinition, generated from the pydantic models (`make generate` writes manifests/crd.yaml)."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from finetune.api import GROUP, KIND, PLURAL, VERSION
from finetune.api.schema import RULES, Model
from finetune.api.spec import FineTuneJobSpec
from finetune.api.status import FineTuneJobStatus

MUTABLE = (
    "suspend",
    "retry",
    "workspace.retain",
    "training.progressDeadlineSeconds",
    "startDeadlineSeconds",
    "activeDeadlineSeconds",
    "ttlSecondsAfterFinished",
    "ttlSecondsAfterFailed",
)
"""The fields of the spec that may change after the job started."""

MENDABLE = (
    "prepare.resources",
    "prepare.nodeSelector",
    "training.resources",
    "training.nodeSelector",
    "training.tolerations",
    "training.priorityClassName",
    "training.microBatchSize",
    "training.gradientCheckpointing",
    "training.checkpoint",
    "training.terminationGracePeriodSeconds",
    "training.container.image",
)
"""Those that may change while nothing runs (Failed, Suspended): none of them changes what is learned from what. Where
the numbers are not bit for bit the same, status.training.exact says so."""

COLUMNS = (
    ("Phase", "string", ".status.phase", 0),
    ("Progress", "string", ".status.progress.summary", 0),
    ("Loss", "number", ".status.progress.loss", 0),
    ("Remaining", "string", ".status.progress.remaining", 0),
    ("Attempt", "integer", ".status.attempts.count", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("Message", "string", ".status.message", 1),
)


def crd() -> dict[str, Any]:
    """The CustomResourceDefinition with a structural schema."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{PLURAL}.{GROUP}",
            # helm would delete it on uninstall, and with it every FineTuneJob
            "annotations": {"helm.sh/resource-policy": "keep"},
        },
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["ftj"],
                "categories": ["ml"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [
                        {"name": name, "type": kind, "jsonPath": path, "priority": priority}
                        for name, kind, path, priority in COLUMNS
                    ],
                    "schema": {"openAPIV3Schema": _root()},
                }
            ],
        },
    }


def _root() -> dict[str, Any]:
    return {
        "type": "object",
        "description": "A FineTuneJob adds tokens to a language model, fine-tunes it and publishes the result.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": structural(FineTuneJobSpec),
            "status": structural(FineTuneJobStatus),
        },
        RULES: [
            {
                "rule": "self.metadata.name.matches('^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$')",
                "message": "metadata.name must have at most 40 characters, start with a letter and consist of a-z, 0-9 "
                "and '-', because pods and volumes are named after it",
            },
            *_transitions(FineTuneJobSpec, ""),
        ],
    }


_NOT_STARTED = "!has(oldSelf.status) || !has(oldSelf.status.startTime)"
_NOTHING_RUNS = "has(oldSelf.status.phase) && oldSelf.status.phase in ['Failed', 'Suspended']"


def _transitions(model: type[Model], parent: str, guard: str = "") -> Iterator[dict[str, str]]:
    """The rules that freeze the fields of a part of the spec once the job has started. `guard` is CEL that holds where
    an optional part is absent."""
    for name, info in model.model_fields.items():
        path = f"{parent}{info.alias or name}"
        if path in MUTABLE:
            continue
        if path in MENDABLE:
            yield {
                "rule": f"{_NOT_STARTED} || ({_NOTHING_RUNS}) || {guard}({_unchanged(path)})",
                "message": f"spec.{path} may change only while the job is Failed or Suspended: suspend it first "
                "(spec.suspend: true), then change it and let it go on",
            }
        elif any(changing.startswith(f"{path}.") for changing in (*MUTABLE, *MENDABLE)):
            absent = "" if info.is_required() else f"!has(self.spec.{path}) || !has(oldSelf.spec.{path}) || "
            if absent:
                yield _frozen(path, f"{guard}has(self.spec.{path}) == has(oldSelf.spec.{path})")
            yield from _transitions(_part(info.annotation), f"{path}.", f"{guard}{absent}")
        else:
            yield _frozen(path, f"{guard}({_unchanged(path)})")


def _frozen(path: str, unchanged: str) -> dict[str, str]:
    return {
        "rule": f"{_NOT_STARTED} || {unchanged}",
        "message": f"spec.{path} cannot change once the job has started; delete and apply it anew, or apply it under "
        "another name",
    }


def _part(annotation: Any) -> type[Model]:
    """The model that a field holds, optional or not."""
    found = [item for item in (annotation, *get_args(annotation)) if isinstance(item, type) and issubclass(item, Model)]
    return found[0]


def _unchanged(field: str) -> str:
    """CEL for that; an optional (`.?`) would hide the field's bounds from the server's estimate of the rule's cost."""
    new, old = f"self.spec.{field}", f"oldSelf.spec.{field}"
    return f"has({new}) == has({old}) && (!has({new}) || {new} == {old})"


def structural(model: type[Model]) -> dict[str, Any]:
    """The model as a structural schema: references inlined, no null, bounds as the server knows them."""
    schema = model.model_json_schema(by_alias=True)
    definitions = schema.pop("$defs", {})
    result = _structural(schema, definitions)
    assert isinstance(result, dict)
    return result


_DROPPED = ("title", "additionalProperties", "examples", "const", "propertyNames")


def _merged(inner: Mapping[str, Any], outer: Mapping[str, Any]) -> dict[str, Any]:
    """What a field says goes before what its type says; their rules hold together."""
    rules = [*inner.get(RULES, ()), *outer.get(RULES, ())]
    return {**inner, **outer, **({RULES: rules} if rules else {})}


def _structural(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_structural(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    node = dict(node)
    if reference := node.pop("$ref", None):
        node = _merged(definitions[reference.rpartition("/")[2]], node)
    if "anyOf" in node:
        options = [option for option in node.pop("anyOf") if option.get("type") != "null"]
        assert len(options) == 1, f"the API has no unions: {options}"
        return _structural(_merged(options[0], node), definitions)
    if node.get("default", ...) is None:
        del node["default"]
    values = node.get("additionalProperties")
    result: dict[str, Any] = {}
    for key, value in node.items():
        if key == "properties":
            result[key] = {name: _structural(child, definitions) for name, child in value.items()}
        elif key == "exclusiveMinimum":
            result.update(minimum=value, exclusiveMinimum=True)
        elif key == "exclusiveMaximum":
            result.update(maximum=value, exclusiveMaximum=True)
        elif key in ("default", RULES, "enum", "required"):
            result[key] = value
        elif key not in _DROPPED:
            result[key] = _structural(value, definitions)
    if isinstance(values, dict):
        result["additionalProperties"] = _structural(values, definitions)
    if result.get("type") == "integer":
        result["format"] = "int64"
    if result.pop("x-kubernetes-int-or-string", False):
        for key in ("type", "minLength", "pattern"):
            result.pop(key, None)
        result["x-kubernetes-int-or-string"] = True
    return result


def main() -> None:
    """Write the definition to standard output."""
    import yaml  # only the generator needs it

    class Dumper(yaml.SafeDumper):
        """Without anchors: what repeats is written out."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    sys.stdout.write("# Generated by `make generate` from operator/finetune/api; do not edit.\n")
    yaml.dump(crd(), sys.stdout, Dumper=Dumper, sort_keys=False, width=120, allow_unicode=True)


if __name__ == "__main__":
    main()
