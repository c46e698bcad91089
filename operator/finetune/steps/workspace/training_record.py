"""training.json: how a trained model came about, kept beside its weights for `save` and for whoever asks later.

Our own trainer writes all of it (`train/reporting/result.py`), a trainer of the user's own may write its own, and where
that leaves none, `save` says what is known (`save/adopt.py`): then there is a `trainer`, and no `history`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "training.json"


def write_training_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Leave the record beside the model in `folder`."""
    (folder / FILE).write_text(json.dumps(record, indent=1))


def read_training_record(folder: Path) -> dict[str, Any]:
    """The record of the model in `folder`, which `train` or `save` has left there."""
    record: dict[str, Any] = json.loads((folder / FILE).read_text())
    return record
