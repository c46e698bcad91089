"""Each row of the table of signals, by what it looks like; and that the earlier row decides."""

from __future__ import annotations

import pytest

from finetune.api.contract import Step, StepError
from finetune.api.status import AttemptOutcome
from finetune.controller.decision.stages.pod import DISRUPTED_RULE, NEVER_RETRIED_RULE, PREEMPTED_RULE
from finetune.controller.decision.stages.signals import SIGNALS, Seen, Verdict, classed

CRASHED, PREEMPTED, SUSPENDED = AttemptOutcome.CRASHED, AttemptOutcome.PREEMPTED, AttemptOutcome.SUSPENDED
EPHEMERAL, TOTAL = "exceeded its local ephemeral storage limit", "ephemeral local storage usage exceeds the total limit"


def seen(*, job_exists: bool = True, pod_exists: bool = True, **signs) -> Seen:
    return Seen(job_exists=job_exists, pod_exists=pod_exists, **({"step": Step.TRAIN} | signs))


OWN_LIMIT = 'Usage of EmptyDir volume "tmp" exceeds the limit "1Gi". '
PRESSURE = "The node was low on resource: memory. Threshold quantity: 100Mi, available: 90Mi. "

ROWS = [
    (0, seen(exit_code=65), AttemptOutcome.USER_ERROR, "UserError"),
    (0, seen(exit_code=65, suspended=True), AttemptOutcome.USER_ERROR, "UserError"),
    (0, seen(pod_exists=False, verdict=Verdict(rule=NEVER_RETRIED_RULE)), AttemptOutcome.USER_ERROR, "UserError"),
    (1, seen(pod_reason="Evicted", pod_message=OWN_LIMIT), CRASHED, "Evicted"),
    (1, seen(pod_reason="Evicted", pod_message=f'Container train {EPHEMERAL} "1Gi". '), CRASHED, "Evicted"),
    (1, seen(pod_reason="Evicted", pod_message=f"Pod {TOTAL} of containers 1Gi. "), CRASHED, "Evicted"),
    (2, seen(pod_reason="Evicted", pod_message=PRESSURE), PREEMPTED, "Evicted"),
    (2, seen(pod_reason="Evicted", disruption="TerminationByKubelet", exit_code=137), PREEMPTED, "Evicted"),
    (3, seen(exit_code=137, container_reason="OOMKilled"), AttemptOutcome.OUT_OF_MEMORY, "OutOfMemory"),
    (4, seen(suspended=True, exit_code=75), SUSPENDED, "Suspended"),
    (4, seen(suspended=True, exit_code=143, disruption="EvictionByEvictionAPI"), SUSPENDED, "Suspended"),
    (4, seen(suspended=True, job_exists=False, pod_exists=False), SUSPENDED, "Suspended"),
    (5, seen(disruption="DeletionByTaintManager"), AttemptOutcome.NODE_LOST, "DeletionByTaintManager"),
    (5, seen(disruption="DeletionByPodGC"), AttemptOutcome.NODE_LOST, "DeletionByPodGC"),
    (5, seen(disruption="NodeLost"), AttemptOutcome.NODE_LOST, "NodeLost"),
    (6, seen(held=True, exit_code=75), PREEMPTED, "SuspendedElsewhere"),
    (6, seen(held=True, exit_code=143), PREEMPTED, "SuspendedElsewhere"),
    *[
        (7, seen(step=None, pod_reason=reason, pod_message="x"), PREEMPTED, reason)
        for reason in ("UnexpectedAdmissionError", "OutOfcpu", "OutOfnvidia.com/gpu", "NodeAffinity", "NodeShutdown")
    ],
    (7, seen(step=None, pod_reason="TopologyAffinityError", pod_message="x"), PREEMPTED, "TopologyAffinityError"),
    (7, seen(step=None, pod_reason="Other", pod_message="Pod was rejected: no"), PREEMPTED, "Other"),
    (7, seen(pod_reason="Preempting", exit_code=137, disruption="TerminationByKubelet"), PREEMPTED, "Preempting"),
    (7, seen(pod_reason="Terminated", exit_code=75, disruption="TerminationByKubelet"), PREEMPTED, "Terminated"),
    (7, seen(pod_reason="NodeShutdown", exit_code=143), PREEMPTED, "NodeShutdown"),
    (8, seen(disruption="EvictionByEvictionAPI", exit_code=75), PREEMPTED, "EvictionByEvictionAPI"),
    (8, seen(pod_exists=False, verdict=Verdict(rule=DISRUPTED_RULE)), PREEMPTED, "DisruptionTarget"),
    (9, seen(container_reason="Unknown", exit_code=255), AttemptOutcome.NODE_LOST, "Unknown"),
    (
        9,
        seen(container_reason="ContainerStatusUnknown", exit_code=137),
        AttemptOutcome.NODE_LOST,
        "ContainerStatusUnknown",
    ),
    (10, seen(exit_code=75), PREEMPTED, "Preempted"),
    (10, seen(pod_exists=False, verdict=Verdict(rule=PREEMPTED_RULE)), PREEMPTED, "Preempted"),
    (11, seen(exit_code=69), CRASHED, "Unavailable"),
    (12, seen(exit_code=74), CRASHED, "InputOutputError"),
    (13, seen(job_exists=False), CRASHED, "JobDeleted"),
    (14, seen(pod_exists=False), CRASHED, "PodLost"),
    (15, seen(exit_code=1), CRASHED, "Crashed"),
    (15, seen(exit_code=1, held=True), CRASHED, "Crashed"),
    (15, seen(exit_code=255, container_reason="Error"), CRASHED, "Crashed"),
    (15, seen(verdict=Verdict(rule=DISRUPTED_RULE), exit_code=1), CRASHED, "Crashed"),
]


@pytest.mark.parametrize(("row", "signs", "outcome", "reason"), ROWS)
def test_a_signal_gives_the_class_and_no_earlier_row_takes_it(row, signs, outcome, reason):
    assert next(number for number, signal in enumerate(SIGNALS) if signal.seen(signs)) == row
    assert classed(signs)[:2] == (outcome, reason)


def test_every_row_has_its_test():
    assert {row for row, *_ in ROWS} == set(range(len(SIGNALS)))


@pytest.mark.parametrize(
    ("signs", "message"),
    [
        (seen(exit_code=65, container_message="Traceback"), "Traceback"),
        (seen(pod_reason="Evicted", pod_message="low on memory"), "low on memory"),
        (
            seen(exit_code=137, container_reason="OOMKilled"),
            "container train was killed for using more memory than its limit",
        ),
        (
            seen(
                step=None, pod_reason="OutOfcpu", pod_message="Pod was rejected: Node didn't have enough resource: cpu"
            ),
            "Pod was rejected: Node didn't have enough resource: cpu",
        ),
        (
            seen(exit_code=255, container_reason="Unknown"),
            "nobody saw container train end (exit code 255), as when its machine restarts",
        ),
        (seen(suspended=True, exit_code=75), "stopped because spec.suspend is true"),
        (seen(disruption="DeletionByPodGC", disruption_message="node gone"), "node gone"),
        (seen(disruption="Eviction", verdict=Verdict("it was evicted")), "it was evicted"),
        (seen(pod_reason="Evicted", exit_code=137, container_message="last words"), ""),
        (seen(disruption="Eviction", container_message='{"step": "train"}'), ""),
        (seen(exit_code=75), "stopped on request after a checkpoint"),
        (seen(exit_code=69, container_message="no route"), "container train ended with exit code 69: no route"),
        (seen(job_exists=False), "somebody deleted its Job"),
        (seen(pod_exists=False), "its pod vanished"),
        (seen(pod_exists=False, verdict=Verdict("too long")), "too long"),
        (seen(exit_code=1, verdict=Verdict("it failed")), "container train ended with exit code 1: it failed"),
    ],
)
def test_the_message_is_in_the_words_of_whoever_knows(signs, message):
    assert classed(signs).message == message


def test_what_the_step_itself_reported_comes_before_all_other_words():
    error = StepError(reason="BadRow", message="row 7 has no text", hint="mend it")
    assert classed(seen(exit_code=65, error=error))[1:] == ("BadRow", "row 7 has no text", error)


@pytest.mark.parametrize(("step", "hint"), [(Step.TRAIN, "spec.training.resources"), (Step.SAVE, "spec.prepare")])
def test_out_of_memory_comes_with_the_field_to_raise(step, hint):
    assert hint in classed(seen(exit_code=137, container_reason="OOMKilled", step=step)).error.hint


def test_the_job_controllers_sentence_is_read_whole():
    text = "Container train for pod team/tune-train-1-x failed with exit code 75 matching FailJob rule at index 1"
    assert Verdict.of({"message": text}) == Verdict(text, "tune-train-1-x", "train", 75, 1)
    text = "Pod team/tune-train-1-x has condition DisruptionTarget matching FailJob rule at index 0"
    assert Verdict.of({"message": text}) == Verdict(text, "tune-train-1-x", "", None, 0)
    assert Verdict.of(None) == Verdict()


def test_an_eviction_for_the_pods_own_use_of_the_disk_comes_with_the_field_to_raise():
    hint = classed(seen(pod_reason="Evicted", pod_message=OWN_LIMIT)).error.hint
    assert hint == "raise limits.ephemeral-storage in spec.training.resources"
