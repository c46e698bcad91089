"""What the training data are made of, part by part: kept beside them and in every checkpoint, so that a changed
dataset can be told by what changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "parts.json"
"""In the folder `dataset`."""

Parts = dict[str, Any]
"""A digest of what each source gave, and the settings of the spec that arrange it, each by its name for people."""


def write_parts(folder: Path, parts: Mapping[str, Any]) -> None:
    """Leave them beside the training data."""
    (folder / FILE).write_text(json.dumps(parts, ensure_ascii=False, indent=1))


def read_parts(folder: Path) -> Parts:
    """Those of the training data in `folder`; none where nobody left them."""
    try:
        parts: Parts = json.loads((folder / FILE).read_text())
    except FileNotFoundError:
        return {}
    return parts


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [_told(name, before, now) for name in names]


def _told(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if name.startswith("spec.dataset.") and "(" in name:
        return f"{name} is new" if name not in before else f"{name} is gone" if name not in now else f"{name} changed"
    return f"{name} is {now.get(name)} and was {before.get(name)}"
