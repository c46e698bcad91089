"""How an attempt that ended without success is classed: one row for each signal, the first that is seen decides.

What was seen comes from five places: the pod's own reason and conditions, the state of the container, its exit code,
the step's report, and, when the pod is gone, the Job controller's verdict on it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from finetune.api.contract import CONTAINERS, NEVER_RETRIED, ExitCode, Step, StepError
from finetune.api.status import AttemptOutcome
from finetune.controller.decision.observed import Object
from finetune.controller.decision.stages import pod as shared


@dataclass(frozen=True)
class Verdict:
    """What the Job's Failed (or FailureTarget) condition says of a pod that may be gone. Only here is its English read:

    `Container train for pod team/tune-train-1-x failed with exit code 75 matching FailJob rule at index 1`
    """

    text: str = ""
    pod: str = ""
    container: str = ""
    exit_code: int | None = None
    rule: int | None = None
    """Position of the podFailurePolicy's rule that matched."""

    @classmethod
    def of(cls, condition: Object | None) -> Verdict:
        text = str((condition or {}).get("message", ""))

        def found(pattern: str) -> str:
            match = re.search(pattern, text)
            return match[1] if match else ""

        code, rule = found(r"exit code (\d+)"), found(r"rule at index (\d+)")
        return cls(
            text=text,
            pod=found(r"[Pp]od [^/\s]+/(\S+) "),
            container=found(r"Container (\S+) "),
            exit_code=int(code) if code else None,
            rule=int(rule) if rule else None,
        )


@dataclass(frozen=True)
class Seen:
    """What was seen of an attempt's end. Reasons and messages are empty where nobody gave one."""

    job_exists: bool
    pod_exists: bool
    verdict: Verdict = Verdict()
    suspended: bool = False
    """Whether the spec says suspend, or the Job was being suspended for it."""

    held: bool = False
    """Whether somebody else had suspended the Job."""

    pod_reason: str = ""
    pod_message: str = ""
    disruption: str | None = None
    """Reason of the pod's condition DisruptionTarget; None without that condition."""

    disruption_message: str = ""
    step: Step | None = None
    """The step whose container failed."""

    container_reason: str = ""
    container_message: str = ""
    exit_code: int | None = None
    error: StepError | None = None
    """What the step reported."""


class Signal(NamedTuple):
    """A row: what it looks like, and what it then is. Without a message the container's words stand, or the Job's."""

    seen: Callable[[Seen], bool]
    outcome: AttemptOutcome
    reason: Callable[[Seen], str]
    message: Callable[[Seen], str] | None = None
    hint: Callable[[Step | None], str] | None = None


class Classed(NamedTuple):
    """The class of an attempt's end."""

    outcome: AttemptOutcome
    reason: str
    message: str
    error: StepError | None


NODE_LOST = "NodeLost"
"""Reason of the disruption that this operator writes when it removes a pod of a lost machine by force."""

_LOST = ("DeletionByTaintManager", "DeletionByPodGC", NODE_LOST)
_OUT_OF_MEMORY = "OutOfMemory"
_OWN_LIMIT = re.compile(
    r"exceeds the limit \"|exceeded its local ephemeral storage limit|exceeds the total limit of containers"
)
"""What the kubelet says when it evicts a pod for its own use of the disk; all other evictions are the node's need."""

_REJECTED = ("UnexpectedAdmissionError", "NodeAffinity", "TopologyAffinityError", "NodeShutdown", "NodeNotReady")
_STOPPED_BY_KUBELET = ("Terminated", "Preempting", "NodeShutdown", "Shutdown")
_UNSEEN = ("Unknown", "ContainerStatusUnknown")
"""The container's end was not witnessed: the machine restarted, or its runtime lost it (exit code 255, or 137)."""

_STOPPED = (None, int(ExitCode.PREEMPTED), 137, 143)
"""Exit codes of a container that was told to go: by itself after a checkpoint, by SIGKILL, by SIGTERM."""


def _always(reason: str) -> Callable[[Seen], str]:
    return lambda seen: reason


SIGNALS = (
    Signal(
        lambda seen: seen.exit_code in NEVER_RETRIED or seen.verdict.rule == shared.NEVER_RETRIED_RULE,
        AttemptOutcome.USER_ERROR,
        _always("UserError"),
    ),
    Signal(
        lambda seen: seen.pod_reason == "Evicted" and bool(_OWN_LIMIT.search(seen.pod_message)),
        AttemptOutcome.CRASHED,
        _always("Evicted"),
        lambda seen: seen.pod_message,
        lambda step: _storage_hint(step),
    ),
    Signal(
        lambda seen: seen.pod_reason == "Evicted",
        AttemptOutcome.PREEMPTED,
        _always("Evicted"),
        lambda seen: seen.pod_message,
    ),
    Signal(
        lambda seen: seen.container_reason == "OOMKilled",
        AttemptOutcome.OUT_OF_MEMORY,
        _always(_OUT_OF_MEMORY),
        lambda seen: f"container {_container(seen)} was killed for using more memory than its limit",
        lambda step: _memory_hint(step),
    ),
    Signal(
        lambda seen: seen.suspended,
        AttemptOutcome.SUSPENDED,
        _always("Suspended"),
        lambda seen: "stopped because spec.suspend is true",
    ),
    Signal(
        lambda seen: seen.disruption in _LOST,
        AttemptOutcome.NODE_LOST,
        lambda seen: str(seen.disruption),
        lambda seen: seen.disruption_message or seen.verdict.text,
    ),
    Signal(
        lambda seen: seen.held and seen.exit_code in _STOPPED,
        AttemptOutcome.PREEMPTED,
        _always("SuspendedElsewhere"),
        _always("its Job was suspended, not by this operator"),
    ),
    Signal(
        lambda seen: _rejected(seen) or seen.pod_reason in _STOPPED_BY_KUBELET,
        AttemptOutcome.PREEMPTED,
        lambda seen: seen.pod_reason,
        lambda seen: seen.pod_message,
    ),
    Signal(
        lambda seen: seen.disruption is not None or _rule_on_gone_pod(seen) == shared.DISRUPTED_RULE,
        AttemptOutcome.PREEMPTED,
        lambda seen: "DisruptionTarget" if seen.disruption is None else seen.disruption,
        lambda seen: seen.disruption_message or seen.verdict.text,
    ),
    Signal(
        lambda seen: seen.container_reason in _UNSEEN,
        AttemptOutcome.NODE_LOST,
        lambda seen: seen.container_reason,
        lambda seen: (
            f"nobody saw container {_container(seen)} end (exit code {seen.exit_code}), as when its machine "
            f"restarts{f': {seen.container_message}' if seen.container_message else ''}"
        ),
    ),
    Signal(
        lambda seen: seen.exit_code == ExitCode.PREEMPTED or seen.verdict.rule == shared.PREEMPTED_RULE,
        AttemptOutcome.PREEMPTED,
        _always("Preempted"),
        _always("stopped on request after a checkpoint"),
    ),
    Signal(
        lambda seen: seen.exit_code == ExitCode.UNAVAILABLE,
        AttemptOutcome.CRASHED,
        _always("Unavailable"),
    ),
    Signal(
        lambda seen: seen.exit_code == ExitCode.IO_ERROR,
        AttemptOutcome.CRASHED,
        _always("InputOutputError"),
    ),
    Signal(
        lambda seen: not seen.job_exists,
        AttemptOutcome.CRASHED,
        _always("JobDeleted"),
        _always("somebody deleted its Job"),
    ),
    Signal(
        lambda seen: not seen.pod_exists and seen.exit_code is None,
        AttemptOutcome.CRASHED,
        _always("PodLost"),
        lambda seen: seen.verdict.text or "its pod vanished",
    ),
    Signal(
        lambda seen: True,
        AttemptOutcome.CRASHED,
        _always("Crashed"),
    ),
)


def classed(seen: Seen) -> Classed:
    """The class that the first signal gives; where the step itself reported an error, in the step's words."""
    signal = next(row for row in SIGNALS if row.seen(seen))
    reason = signal.reason(seen)
    message = signal.message(seen) if signal.message else seen.container_message or seen.verdict.text
    error = seen.error
    if error is None and signal.hint:
        error = StepError(reason=reason, message=message, hint=signal.hint(seen.step))
    if error is not None:
        return Classed(signal.outcome, error.reason, error.message, error)
    if message and seen.step and signal.outcome == AttemptOutcome.CRASHED and seen.exit_code is not None:
        message = f"container {_container(seen)} ended with exit code {seen.exit_code}: {message}"
    return Classed(signal.outcome, reason, message, None)


def _rule_on_gone_pod(seen: Seen) -> int | None:
    """The rule that matched, as far as it is about the pod in question: one that is there says itself what it met."""
    return None if seen.pod_exists else seen.verdict.rule


def _rejected(seen: Seen) -> bool:
    """Whether the kubelet would not have the pod: it then shows a reason, a message, and no container."""
    named = seen.pod_reason in _REJECTED or seen.pod_reason.startswith("OutOf")
    return seen.exit_code is None and (named or seen.pod_message.startswith("Pod was rejected"))


def _container(seen: Seen) -> str:
    return CONTAINERS[seen.step] if seen.step else "?"


def _storage_hint(step: Step | None) -> str:
    return f"raise limits.ephemeral-storage in spec.{'training' if step == Step.TRAIN else 'prepare'}.resources"


def _memory_hint(step: Step | None) -> str:
    if step == Step.TRAIN:
        return "raise spec.training.resources.limits.memory, or lower microBatchSize or dataset.maxLength"
    return "raise spec.prepare.resources.limits.memory"
