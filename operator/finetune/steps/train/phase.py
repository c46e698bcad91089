"""The phases of a run: stretches of steps, each with an optimizer, a schedule and trained weights of its own.

The steps of all phases are counted through. A phase that is over leaves a checkpoint, and the next one starts from that
file whether or not the process is the same: what is resumed at the boundary is what went on.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from finetune.api.spec import Schedule


class PhaseName(StrEnum):
    EMBEDDING_WARMUP = "EmbeddingWarmup"
    TRAINING = "Training"


@dataclass(frozen=True)
class Phase:
    """One phase; `first` counts the steps of those before it."""

    name: PhaseName
    first: int
    steps: int
    learning_rate: float
    weight_decay: float
    schedule: Schedule
    rising: int
    """Steps in which the learning rate rises."""

    @property
    def last(self) -> int:
        """The step that ends it."""
        return self.first + self.steps
