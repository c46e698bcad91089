"""How one attempt of a stage goes: read from its Job and pods, and from the reports that the steps left.

An attempt is over only when its Job says so and all its pods are terminal or gone: until then another one could train
beside it. The one shortcut: a pod that succeeded has done the work, whatever the Job controller still has to write.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from finetune.api.conditions import shortened
from finetune.api.contract import CONTAINERS, NEVER_RETRIED, ExitCode, Step, StepError, StepReport
from finetune.api.status import Attempt, AttemptOutcome
from finetune.controller.observed import Object, Observed, condition_of, moment, terminal
from finetune.controller.stages import pod as shared
from finetune.controller.stages.waits import waits_for


class State(StrEnum):
    WAITING = "Waiting"
    RUNNING = "Running"
    DONE = "Done"
    FAILED = "Failed"


@dataclass(frozen=True)
class StepState:
    """One step of the attempt: where its container stands, and what it reported."""

    step: Step
    state: State
    report: StepReport | None = None
    exit_code: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What an attempt's children say."""

    over: bool
    succeeded: bool
    attempt: Attempt
    steps: tuple[StepState, ...]
    failed_step: Step | None = None
    error: StepError | None = None
    waits_for: str = ""
    started: bool = False
    """Whether a pod of it got a node: from then on something may have been done."""

    live: bool = False
    """Whether a pod of it may still run."""

    @property
    def running_step(self) -> Step | None:
        return next((step.step for step in self.steps if step.state == State.RUNNING), None)


def judge(
    observed: Observed, stage: str, steps: tuple[Step, ...], child: Object | None, number: int, pods: tuple[Object, ...]
) -> Outcome:
    """The outcome of an attempt; `child` is None when its Job is gone, although a pod of it was seen once."""
    pod = max(pods, key=lambda item: (not terminal(item), str(item["metadata"]["creationTimestamp"])), default=None)
    states = tuple(_step_state(step, pod) for step in steps)
    live = any(not terminal(item) for item in pods)
    attempt = Attempt(
        stage=stage,
        number=number,
        outcome=AttemptOutcome.RUNNING,
        start_time=moment(child["metadata"]["creationTimestamp"]) if child else None,
        pod=pod["metadata"]["name"] if pod else None,
        node=(pod.get("spec") or {}).get("nodeName") if pod else None,
        **_checkpoints(states),
    )
    outcome = Outcome(
        over=False, succeeded=False, attempt=attempt, steps=states, started=child is None or _ran(pod), live=live
    )
    succeeded = any((item.get("status") or {}).get("phase") == "Succeeded" for item in pods)
    if succeeded or (child is not None and _job_condition(child, "Complete", "SuccessCriteriaMet")):
        done = tuple(replace(state, state=State.DONE) for state in states)
        return replace(
            outcome, over=not live, succeeded=True, steps=done, attempt=_ended(attempt, AttemptOutcome.SUCCEEDED, pod)
        )
    failure = _job_condition(child, "Failed", "FailureTarget") if child is not None else None
    if live or (child is not None and failure is None):
        return replace(outcome, waits_for=_waits_for(observed, child, pod))
    return _failed(outcome, child, failure, pod)


def _ran(pod: Object | None) -> bool:
    return pod is not None and (bool((pod.get("spec") or {}).get("nodeName")) or bool(container_statuses(pod)))


def _waits_for(observed: Observed, child: Object | None, pod: Object | None) -> str:
    if pod is not None and not terminal(pod):
        return waits_for(observed, pod)
    if pod is None and child is not None and (warned := observed.warning(child, "Job")):
        return f"the pod cannot be created: {warned.reason}: {warned.message}"
    return ""


def _failed(outcome: Outcome, child: Object | None, failure: Object | None, pod: Object | None) -> Outcome:
    status = (pod or {}).get("status") or {}
    broken = next((state for state in outcome.steps if state.state == State.FAILED), None)
    said = str((failure or {}).get("message", ""))
    code = broken.exit_code if broken else _number(said, r"exit code (\d+)")
    step = broken.step if broken else _step_in(said, outcome.steps)
    error = broken.report.error if broken and broken.report else None
    disrupted = condition_of(pod, "DisruptionTarget") if pod else None
    killed = _termination(pod, step) if pod else {}
    rule = _number(said, r"rule at index (\d+)")

    kind, reason, message = AttemptOutcome.CRASHED, "Crashed", str(killed.get("message", "")) or said
    if code in NEVER_RETRIED or rule == shared.NEVER_RETRIED_RULE:
        kind, reason = AttemptOutcome.USER_ERROR, "UserError"
    elif status.get("reason") == "Evicted":
        reason, message = "Evicted", str(status.get("message", ""))
    elif killed.get("reason") == "OOMKilled":
        kind, reason = AttemptOutcome.OUT_OF_MEMORY, "OutOfMemory"
        message = f"container {CONTAINERS[step] if step else '?'} was killed for using more memory than its limit"
        error = error or StepError(reason=reason, message=message, hint=_memory_hint(step))
    elif disrupted is not None or (pod is None and rule == shared.DISRUPTED_RULE):
        cause = str((disrupted or {}).get("reason", "DisruptionTarget"))
        lost = cause in ("DeletionByTaintManager", "DeletionByPodGC")
        kind = AttemptOutcome.NODE_LOST if lost else AttemptOutcome.PREEMPTED
        reason, message = cause, str((disrupted or {}).get("message", "")) or said
    elif code == ExitCode.PREEMPTED or rule == shared.PREEMPTED_RULE:
        kind, reason = AttemptOutcome.PREEMPTED, "Preempted"
        message = "stopped on request after a checkpoint"
    elif code in (ExitCode.UNAVAILABLE, ExitCode.IO_ERROR):
        reason = "Unavailable" if code == ExitCode.UNAVAILABLE else "InputOutputError"
    elif child is None:
        reason, message = "JobDeleted", "somebody deleted its Job"
    elif pod is None and code is None:
        reason, message = "PodLost", said or "its pod vanished"
    if error is not None:
        reason, message = error.reason, error.message
    elif message and step and kind == AttemptOutcome.CRASHED and code is not None:
        message = f"container {CONTAINERS[step]} ended with exit code {code}: {message}"
    attempt = _ended(outcome.attempt, kind, pod, reason=reason, message=message, code=code)
    return replace(outcome, over=True, attempt=attempt, failed_step=step, error=error)


def _ended(
    attempt: Attempt,
    kind: AttemptOutcome,
    pod: Object | None,
    *,
    reason: str = "",
    message: str = "",
    code: int | None = None,
) -> Attempt:
    update: dict[str, Any] = {
        "outcome": kind,
        "reason": re.sub(r"[^A-Za-z0-9]", "", reason)[:128],
        "message": shortened(message, 1024),
        "exit_code": 0 if kind == AttemptOutcome.SUCCEEDED else code,
        "end_time": _end_of(pod),
    }
    return attempt.model_copy(update=update)


def _end_of(pod: Object | None) -> datetime | None:
    ends = [str(state["finishedAt"]) for state in _terminations(pod) if state.get("finishedAt")]
    return moment(max(ends)) if ends else None


def _checkpoints(states: Iterable[StepState]) -> dict[str, int | None]:
    report = next((state.report for state in states if state.step == Step.TRAIN and state.report), None)
    if report is None:
        return {}
    step: int | None = None
    checkpoint = (report.result or {}).get("checkpoint")
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("step"), int):
        step = max(0, checkpoint["step"])
    resumed = report.resumed_from_step
    return {"resumed_from_step": None if resumed is None else max(0, resumed), "checkpoint_step": step}


def _step_state(step: Step, pod: Object | None) -> StepState:
    state = (_container_status(pod, CONTAINERS[step]) or {}).get("state") or {}
    if "running" in state:
        return StepState(step, State.RUNNING)
    if "terminated" not in state:
        return StepState(step, State.WAITING)
    ended = state["terminated"]
    code = int(ended.get("exitCode", 0))
    report = StepReport.from_json(str(ended.get("message", "")))
    if report and report.step != step:
        report = None
    return StepState(step, State.DONE if code == 0 else State.FAILED, report, code)


def _container_status(pod: Object | None, name: str) -> dict[str, Any] | None:
    return next((dict(status) for status in container_statuses(pod) if status.get("name") == name), None)


def container_statuses(pod: Object | None) -> tuple[Object, ...]:
    """The statuses of all containers, init containers first."""
    status = (pod or {}).get("status") or {}
    return (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ()))


def _terminations(pod: Object | None) -> Iterable[dict[str, Any]]:
    for status in container_statuses(pod):
        if ended := (status.get("state") or {}).get("terminated"):
            yield ended


def _termination(pod: Object, step: Step | None) -> dict[str, Any]:
    status = _container_status(pod, CONTAINERS[step]) if step else None
    return dict(((status or {}).get("state") or {}).get("terminated") or {})


def _job_condition(child: Object, *kinds: str) -> Object | None:
    return next((found for kind in kinds if (found := condition_of(child, kind))), None)


def _number(text: str, pattern: str) -> int | None:
    match = re.search(pattern, text)
    return int(match[1]) if match else None


def _step_in(text: str, states: Iterable[StepState]) -> Step | None:
    return next((state.step for state in states if f"Container {CONTAINERS[state.step]} " in text), None)


def _memory_hint(step: Step | None) -> str:
    if step == Step.TRAIN:
        return "raise spec.training.resources.limits.memory, or lower microBatchSize or dataset.maxLength"
    return "raise spec.prepare.resources.limits.memory"
