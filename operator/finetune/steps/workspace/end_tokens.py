"""The tokens that end what the training data teaches: load-dataset counts them, samples and the published model stop
at them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

FILE = "end_tokens.json"
"""In the folder `dataset`."""


@dataclass(frozen=True)
class EndToken:
    """A token that is the last of a learned answer or text, so often."""

    id: int
    content: str
    count: int


def write_end_tokens(folder: Path, tokens: Iterable[EndToken]) -> None:
    """Leave them beside the training data, the most frequent first."""
    (folder / FILE).write_text(json.dumps([vars(token) for token in tokens], ensure_ascii=False, indent=1))


def read_end_tokens(folder: Path) -> list[EndToken]:
    """Those of the training data in `folder`; none where nobody left them."""
    try:
        return [EndToken(**token) for token in json.loads((folder / FILE).read_text())]
    except FileNotFoundError:
        return []
