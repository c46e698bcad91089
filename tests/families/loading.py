"""Models as a job gets them, and as everybody loads them: strictly, in f32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from finetune.steps.download import step as download
from tests.unit.steps.jobs import report_of

IDS = [5, 9, 40, 41]


def downloaded(folder: Path, make: Callable[[Path], Any]) -> Path:
    """The job's own copy of a checkpoint that `make` writes, with the job's workspace in `folder`."""
    (folder / "claims/models").mkdir(parents=True)
    make(folder / "claims/models/base")
    report_of(download, folder, {"model": {"uri": "pvc://models/base"}})
    return folder / "model"


def loaded(folder: Path) -> Any:
    """The model in a folder; fails where a weight is missing."""
    both: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, info = both
    assert not info["missing_keys"] and not info["mismatched_keys"], "does not load strictly"
    return model.eval()


def logits_of(folder: Path) -> torch.Tensor:
    """What it says to IDS, (1, 4, vocabulary)."""
    with torch.no_grad():
        values: torch.Tensor = loaded(folder)(input_ids=torch.tensor([IDS]), use_cache=False).logits
    assert torch.isfinite(values).all(), "logits are not finite"
    return values
