"""A status in the making: the one place where a decision changes conditions, phase and the parts that steps report."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from finetune.api.conditions import (
    ConditionStatus,
    ConditionType,
    initial,
    is_true,
    shortened,
    summarised,
    with_condition,
)
from finetune.api.contract import CONDITIONS, PARTS, Step, StepReport
from finetune.api.reading import read, readable
from finetune.api.reasons import Reason
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
from finetune.controller.decision import budget
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

    def runs(self, running: bool, *, training: bool = False) -> None:
        """Whether pods of the job run: the time in which they do is reckoned up, that of training apart too."""
        since, seconds = self.status.active_since, self.status.active_seconds or 0
        if running and since is None:
            self.update(active_since=self.now, active_seconds=seconds)
        elif not running and since is not None:
            ran = int((self.now - since).total_seconds())
            self.update(active_since=None, active_seconds=seconds + ran)
            if training:
                sofar = self.attempts.training_seconds or 0
                self.update(attempts=self.attempts.model_copy(update={"training_seconds": sofar + ran}))

    def reckon_goodput(self) -> None:
        """Training is done: what share of the pods' time led to the result."""
        training, ran = self.status.training, self.attempts.training_seconds
        if training is not None and training.seconds is not None and ran:
            share = round(min(1.0, training.seconds / ran), 3)
            self.update(attempts=self.attempts.model_copy(update={"goodput": share}))

    def idles(self) -> None:
        """Nothing of the job runs at the moment."""
        begun = self.status.phase not in (None, Phase.PENDING) or self.holds(ConditionType.MODEL_DOWNLOADED)
        self.update(phase=Phase.WAITING if begun else Phase.PENDING)

    def finished(self) -> FineTuneJobStatus:
        """The status as it is to be written."""
        conditions = summarised(self.status.conditions or (), now=self.now, generation=self.generation)
        return self.status.model_copy(update={"conditions": list(conditions)})

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
            said = "; ".join(filter(None, (sentence(state.step, self.status), state.note)))
            self.set(kind, ConditionStatus.TRUE, Reason.SUCCEEDED, said)
        elif state.state == State.RUNNING:
            self.set(kind, ConditionStatus.FALSE, Reason.RUNNING)

    def _report(self, step: Step, report: StepReport) -> None:
        """Merge a report into its part of status; whatever does not fit the API is dropped, value by value."""
        field = PARTS[step]
        model = _MODELS[field]
        before = getattr(self.status, field)
        known = before.wire() if before else {}
        self.update(**{field: read(model, known | readable(model, report.result or {}))})

    def doom(self, reason: str, message: str) -> None:
        """The job is to end without success as soon as nothing of it runs any more."""
        self.set(ConditionType.FAILURE_TARGET, ConditionStatus.TRUE, reason, message)
        self.update(phase=Phase.STOPPING)

    def fail(self, reason: str, message: str) -> None:
        """The job ends without success; nothing of it runs."""
        self.set(ConditionType.FAILURE_TARGET, ConditionStatus.TRUE, reason, message)
        self.set(ConditionType.FAILED, ConditionStatus.TRUE, reason, message)
        self.set(ConditionType.COMPLETE, ConditionStatus.FALSE, Reason.FAILED)
        self._no_longer_suspended()
        self.runs(False)
        self.update(phase=Phase.FAILED, completion_time=self.now)
        if self.status.attempts:
            self.update(attempts=budget.stopped(self.status.attempts, reason, message, self.now))
        self.say(message)

    def complete(self) -> None:
        """The job ends with success."""
        self.set(ConditionType.COMPLETE, ConditionStatus.TRUE, Reason.SUCCEEDED)
        for kind in (ConditionType.FAILURE_TARGET, ConditionType.FAILED):
            self.set(kind, ConditionStatus.FALSE, Reason.SUCCEEDED)
        self._no_longer_suspended()
        self.runs(False)
        self.update(phase=Phase.COMPLETE, completion_time=self.now)

    def retry(self) -> None:
        """A job that failed goes on."""
        for kind in (ConditionType.FAILURE_TARGET, ConditionType.FAILED, ConditionType.COMPLETE):
            self.set(kind, ConditionStatus.FALSE, Reason.RETRYING)
        begun = self.status.start_time is not None
        self.update(phase=Phase.WAITING if begun else Phase.PENDING, completion_time=None)

    def _no_longer_suspended(self) -> None:
        if self.holds(ConditionType.SUSPENDED):
            self.set(ConditionType.SUSPENDED, ConditionStatus.FALSE, Reason.FINISHED)
