"""Is this job one that the operator would run? Every objection with its field, its value, the remedy and its line."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from finetune.api import API_VERSION
from finetune.api.implemented import not_implemented
from finetune.api.spec import FineTuneJobSpec
from finetune.cli import rules
from finetune.cli.document import Document

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """One objection."""

    path: Path
    message: str
    line: int | None

    @property
    def field(self) -> str:
        """As Kubernetes writes it: spec.tokens.add[0].content."""
        return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path).lstrip(".")


class InvalidJob(Exception):
    """The job would be refused."""

    def __init__(self, document: Document, problems: Sequence[Problem]) -> None:
        super().__init__(f"{document.file}: {len(problems)} problems")
        self.document = document
        self.problems = problems


def checked(document: Document) -> FineTuneJobSpec:
    """The job's spec with all defaults; raises InvalidJob with everything that is wrong with it."""
    content = json.loads(json.dumps(document.content, default=str))
    problems = [*_envelope(content)]
    spec = None
    try:
        spec = FineTuneJobSpec.model_validate_json(
            json.dumps(content.get("spec", {})), strict=True, by_alias=True, by_name=False
        )
    except ValidationError as error:
        problems += [_sentence(details, content) for details in error.errors()]
    if spec is not None:
        whole = {"metadata": content.get("metadata", {"name": ""}), "spec": spec.wire()}
        problems += [(path, message) for path, message in rules.broken(whole)]
        problems += [
            (_path(f"spec.{missing.field}"), f"{missing.value} is not implemented yet; {missing.remedy}")
            for missing in not_implemented(spec)
        ]
    if problems or spec is None:
        raise InvalidJob(document, [Problem(path, text, document.line(path)) for path, text in problems])
    return spec


def _envelope(content: dict[str, Any]) -> Iterator[tuple[Path, str]]:
    version = content.get("apiVersion")
    if version != API_VERSION:
        yield ("apiVersion",), f"must be {API_VERSION}, not {version}"
    if not isinstance(content.get("metadata"), dict) or not content["metadata"].get("name"):
        yield ("metadata", "name"), "is missing: a job needs a name"
    for name in set(content) - {"apiVersion", "kind", "metadata", "spec", "status"}:
        yield (name,), f"no such field{_meant(name, ['metadata', 'spec'])}"


def _sentence(details: ErrorDetails, content: dict[str, Any]) -> tuple[Path, str]:
    """pydantic's objection in the words of this API."""
    path: Path = ("spec", *details["loc"])
    kind, value = details["type"], details["input"]
    if kind == "missing":
        return path, "is missing"
    if kind == "extra_forbidden":
        return path, f"no such field{_meant(str(path[-1]), _fields(path[:-1]))}"
    if kind == "value_error":
        return path, f"{value!r}: {details['ctx']['error']}"
    message = details["msg"][0].lower() + details["msg"][1:]
    return path, f"{value!r}: {message.replace('input should', 'should')}"


def _fields(path: Path) -> list[str]:
    """The names of the fields that the API has at `path`."""
    node = rules.schema()
    for part in path:
        node = node.get("items", {}) if isinstance(part, int) else node.get("properties", {}).get(part, {})
    return list(node.get("properties", {}))


def _meant(name: str, known: list[str]) -> str:
    words = name.replace("_", " ").title().replace(" ", "")
    for candidate in (words[:1].lower() + words[1:], name):
        if close := difflib.get_close_matches(candidate, known, n=1, cutoff=0.6):
            return f"; did you mean {close[0]}?"
    return f"; there are {', '.join(known)}" if known else ""


def _path(field: str) -> Path:
    parts: list[str | int] = []
    for part in field.split("."):
        name, *indices = part.rstrip("]").split("[")
        parts += [name, *(int(index.rstrip("]")) for index in indices)]
    return tuple(parts)
