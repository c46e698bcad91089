"""Until when things have to have happened. All of it is read off what exists: nothing here remembers anything."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import NamedTuple

from finetune.api.contract import CONTAINERS, Step
from finetune.api.reasons import Reason
from finetune.api.spec import FineTuneJobSpec
from finetune.api.status import FineTuneJobStatus
from finetune.controller.decision.observed import (
    Object,
    Observed,
    container_statuses,
    index_of,
    moment,
    terminal,
)
from finetune.controller.decision.stages import train
from finetune.controller.decision.stages.stage import Stage

_GRACE = timedelta(seconds=60)
"""The pod itself ends a training that hangs; only when it does not, the operator does."""


class Limit(NamedTuple):
    """When an attempt is withdrawn if nothing changes, and why."""

    time: datetime
    reason: Reason
    message: str


def active(spec: FineTuneJobSpec, status: FineTuneJobStatus) -> datetime | None:
    """When the job's pods will have run for too long if they go on so; None when none runs, or nobody minds."""
    if spec.active_deadline_seconds is None or status.active_since is None or status.completion_time is not None:
        return None
    return status.active_since + timedelta(seconds=spec.active_deadline_seconds - (status.active_seconds or 0))


def of_attempt(
    observed: Observed, stage: Stage, child: Object | None, pods: tuple[Object, ...], waits_for: str
) -> Iterator[Limit]:
    """The limits of an attempt that goes on; none while it is told to stop."""
    if child is None or "deletionTimestamp" in child["metadata"] or (child.get("spec") or {}).get("suspend"):
        return
    if any("deletionTimestamp" in item["metadata"] for item in pods):
        return
    expected = observed.spec.training.nodes if stage is train else 1
    if (limit := _start(observed, child, pods, expected, waits_for)) is not None:
        yield limit
    if stage is train and (limit := _progress(observed, pods)) is not None:
        yield limit


def runs(pod: Object) -> bool:
    """Whether a container of the pod runs, or has run, and the pod has not ended."""
    return _begun(pod) and not terminal(pod)


def _start(observed: Observed, child: Object, pods: tuple[Object, ...], expected: int, waits_for: str) -> Limit | None:
    """Its start counts from when the Job controller took it up, anew after each suspension."""
    seconds = observed.spec.start_deadline_seconds
    since = (child.get("status") or {}).get("startTime")
    begun = {index_of(item) for item in pods if _begun(item)}
    if seconds is None or since is None or len(begun) >= expected:
        return None
    which = "its pod had" if expected == 1 else f"{expected - len(begun)} of its {expected} pods had"
    said = f": {waits_for}" if waits_for else ""
    message = f"{which} not started within spec.startDeadlineSeconds, {seconds} s{said}"
    return Limit(moment(since) + timedelta(seconds=seconds), Reason.START_DEADLINE_EXCEEDED, message)


def _progress(observed: Observed, pods: tuple[Object, ...]) -> Limit | None:
    """Reports say how training gets on; where none ever came, or none of this attempt yet, they say nothing."""
    seconds, shown = observed.spec.training.progress_deadline_seconds, observed.status.progress
    started = [time for item in pods if not terminal(item) and (time := _training_since(item))]
    if seconds is None or not started or shown is None or shown.step != Step.TRAIN or shown.last_update_time is None:
        return None
    begun = max(started)
    if shown.last_update_time < begun:
        return None
    since = max(begun, shown.last_advance_time or shown.last_update_time)
    message = (
        f"no step since {since:%H:%M:%S} UTC, by the pod's reports, and spec.training.progressDeadlineSeconds is "
        f"{seconds} s"
    )
    return Limit(since + timedelta(seconds=seconds) + _GRACE, Reason.HUNG, message)


def _training_since(pod: Object) -> datetime | None:
    for status in container_statuses(pod):
        running = (status.get("state") or {}).get("running") or {}
        if status["name"] == CONTAINERS[Step.TRAIN] and "startedAt" in running:
            return moment(running["startedAt"])
    return None


def _begun(pod: Object) -> bool:
    return any({"running", "terminated"} & set(status.get("state") or {}) for status in container_statuses(pod))
