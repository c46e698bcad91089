"""How the end of an attempt is classified."""

from __future__ import annotations

import pytest

from finetune.api.contract import Step
from finetune.api.status import AttemptOutcome
from finetune.controller.observed import Observed
from finetune.controller.stages import train
from tests.builders import FineTuneJob, Job, Pod, error_report


def judged(job: Job | None, *pods: Pod):
    observed = Observed(job=FineTuneJob().build())
    return train.outcome(observed, job and job.build(), 1, tuple(pod.build() for pod in pods))


FAILED = Job("train").failed()


@pytest.mark.parametrize(
    ("pod", "outcome", "reason"),
    [
        (Pod("train").failed(Step.TRAIN, 75), AttemptOutcome.PREEMPTED, "Preempted"),
        (Pod("train").failed(Step.TRAIN, 143).disrupted(), AttemptOutcome.PREEMPTED, "EvictionByEvictionAPI"),
        (Pod("train").disrupted("PreemptionByScheduler").evicted("x"), AttemptOutcome.CRASHED, "Evicted"),
        (
            Pod("train").failed(Step.TRAIN, 137).disrupted("DeletionByTaintManager"),
            AttemptOutcome.NODE_LOST,
            "DeletionByTaintManager",
        ),
        (Pod("train").failed(Step.TRAIN, 137, "", "OOMKilled"), AttemptOutcome.OUT_OF_MEMORY, "OutOfMemory"),
        (Pod("train").failed(Step.TRAIN, 1, "Traceback"), AttemptOutcome.CRASHED, "Crashed"),
        (Pod("train").failed(Step.TRAIN, 69), AttemptOutcome.CRASHED, "Unavailable"),
        (Pod("train").failed(Step.TRAIN, 74), AttemptOutcome.CRASHED, "InputOutputError"),
        (Pod("train").failed(Step.TRAIN, 64), AttemptOutcome.USER_ERROR, "UserError"),
        (Pod("train").failed(Step.TRAIN, 65), AttemptOutcome.USER_ERROR, "UserError"),
        (Pod("train").failed(Step.TRAIN, 66), AttemptOutcome.USER_ERROR, "UserError"),
        (
            Pod("train").failed(Step.TRAIN, 78, error_report(Step.TRAIN, "BadBatch", "x")),
            AttemptOutcome.USER_ERROR,
            "BadBatch",
        ),
        (Pod("train").failed(Step.TRAIN, 65).disrupted(), AttemptOutcome.USER_ERROR, "UserError"),
    ],
)
def test_each_end_has_its_class(pod, outcome, reason):
    found = judged(FAILED, pod)
    assert found.over
    assert (found.attempt.outcome, found.attempt.reason) == (outcome, reason)


def test_a_traceback_is_kept_as_the_message():
    message = judged(FAILED, Pod("train").failed(Step.TRAIN, 1, "ZeroDivisionError: x")).attempt.message
    assert message == "container train ended with exit code 1: ZeroDivisionError: x"


def test_without_pod_the_rule_that_matched_tells():
    assert judged(Job("train").failed_by_rule(0)).attempt.outcome == AttemptOutcome.PREEMPTED
    assert judged(Job("train").failed_by_rule(1, code=75)).attempt.outcome == AttemptOutcome.PREEMPTED
    found = judged(Job("train").failed_by_rule(2, code=66))
    assert (found.attempt.outcome, found.attempt.exit_code) == (AttemptOutcome.USER_ERROR, 66)
    assert judged(FAILED).attempt.reason == "PodLost"


def test_a_succeeded_pod_is_success_before_the_job_says_so():
    found = judged(Job("train"), Pod("train").succeeded())
    assert found.over
    assert found.succeeded


def test_a_succeeded_pod_is_not_the_end_while_another_still_runs():
    assert not judged(Job("train"), Pod("train").succeeded(), Pod("train", suffix="y").running(Step.TRAIN)).over


def test_a_failed_pod_beside_a_living_one_is_not_the_end():
    assert not judged(FAILED, Pod("train").failed(Step.TRAIN, 1), Pod("train", suffix="y").running(Step.TRAIN)).over


def test_a_report_of_another_step_is_not_believed():
    pod = Pod("train").failed(Step.TRAIN, 65, error_report(Step.SAVE, "Invented", "x"))
    assert judged(FAILED, pod).error is None


def test_checkpoints_are_taken_from_the_report():
    report = {"step": "train", "resumedFromStep": 50, "result": {"checkpoint": {"step": 100}}}
    attempt = judged(FAILED, Pod("train").failed(Step.TRAIN, 75, report)).attempt
    assert (attempt.resumed_from_step, attempt.checkpoint_step) == (50, 100)
