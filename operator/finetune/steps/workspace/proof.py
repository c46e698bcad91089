"""What `reload` proved about the model with its new tokens, for the steps after it (`reload.step.Proof` writes it)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_proof(path: Path) -> dict[str, Any]:
    """The proof at `Layout.proof`; empty for a job that adds no tokens and so had nothing to prove."""
    if not path.is_file():
        return {}
    proof: dict[str, Any] = json.loads(path.read_text())
    return proof
