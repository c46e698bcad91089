"""Specs that have to be refused, and some close to them that have not, from bad_specs.yaml: the API server and the
local command are held to one list."""

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.merge_patch import merged

_FILE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())

GOOD: dict[str, Any] = _FILE["good"]


class Bad(NamedTuple):
    """A job that is refused, and what the refusal says."""

    name: str
    job: dict[str, Any]
    says: str


BAD = [Bad(entry["name"], merged(GOOD, entry["patch"]), entry["says"]) for entry in _FILE["bad"]]
CLOSE = {entry["name"]: merged(GOOD, entry["patch"]) for entry in _FILE["close"]}
