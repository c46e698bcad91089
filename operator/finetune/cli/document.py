"""A YAML file with jobs in it, and where in the file each field stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from finetune.api import API_VERSION, KIND


class UnreadableFile(Exception):
    """The file is no YAML, or holds nothing to run; the message says where and what."""


@dataclass(frozen=True)
class Document:
    """One object of a file. Read as YAML 1.2, where 1e-5 is a number and `no` is a word."""

    file: Path
    content: Any

    @property
    def kind(self) -> str:
        return str(self.content.get("kind", ""))

    @property
    def name(self) -> str:
        return str(self.content.get("metadata", {}).get("name", ""))

    def line(self, path: Sequence[str | int]) -> int | None:
        """The line, from 1, of the deepest part of `path` that the file has."""
        node: Any = self.content
        line = None
        for part in path:
            try:
                place = node.lc.key if isinstance(node, Mapping) else node.lc.item  # type: ignore[attr-defined]
                line = place(part)[0]
                node = node[part]
            except (AttributeError, KeyError, IndexError, TypeError):
                break
        return None if line is None else line + 1


def read(file: Path) -> list[Document]:
    """All objects of the file, in order."""
    try:
        documents = list(YAML().load_all(file.read_text()))
    except FileNotFoundError as error:
        raise UnreadableFile(f"{file} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableFile(f"{file}: {error}") from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}" if mark else ""
        raise UnreadableFile(f"{file}{where}: {error.problem or error.context}") from error
    return [Document(file, content) for content in documents if isinstance(content, Mapping)]


def jobs(documents: Sequence[Document]) -> list[Document]:
    """The FineTuneJobs among them; raises UnreadableFile when there is none."""
    found = [document for document in documents if document.kind == KIND]
    if not found:
        file = documents[0].file if documents else "the file"
        kinds = ", ".join(sorted({document.kind or "an object without kind" for document in documents})) or "nothing"
        raise UnreadableFile(f"{file} holds no {KIND} (apiVersion: {API_VERSION}) but {kinds}")
    return found


def config_map_value(documents: Sequence[Document], name: str, key: str) -> str | None:
    """The text under `key` of the ConfigMap `name` in the same file."""
    for document in documents:
        if document.kind == "ConfigMap" and document.name == name:
            value = document.content.get("data", {}).get(key)
            return None if value is None else str(value)
    return None
