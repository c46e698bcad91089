"""The loss curve of a run over all its phases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from finetune.steps.train.checkpoints.checkpoint import Checkpoint
from finetune.steps.train.phase import Phase

STATE = "trainer_state.json"
WARMUP = "warmup_state.json"


class WarmupHistory:
    """What the warm-up logged: every checkpoint of the phase after it carries that on."""

    def __init__(self, state: str) -> None:
        self._state = state

    @classmethod
    def up_to(cls, phase: Phase, checkpoint: Checkpoint) -> WarmupHistory:
        """From a checkpoint inside the phase, or from the one that ended the warm-up."""
        return cls((checkpoint.folder / (WARMUP if checkpoint.step > phase.first else STATE)).read_text())

    def state(self) -> dict[str, torch.Tensor]:
        """Nothing of it changes."""
        return {}

    def write(self, state: dict[str, torch.Tensor], folder: Path) -> None:
        """As a piece of a checkpoint."""
        (folder / WARMUP).write_text(self._state)

    @property
    def entries(self) -> list[dict[str, Any]]:
        """Its log, one entry for each step or evaluation."""
        entries: list[dict[str, Any]] = json.loads(self._state)["log_history"]
        return entries


def joined(warmup: WarmupHistory | None, phase: Phase, log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The log of the whole run, its steps counted through."""
    return [
        *(warmup.entries if warmup else []),
        *(entry | {"step": phase.first + entry["step"]} for entry in log_history),
    ]
