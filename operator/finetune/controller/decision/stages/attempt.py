"""How one attempt of a stage goes: read from its Job and pods, and from the reports that the steps left.

An attempt is over only when its Job has ended and all its pods are terminal or gone: until then another one could train
beside it. The two are watched apart and either may lag, so neither is believed alone. The one shortcut: when all its
pods succeeded the work is done, whatever the Job controller still has to write. Of several pods one that fails ends
the attempt for all; what it failed of is why the attempt failed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from finetune.api.conditions import shortened, word
from finetune.api.contract import CONTAINERS, PEER_LOST, ExitCode, Step, StepError, StepReport
from finetune.api.status import Attempt, AttemptOutcome
from finetune.controller.decision.observed import (
    Object,
    Observed,
    busy,
    condition_of,
    container_statuses,
    finished,
    index_of,
    moment,
    suspended_here,
    terminal,
)
from finetune.controller.decision.stages.reports import read
from finetune.controller.decision.stages.signals import Seen, Verdict, classed
from finetune.controller.decision.stages.waits import waits_for


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
    note: str = ""
    """What has to be said about the report: that it was cut, or cannot be read."""


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
    """Whether a pod of it may still run, seen or only counted by its Job."""

    unseen_since: datetime | None = None
    """When its Job ended, although no pod that explains it was seen (yet): with it comes what the steps reported."""

    @property
    def running_step(self) -> Step | None:
        return next((step.step for step in self.steps if step.state == State.RUNNING), None)


def judge(
    observed: Observed,
    stage: str,
    steps: tuple[Step, ...],
    child: Object | None,
    number: int,
    pods: tuple[Object, ...],
    expected: int = 1,
) -> Outcome:
    """The outcome of an attempt of `expected` pods; `child` is None when its Job is gone, although a pod of it was
    seen once."""
    live = tuple(item for item in pods if not terminal(item))
    well = tuple(item for item in pods if (item.get("status") or {}).get("phase") == "Succeeded")
    complete = _job_condition(child, "Complete", "SuccessCriteriaMet") if child is not None else None
    failure = _job_condition(child, "Failed", "FailureTarget") if child is not None else None
    all_well = len({index_of(item) for item in well}) == expected
    if complete or all_well:
        shown = _foremost(well)
        outcome = _seen(stage, steps, child, number, pods, shown)
        done = tuple(replace(state, state=State.DONE) for state in outcome.steps)
        over = not live and (all_well or child is None or finished(child))
        attempt = _ended(outcome.attempt, AttemptOutcome.SUCCEEDED, shown)
        unseen_since = None if all_well else _since(complete)
        return replace(outcome, over=over, succeeded=True, steps=done, attempt=attempt, unseen_since=unseen_since)
    if live or (child is not None and (failure is None or not finished(child))):
        outcome = _seen(stage, steps, child, number, pods, _foremost(live or pods))
        return replace(outcome, waits_for=_waits_for(observed, child, pods, live, expected))
    verdict = Verdict.of(failure)
    culprit = _culprit(pods, verdict)
    outcome = _failed(observed, _seen(stage, steps, child, number, pods, culprit), child, verdict, culprit)
    return outcome if culprit else replace(outcome, unseen_since=_since(failure))


def _seen(
    stage: str,
    steps: tuple[Step, ...],
    child: Object | None,
    number: int,
    pods: tuple[Object, ...],
    shown: Object | None,
) -> Outcome:
    """What there is to see, on the one pod that is shown for all."""
    attempt = Attempt(
        stage=stage,
        number=number,
        outcome=AttemptOutcome.RUNNING,
        start_time=moment(child["metadata"]["creationTimestamp"]) if child else None,
        job_uid=child["metadata"]["uid"] if child else None,
        pod=shown["metadata"]["name"] if shown else None,
        node=(shown.get("spec") or {}).get("nodeName") if shown else None,
        **_checkpoints(pods),
    )
    return Outcome(
        over=False,
        succeeded=False,
        attempt=attempt,
        steps=tuple(_step_state(step, shown) for step in steps),
        started=child is None or any(map(_ran, pods)),
        live=any(not terminal(item) for item in pods) or (child is not None and busy(child)),
    )


def _foremost(pods: Iterable[Object]) -> Object | None:
    """The newest of the lowest index: rank 0 speaks for all while nothing is wrong."""
    newest = sorted(pods, key=lambda item: str(item["metadata"]["creationTimestamp"]), reverse=True)
    return min(newest, key=index_of, default=None)


def _culprit(pods: tuple[Object, ...], verdict: Verdict) -> Object | None:
    """The pod that failed first: the others fell with it. None when it is gone and only the Job's verdict is left."""
    if verdict.pod and verdict.pod not in (item["metadata"]["name"] for item in pods):
        return None
    return min(_unsuccessful(pods), key=_first_sign, default=None)


def _unsuccessful(pods: Iterable[Object]) -> list[Object]:
    return [item for item in pods if (item.get("status") or {}).get("phase") != "Succeeded"]


def _first_sign(pod: Object) -> tuple[bool, str, int]:
    """When a pod first showed that it would fail; those that say themselves that they fell with another come last.
    Within one second: who was told to go comes before who found something wrong, and both before who was stopped."""
    ended = [item for item in _terminations(pod) if item.get("exitCode")]
    times = [str(item.get("finishedAt", "")) for item in ended]
    if disrupted := condition_of(pod, "DisruptionTarget"):
        return False, min([str(disrupted.get("lastTransitionTime", "")), *times]), 0
    report = StepReport.from_json(str(ended[0].get("message", ""))) if ended else None
    fell = bool(report and report.error and report.error.reason == PEER_LOST)
    late = {int(ExitCode.PREEMPTED): 2, int(ExitCode.UNAVAILABLE): 3}
    return fell, min(times, default="~"), late.get(int(ended[0]["exitCode"]), 1) if ended else 1


def _ran(pod: Object) -> bool:
    return bool((pod.get("spec") or {}).get("nodeName")) or bool(container_statuses(pod))


def _waits_for(
    observed: Observed, child: Object | None, pods: tuple[Object, ...], live: tuple[Object, ...], expected: int
) -> str:
    """The sentence of the first pod that waits; or why there are fewer than there should be."""
    for item in sorted(live, key=index_of):
        if waits := waits_for(observed, item):
            return waits if expected == 1 else f"pod {index_of(item)} of {expected}: {waits}"
    if len(pods) < expected and child is not None and (warned := observed.warning(child, "Job")):
        which = "the pod" if expected == 1 else f"a pod (there are {len(pods)} of {expected})"
        return f"{which} cannot be created: {warned.reason}: {warned.message}"
    return ""


def _failed(
    observed: Observed, outcome: Outcome, child: Object | None, verdict: Verdict, pod: Object | None
) -> Outcome:
    """The outcome of an attempt that ended without success, by the pod that failed first."""
    seen = _signs(observed, outcome, child, verdict, pod)
    found = classed(seen)
    note = next((state.note for state in outcome.steps if state.step == seen.step), "")
    message = "; ".join(filter(None, (found.message, note)))
    attempt = _ended(outcome.attempt, found.outcome, pod, reason=found.reason, message=message, code=seen.exit_code)
    return replace(outcome, over=True, attempt=attempt, failed_step=seen.step, error=found.error)


def _signs(observed: Observed, outcome: Outcome, child: Object | None, verdict: Verdict, pod: Object | None) -> Seen:
    """What is to be seen on the pod, and in the Job's verdict where the pod says nothing."""
    broken = next((state for state in outcome.steps if state.state == State.FAILED), None)
    named = next((state.step for state in outcome.steps if CONTAINERS[state.step] == verdict.container), None)
    step = broken.step if broken else named
    status = (pod or {}).get("status") or {}
    disrupted = condition_of(pod, "DisruptionTarget") if pod else None
    ended = _termination(pod, step) if pod else {}
    return Seen(
        job_exists=child is not None,
        pod_exists=pod is not None,
        verdict=verdict,
        suspended=observed.spec.suspend or (child is not None and suspended_here(child)),
        held=child is not None and bool(child["spec"].get("suspend")) and not suspended_here(child),
        pod_reason=str(status.get("reason", "")),
        pod_message=str(status.get("message", "")),
        disruption=str(disrupted.get("reason", "DisruptionTarget")) if disrupted is not None else None,
        disruption_message=str((disrupted or {}).get("message", "")),
        step=step,
        container_reason=str(ended.get("reason", "")),
        container_message=str(ended.get("message", "")),
        exit_code=broken.exit_code if broken else verdict.exit_code,
        error=broken.report.error if broken and broken.report else None,
    )


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
        "reason": word(reason),
        "message": shortened(message, 1024),
        "exit_code": 0 if kind == AttemptOutcome.SUCCEEDED else code,
        "end_time": _end_of(pod),
    }
    return attempt.model_copy(update=update)


def _end_of(pod: Object | None) -> datetime | None:
    ends = [str(state["finishedAt"]) for state in _terminations(pod) if state.get("finishedAt")]
    return moment(max(ends)) if ends else None


def _checkpoints(pods: Iterable[Object]) -> dict[str, int | None]:
    """Where the attempt went on from and where it got to, by the report of whichever pod knows most."""
    reports = [state.report for pod in pods if (state := _step_state(Step.TRAIN, pod)).report]
    resumed = [report.resumed_from_step for report in reports if report and report.resumed_from_step is not None]
    found = [(report.result or {}).get("checkpoint") for report in reports if report]
    steps = [item["step"] for item in found if isinstance(item, dict) and isinstance(item.get("step"), int)]
    return {
        "resumed_from_step": max(0, *resumed) if resumed else None,
        "checkpoint_step": max(0, *steps) if steps else None,
    }


def _step_state(step: Step, pod: Object | None) -> StepState:
    state = (_container_status(pod, CONTAINERS[step]) or {}).get("state") or {}
    if "running" in state:
        return StepState(step, State.RUNNING)
    if "terminated" not in state:
        return StepState(step, State.WAITING)
    ended = state["terminated"]
    code = int(ended.get("exitCode", 0))
    report, note = read(str(ended.get("message", "")), step, code, len(container_statuses(pod)))
    return StepState(step, State.DONE if code == 0 else State.FAILED, report, code, note)


def _container_status(pod: Object | None, name: str) -> dict[str, Any] | None:
    return next((dict(status) for status in container_statuses(pod) if status.get("name") == name), None)


def _terminations(pod: Object | None) -> Iterable[dict[str, Any]]:
    for status in container_statuses(pod):
        if ended := (status.get("state") or {}).get("terminated"):
            yield ended


def _termination(pod: Object, step: Step | None) -> dict[str, Any]:
    status = _container_status(pod, CONTAINERS[step]) if step else None
    return dict(((status or {}).get("state") or {}).get("terminated") or {})


def _since(condition: Object | None) -> datetime | None:
    time = (condition or {}).get("lastTransitionTime")
    return moment(time) if time else None


def _job_condition(child: Object, *kinds: str) -> Object | None:
    return next((found for kind in kinds if (found := condition_of(child, kind))), None)
