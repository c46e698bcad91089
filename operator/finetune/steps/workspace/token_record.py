"""Which tokens a model was given: kept beside the model for the steps that follow, and for whoever asks later."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "finetune-tokens.json"


@dataclass(frozen=True)
class TokenRecord:
    """A token that was added, and what its rows were made of.

    `piece` is the name in the tokenizer's vocabulary of one that was learned; None for an added token.
    """

    content: str
    id: int
    special: bool
    normalized: bool
    init: dict[str, Any]
    piece: str | None = None


def write_record(folder: Path, records: Iterable[TokenRecord]) -> None:
    """Write one line for each token."""
    lines = (json.dumps(vars(record), ensure_ascii=False) for record in records)
    (folder / FILE).write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def read_record(folder: Path) -> list[TokenRecord]:
    """The tokens that were added to the model in `folder`; none when it was not extended."""
    try:
        content = (folder / FILE).read_bytes()
    except FileNotFoundError:
        return []
    return [TokenRecord(**record) for record in json.loads(content)]
