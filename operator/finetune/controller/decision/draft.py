"""A status in the making: the one place where a decision changes conditions, phase and the parts that steps report."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from finetune.api.conditions import ConditionStatus, ConditionType, initial, is_true, shortened, with_condition
from finetune.api.contract import CONDITIONS, PARTS, Step, StepReport
from finetune.api.reading import read, readable
from finetune.api.schema import StatusModel
from finetune.api.status import (
    Attempts,
    DatasetStatus,
    FineTuneJobStatus,
    ModelStatus,
    OutputStatus,
    Phase,
    TokensStatus,
    TrainingStatus,
)
from finetune.controller.decision.findings import sentence
from finetune.controller.decision.stages.attempt import State, StepState

PHASES: Mapping[Step, Phase] = {
    Step.DOWNLOAD: Phase.DOWNLOADING,
    Step.ADD_TOKENS: Phase.ADDING_TOKENS,
    Step.RELOAD: Phase.RELOADING,
    Step.LOAD_DATASET: Phase.LOADING_DATASET,
    Step.TRAIN: Phase.TRAINING,
    Step.SAVE: Phase.SAVING,
}

_MODELS: Mapping[str, type[StatusModel]] = {
    "model": ModelStatus,
    "tokens": TokensStatus,
    "dataset": DatasetStatus,
    "training": TrainingStatus,
    "output": OutputStatus,
}


class Draft:
    """The status that a decision will write. Times come from the caller; nothing here reads a clock."""

    def __init__(self, status: FineTuneJobStatus, generation: int, now: datetime) -> None:
        self.now = now
        self.generation = generation
        self.status = status.model_copy(
            update={
                "observed_generation": generation,
                "conditions": list(status.conditions or initial(now, generation)),
                "message": "",
                "progress": None,
            }
        )

    @property
    def attempts(self) -> Attempts:
        return self.status.attempts or Attempts()

    def holds(self, kind: ConditionType) -> bool:
        return is_true(self.status.conditions or (), kind)

    def set(self, kind: ConditionType, status: ConditionStatus, reason: str, message: str = "") -> None:
        """Set one condition."""
        conditions = with_condition(
            self.status.conditions or (), kind, status, reason, message, now=self.now, generation=self.generation
        )
        self.update(conditions=list(conditions))

    def update(self, **fields: Any) -> None:
        """Set fields of the status, by their Python names."""
        self.status = self.status.model_copy(update=fields)

    def say(self, message: str) -> None:
        """What the job waits for, for status.message."""
        self.update(message=shortened(message, 4096))

    def take_in(self, state: StepState, *, settled: bool) -> None:
        """What one step of the running stage shows: its condition, and the part of status that it reported.

        A step that ends its attempt is done only when that is settled, that is, when its pod has ended too: otherwise
        the stage would count as done with an attempt that still runs.
        """
        kind = CONDITIONS[state.step]
        if state.state in (State.DONE, State.FAILED) and state.report and state.report.result is not None:
            self._report(state.step, state.report)
        if self.holds(kind):
            return
        if state.state == State.DONE and settled:
            self.set(kind, ConditionStatus.TRUE, "Succeeded", sentence(state.step, self.status))
        elif state.state == State.RUNNING:
            self.set(kind, ConditionStatus.FALSE, "Running")

    def _report(self, step: Step, report: StepReport) -> None:
        """Merge a report into its part of status; whatever does not fit the API is dropped, value by value."""
        field = PARTS[step]
        model = _MODELS[field]
        before = getattr(self.status, field)
        known = before.wire() if before else {}
        self.update(**{field: read(model, known | readable(model, report.result or {}))})

    def fail(self, reason: str, message: str) -> None:
        """The job ends without success."""
        self.set(ConditionType.FAILED, ConditionStatus.TRUE, reason, message)
        self.set(ConditionType.COMPLETE, ConditionStatus.FALSE, "Failed")
        self.update(phase=Phase.FAILED, completion_time=self.now)
        if self.status.attempts:
            self.update(attempts=self.status.attempts.model_copy(update={"retry_after": None}))
        self.say(message)

    def complete(self) -> None:
        """The job ends with success."""
        self.set(ConditionType.COMPLETE, ConditionStatus.TRUE, "Succeeded")
        self.set(ConditionType.FAILED, ConditionStatus.FALSE, "Succeeded")
        self.update(phase=Phase.COMPLETE, completion_time=self.now)
