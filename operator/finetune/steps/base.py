"""Which model the later steps start from."""

from __future__ import annotations

from pathlib import Path

from finetune.api.contract import Layout
from finetune.steps.staging import published


def base_model(layout: Layout) -> Path:
    """The model with its new tokens, or the model as downloaded when the job adds none."""
    return layout.prepared if published(layout.prepared) is not None else layout.model
