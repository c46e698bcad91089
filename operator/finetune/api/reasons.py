"""The reasons that the operator gives, in conditions and for the ends of attempts: constants, each with its meaning and
what to do. What a step reports as its own failure has the step's reason, and brings its remedy in the message.

`python docs/conditions.py` makes the page of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple


class Reason(StrEnum):
    """One word for why something is so."""

    # what goes on
    PENDING = "Pending"
    WAITING = "Waiting"
    RUNNING = "Running"
    SIDECAR_RUNS = "SidecarRuns"
    SUCCEEDED = "Succeeded"
    NOT_NEEDED = "NotNeeded"
    IN_PROGRESS = "InProgress"
    STOPPING = "Stopping"
    SUSPENDED = "Suspended"
    NOT_SUSPENDED = "NotSuspended"
    RESUMED = "Resumed"
    FINISHED = "Finished"
    RETRYING = "Retrying"

    # why a job failed, besides the reasons of attempts
    FAILED = "Failed"
    INVALID_SPEC = "InvalidSpec"
    NOT_IMPLEMENTED = "NotImplemented"
    SPEC_TOO_LARGE = "SpecTooLarge"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    PREEMPTION_LIMIT_EXCEEDED = "PreemptionLimitExceeded"
    WORKSPACE_LOST = "WorkspaceLost"

    # how an attempt ended
    USER_ERROR = "UserError"
    EVICTED = "Evicted"
    OUT_OF_MEMORY = "OutOfMemory"
    PREEMPTED = "Preempted"
    UNAVAILABLE = "Unavailable"
    INPUT_OUTPUT_ERROR = "InputOutputError"
    JOB_DELETED = "JobDeleted"
    POD_LOST = "PodLost"
    CRASHED = "Crashed"
    SPEC_CHANGED = "SpecChanged"
    START_DEADLINE_EXCEEDED = "StartDeadlineExceeded"
    HUNG = "Hung"

    # how Kubernetes ended a pod, in its own words
    PREEMPTION_BY_SCHEDULER = "PreemptionByScheduler"
    EVICTION_BY_API = "EvictionByEvictionAPI"
    DELETION_BY_TAINT_MANAGER = "DeletionByTaintManager"
    DELETION_BY_POD_GC = "DeletionByPodGC"
    TERMINATION_BY_KUBELET = "TerminationByKubelet"
    DISRUPTION_TARGET = "DisruptionTarget"
    NODE_LOST = "NodeLost"
    SUSPENDED_ELSEWHERE = "SuspendedElsewhere"


class Explained(NamedTuple):
    """What a reason means, and what to do about it; nothing where all is well."""

    meaning: str
    remedy: str = ""


REASONS: Mapping[Reason, Explained] = {
    Reason.PENDING: Explained("Nothing is known yet: its turn has not come."),
    Reason.WAITING: Explained(
        "The step is next, and its container does not run yet: the pod is queued, a volume or an image is on its way.",
        "`status.message` has the words of the scheduler, the kubelet or the storage.",
    ),
    Reason.RUNNING: Explained("The step's container runs."),
    Reason.SIDECAR_RUNS: Explained(
        "The step has ended, but a container that somebody injected into its pod still runs, and the pod ends with it.",
        "`status.message` names the container: have it injected as a native sidecar (an init container with "
        "restartPolicy Always), or not at all.",
    ),
    Reason.SUCCEEDED: Explained("It is done."),
    Reason.NOT_NEEDED: Explained("The spec asks for nothing of the kind."),
    Reason.IN_PROGRESS: Explained("The job is on its way; `status.phase` says where."),
    Reason.STOPPING: Explained("The job is to fail, and pods of it still run; FailureTarget says why it fails."),
    Reason.SUSPENDED: Explained(
        "The spec says `suspend: true`; nothing runs and everything is kept.", "`kubectl finetune resume NAME` goes on."
    ),
    Reason.NOT_SUSPENDED: Explained("The job was never suspended."),
    Reason.RESUMED: Explained("The job goes on after it was suspended."),
    Reason.FINISHED: Explained("The job has ended, so it is no longer suspended."),
    Reason.RETRYING: Explained("The job had failed, and `spec.retry.at` asked for another try."),
    Reason.FAILED: Explained("An attempt failed and nobody said why.", "Look at the pod's log."),
    Reason.INVALID_SPEC: Explained(
        "The spec cannot be read by this operator, or the API server refuses a child as the spec wants it.",
        "The message names the field: apply the job anew.",
    ),
    Reason.NOT_IMPLEMENTED: Explained(
        "The spec asks for something that nothing acts on yet.", "The message names field, value and what to use."
    ),
    Reason.SPEC_TOO_LARGE: Explained(
        "The spec is larger than a pod can carry.", "Move `tokens.add` into a ConfigMap, `tokens.addFrom`."
    ),
    Reason.DEADLINE_EXCEEDED: Explained(
        "The job's pods ran longer than `spec.activeDeadlineSeconds` in all.",
        "Raise it, then `kubectl finetune retry NAME`: the newest checkpoint is kept.",
    ),
    Reason.PREEMPTION_LIMIT_EXCEEDED: Explained(
        "The job was preempted more often than `spec.retry.preemptionLimit`.",
        "Raise it, or choose a priority or nodes where it may stay; then `kubectl finetune retry NAME`.",
    ),
    Reason.WORKSPACE_LOST: Explained(
        "The volume claim was deleted, and with it everything that the job had done.",
        "Delete the job and apply it again.",
    ),
    Reason.USER_ERROR: Explained(
        "A step ended with an exit code that says that trying again cannot help.", "The message has the step's words."
    ),
    Reason.EVICTED: Explained("The kubelet evicted the pod.", "The message says what the node was short of."),
    Reason.OUT_OF_MEMORY: Explained(
        "A container used more memory than its limit.",
        "Raise `resources.limits.memory` (or lower `microBatchSize`), then `kubectl finetune retry NAME`.",
    ),
    Reason.PREEMPTED: Explained("The pod was asked to go and stopped after a checkpoint; the next attempt goes on."),
    Reason.UNAVAILABLE: Explained("A store did not answer (exit code 69).", "It is tried again by itself."),
    Reason.INPUT_OUTPUT_ERROR: Explained("Reading or writing failed (exit code 74).", "Look at the volume."),
    Reason.JOB_DELETED: Explained("Somebody deleted the child Job.", "It is tried again by itself."),
    Reason.POD_LOST: Explained("The pod vanished without a word.", "It is tried again by itself."),
    Reason.CRASHED: Explained("A container ended with an error.", "Look at the pod's log."),
    Reason.SPEC_CHANGED: Explained(
        "The spec was changed while the job was suspended, so the suspended attempt was replaced by a new one."
    ),
    Reason.START_DEADLINE_EXCEEDED: Explained(
        "The pods of the attempt had not all started within `spec.startDeadlineSeconds`; another one tries after a "
        "pause. It is no failure.",
        "The message has the scheduler's words: ask for less, or wait.",
    ),
    Reason.HUNG: Explained(
        "No step was done for `spec.training.progressDeadlineSeconds`. It counts as a failure.",
        "The pod's log has the stacks of all threads; raise the deadline if a step, an evaluation or loading the model "
        "may take so long.",
    ),
    Reason.PREEMPTION_BY_SCHEDULER: Explained("A pod of higher priority took its place; it costs nothing."),
    Reason.EVICTION_BY_API: Explained("Somebody evicted or drained it; it costs nothing."),
    Reason.DELETION_BY_TAINT_MANAGER: Explained("Its node became unreachable or was tainted; it costs nothing."),
    Reason.DELETION_BY_POD_GC: Explained("Its node is gone; it costs nothing."),
    Reason.TERMINATION_BY_KUBELET: Explained("The kubelet had to end it; it costs nothing."),
    Reason.NODE_LOST: Explained("Its node does not answer, and the pod was removed by force; it costs nothing."),
    Reason.SUSPENDED_ELSEWHERE: Explained(
        "Somebody else suspended its Job, a queue for example; it costs nothing.", "`status.message` says who holds it."
    ),
    Reason.DISRUPTION_TARGET: Explained("It was disrupted, and nobody said how; it costs nothing."),
}
