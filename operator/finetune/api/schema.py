"""The vocabulary of the API's models: what binds a field in Python, in the CRD and in a sentence for the user."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.alias_generators import to_camel
from pydantic_core import CoreSchema, core_schema

RULES = "x-kubernetes-validations"
"""Where a schema keeps its CEL rules."""


def rules(*validations: tuple[str, str]) -> Callable[[dict[str, Any]], None]:
    """A schema hook that attaches CEL rules, as (expression, sentence for the user) pairs."""

    def attach(schema: dict[str, Any]) -> None:
        added = [{"rule": rule, "message": message} for rule, message in validations]
        schema[RULES] = [*schema.get(RULES, []), *added]

    return attach


@dataclass(frozen=True)
class Matching:
    """A string that has to match a pattern, and the sentence that says so: a bare pattern explains nothing to a user.

    The pattern is whole-string and ASCII, in the syntax that Python's `re` and Go's RE2 share.
    """

    pattern: str
    message: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        result = handler(schema)
        value = "string(self)" if result.get("x-kubernetes-int-or-string") else "self"
        rules((f"{value}.matches(r'^({self.pattern})$')", self.message))(result)
        return result

    def _checked(self, value: str) -> str:
        if not re.fullmatch(self.pattern, value, re.ASCII):
            raise ValueError(self.message)
        return value


def keyed_by(key: str) -> dict[str, Any]:
    """A list whose items are unique by `key`: the server refuses duplicates without a quadratic CEL rule."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}


class Model(BaseModel):
    """Camel-case on the wire, snake-case in Python; unknown fields are errors, not surprises."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True)

    def wire(self) -> dict[str, Any]:
        """The document as it stands in YAML: camel-case, without absent fields."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class StatusModel(Model):
    """A part of the status: what a newer operator wrote into it is kept, and written back with the rest."""

    model_config = ConfigDict(extra="allow")


def _as_text(value: object) -> object:
    return str(value) if isinstance(value, (int, float)) else value


Quantity = Annotated[
    str,
    BeforeValidator(_as_text),
    Field(max_length=32, json_schema_extra={"x-kubernetes-int-or-string": True}),
    Matching(
        r"[0-9]+([.][0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|e[0-9]{1,2})?",
        "must be a quantity such as 2, 500m or 64Gi (Gi, not GB)",
    ),
]
"""A Kubernetes quantity: `2`, `"500m"`, `64Gi`."""

Name = Annotated[
    str,
    Field(min_length=1, max_length=253),
    Matching(
        "[a-z0-9]([-a-z0-9.]*[a-z0-9])?",
        "must be the name of a Kubernetes object: a-z, 0-9, '-' and '.', with a letter or digit at both ends",
    ),
]
"""The name of a Kubernetes object."""

_BUCKET = r"(s3|gs|az)://[^/\s]+/\S+"
_CLAIM = "pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?"
_ELSEWHERE = "pvc://CLAIM/PATH, s3://BUCKET/PATH, gs://BUCKET/PATH or az://CONTAINER/PATH"

ModelUri = Annotated[
    str,
    Field(max_length=512),
    Matching(rf"hf://[\w.-]+(/[\w.-]+)?|{_BUCKET}|{_CLAIM}(/\S*)?", f"must be hf://ORGANISATION/NAME, {_ELSEWHERE}"),
]
DatasetUri = Annotated[
    str,
    Field(max_length=512),
    Matching(
        rf"hf://datasets/[\w.-]+(/[\w.-]+)?|{_BUCKET}|{_CLAIM}(/\S*)?",
        f"must be hf://datasets/ORGANISATION/NAME, {_ELSEWHERE}",
    ),
]
FileUri = Annotated[
    str,
    Field(max_length=512),
    Matching(rf"{_CLAIM}/\S*[^/\s]", "must be pvc://CLAIM/PATH, the path of a file"),
]
Split = Annotated[
    str,
    Field(max_length=128),
    Matching(r"\w+(\[-?[0-9]*%?:-?[0-9]*%?\])?", "must look like train, train[:10000], train[-500:] or train[10%:20%]"),
]
OutputUri = Annotated[
    str,
    Field(max_length=512),
    Matching(
        rf"hf://[\w.-]+/[\w.-]+|{_BUCKET}|{_CLAIM}/\S*[^/\s]",
        f"must be hf://ORGANISATION/NAME, {_ELSEWHERE}, and not end in '/'",
    ),
]
Revision = Annotated[
    str,
    Field(min_length=1, max_length=128),
    Matching(r"[\w./-]+", "must be a branch, tag or commit: letters, digits, '_', '.', '/' and '-'"),
]
NO_PARENT = ("!self.contains('/../') && !self.endsWith('/..')", "the path must not contain '..'")
NO_DATASET = ("!self.startsWith('hf://datasets/')", "hf://datasets/ names a dataset, and a model is wanted here")


class OpenEnum(StrEnum):
    """Words of the status. One that only a newer operator knows is kept as it stands: to drop an attempt's outcome, or
    a condition, would be to forget that it ever was."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, str):
            return None
        word = str.__new__(cls, value)
        word._name_ = word._value_ = value
        return word


class Switch(StrEnum):
    ENABLED = "Enabled"
    DISABLED = "Disabled"
