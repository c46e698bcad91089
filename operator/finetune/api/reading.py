"""Documents that somebody else wrote: a newer operator, a foreign trainer. Read as far as they can be read."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from finetune.api.schema import Model, StatusModel

Document = dict[str, Any]
_Read = TypeVar("_Read", bound=StatusModel)

_INT64 = 2**63


def read(model: type[_Read], document: Mapping[str, Any]) -> _Read:
    """The part of a status that the document is; never an error where its own fields have defaults. Unknown fields are
    kept, at any depth; values that cannot be read are left out, each by itself."""
    try:
        return model.model_validate(document)
    except ValidationError:
        return model.model_validate(_without_problems(model, document, "allow"))


def readable(model: type[Model], document: Mapping[str, Any]) -> Document:
    """What of the document the model knows and can read, as it stands there."""
    return _without_problems(model, document, "forbid")


def unknown_fields(model: type[Model], document: Mapping[str, Any]) -> tuple[str, ...]:
    """The paths of fields that the model does not know: `training.newField`, `sources[0].newField`."""
    try:
        model.model_validate(document)
    except ValidationError as error:
        return tuple(_path(item["loc"]) for item in error.errors() if item["type"] == "extra_forbidden")
    return ()


def storable(value: Any) -> Any:
    """A JSON value without the numbers that no API server stores: beyond 64 bits, infinite, none at all. What held such
    a number as a field or an item does so no longer."""
    if isinstance(value, dict):
        return {key: storable(item) for key, item in value.items() if not _unstorable(item)}
    if isinstance(value, list):
        return [storable(item) for item in value if not _unstorable(item)]
    return value


def _unstorable(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    return isinstance(value, int) and not -_INT64 <= value < _INT64


def _without_problems(model: type[Model], document: Mapping[str, Any], extra: Literal["allow", "forbid"]) -> Document:
    kept = copy.deepcopy(dict(document))
    while True:
        try:
            model.model_validate(kept, extra=extra)
        except ValidationError as error:
            places = {_place(kept, item["loc"]) for item in error.errors()}
            if () in places:  # a field without a default is missing
                return {}
            for place in sorted(places, key=_order, reverse=True):  # of one list, the last item first
                _remove(kept, place)
        else:
            return kept


def _place(document: Document, location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The innermost thing that is there on the way to where a problem lies: what lacks a field goes as a whole."""
    found: Any = document
    for depth, part in enumerate(location):
        inside = part in found if isinstance(found, dict) else isinstance(found, list) and part in range(len(found))
        if not inside:
            return location[:depth]
        found = found[part]
    return location


def _order(place: tuple[str | int, ...]) -> tuple[tuple[int, str], ...]:
    return tuple((part, "") if isinstance(part, int) else (0, part) for part in place)


def _remove(document: Any, place: tuple[str | int, ...]) -> None:
    for part in place[:-1]:
        document = document[part]
    del document[place[-1]]


def _path(location: tuple[str | int, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")
