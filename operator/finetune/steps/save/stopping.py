"""Where the published model stops: at the end tokens of its base, and at those that it has learned.

Servers and `generate` read `eos_token_id`, a number or a list, from generation_config.json, and from config.json where
there is none. A base model often names the end of a document only, while a chat template ends turns with another token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CONFIG, GENERATION = "config.json", "generation_config.json"
EOS = "eos_token_id"
FURTHER = ("bos_token_id", "pad_token_id")


def stop_at(folder: Path, learned: Sequence[int]) -> list[int]:
    """Have the model in `folder` stop at these ids too; the ids that are new to it. Files that name them already stay
    as they are, byte for byte."""
    if not learned or not (folder / CONFIG).is_file():
        return []
    config = _read(folder / CONFIG)
    place = _holder(config)
    path = folder / GENERATION
    generation = _read(path) if path.is_file() else None
    known = stops_of(folder)
    missing = [id_ for id_ in learned if id_ not in known]
    if generation is None and missing:
        _write(path, {name: place[name] for name in FURTHER if place.get(name) is not None} | _with(known, learned))
    elif generation is not None and missing:
        _write(path, generation | _with(known, learned))
    if any(id_ not in _ids(place.get(EOS)) for id_ in learned):
        place |= _with(_ids(place.get(EOS)), learned)
        _write(folder / CONFIG, config)
    return missing


def stops_of(folder: Path) -> list[int]:
    """The ids at which the model in `folder` stops by itself."""
    path = folder / GENERATION
    named = _ids(_read(path).get(EOS)) if path.is_file() else []
    return named or _ids(_holder(_read(folder / CONFIG)).get(EOS))


def _holder(config: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json that says where to stop: that of the text model, in a model of several parts."""
    text = config.get("text_config")
    return text if EOS not in config and isinstance(text, dict) else config


def _ids(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _with(known: Sequence[int], learned: Sequence[int]) -> dict[str, Any]:
    ids = list(dict.fromkeys((*known, *learned)))
    return {EOS: ids[0] if len(ids) == 1 else ids}


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.unlink(missing_ok=True)  # it may be a link to the file in the workspace
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
