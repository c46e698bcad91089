"""How the end of an attempt is classified."""

from __future__ import annotations

from datetime import timedelta

import pytest

from finetune.api.contract import Step
from finetune.api.status import AttemptOutcome
from finetune.controller.decision.observed import Observed, Warned
from finetune.controller.decision.stages import train
from tests.builders import NOW, FineTuneJob, Job, Pod, error_report


def judged(job: Job | None, *pods: Pod, nodes: int = 1, warnings: tuple[Warned, ...] = ()):
    observed = Observed(job=FineTuneJob().training(nodes=nodes, batchSize=nodes).build(), warnings=warnings)
    return train.outcome(observed, job and job.build(), 1, tuple(pod.build() for pod in pods))


FAILED = Job("train").failed()


@pytest.mark.parametrize(
    ("pod", "outcome", "reason"),
    [
        (Pod("train").failed(Step.TRAIN, 75), AttemptOutcome.PREEMPTED, "Preempted"),
        (Pod("train").failed(Step.TRAIN, 143).disrupted(), AttemptOutcome.PREEMPTED, "EvictionByEvictionAPI"),
        (
            Pod("train").disrupted("TerminationByKubelet").evicted("The node was low on resource: memory."),
            AttemptOutcome.PREEMPTED,
            "Evicted",
        ),
        (
            Pod("train").evicted('Usage of EmptyDir volume "tmp" exceeds the limit "1Gi".'),
            AttemptOutcome.CRASHED,
            "Evicted",
        ),
        (
            Pod("train").on("n").refused_by_the_kubelet("OutOfnvidia.com/gpu", "Pod was rejected: no gpu"),
            AttemptOutcome.PREEMPTED,
            "OutOfnvidiacomgpu",
        ),
        (Pod("train").failed(Step.TRAIN, 255, "", "Unknown"), AttemptOutcome.NODE_LOST, "Unknown"),
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


# --- several pods


def test_several_pods_are_done_when_each_index_succeeded():
    first, second = Pod("train", index=0).succeeded(), Pod("train", index=1)
    assert not judged(Job("train"), first, second.running(Step.TRAIN), nodes=2).succeeded
    again = Pod("train", index=0, suffix="y").succeeded()
    assert not judged(Job("train"), first, again, nodes=2).succeeded
    found = judged(Job("train"), first, Pod("train", index=1).succeeded(), nodes=2)
    assert found.over
    assert found.succeeded


def test_the_first_pod_is_shown_for_all_while_nothing_is_wrong():
    pods = [Pod("train", index=index).on(f"node-{index}").running(Step.TRAIN) for index in (1, 0)]
    found = judged(Job("train"), *pods, nodes=2)
    assert found.running_step == Step.TRAIN
    assert (found.attempt.pod, found.attempt.node) == ("tune-train-1-0-x", "node-0")


def test_the_words_of_whichever_pod_waits_are_shown_while_the_others_stand_by():
    pods = Pod("train", index=0).running(Step.TRAIN), Pod("train", index=1).unschedulable("0/3 nodes: no GPU")
    assert judged(Job("train"), *pods, nodes=2).waits_for == "pod 1 of 2: Unschedulable: 0/3 nodes: no GPU"


def test_a_quota_that_lets_one_pod_through_is_told():
    said = Warned("Job", "tune-train-1", "job-1-train-1", "FailedCreate", "exceeded quota")
    waits = judged(Job("train"), Pod("train", index=0).running(Step.TRAIN), nodes=2, warnings=(said,)).waits_for
    assert waits == "a pod (there are 1 of 2) cannot be created: FailedCreate: exceeded quota"


def later(seconds: int):
    return NOW + timedelta(seconds=seconds)


BROKEN = error_report(Step.TRAIN, "LossNotFinite", "step 3: the loss is nan")


@pytest.mark.parametrize(
    ("first", "second", "outcome", "reason", "pod"),
    [
        (
            Pod("train", index=0).failed(Step.TRAIN, 69, at=later(1)),
            Pod("train", index=1).failed(Step.TRAIN, 137),
            AttemptOutcome.CRASHED,
            "Crashed",
            1,
        ),
        (
            Pod("train", index=0).failed(Step.TRAIN, 69),
            Pod("train", index=1).failed(Step.TRAIN, 65, BROKEN),
            AttemptOutcome.USER_ERROR,
            "LossNotFinite",
            1,
        ),
        (
            Pod("train", index=0).failed(Step.TRAIN, 75, at=later(2)),
            Pod("train", index=1).failed(Step.TRAIN, 75, at=later(3)).disrupted(),
            AttemptOutcome.PREEMPTED,
            "EvictionByEvictionAPI",
            1,
        ),
        (
            Pod("train", index=0).failed(Step.TRAIN, 69, at=later(300)),
            Pod("train", index=1).failed(Step.TRAIN, 137, at=later(300)).disrupted("DeletionByTaintManager"),
            AttemptOutcome.NODE_LOST,
            "DeletionByTaintManager",
            1,
        ),
        (
            Pod("train", index=0).failed(Step.TRAIN, 137, "", "OOMKilled"),
            Pod("train", index=1).failed(Step.TRAIN, 75),
            AttemptOutcome.OUT_OF_MEMORY,
            "OutOfMemory",
            0,
        ),
        (
            Pod("train", index=0).failed(Step.TRAIN, 1, "Traceback"),
            Pod("train", index=1).failed(Step.TRAIN, 75, at=later(30)).disrupted(at=later(20)),
            AttemptOutcome.CRASHED,
            "Crashed",
            0,
        ),
    ],
)
def test_the_class_comes_from_the_pod_that_failed_first(first, second, outcome, reason, pod):
    found = judged(FAILED, first, second, nodes=2)
    assert found.over
    assert (found.attempt.outcome, found.attempt.reason) == (outcome, reason)
    assert found.attempt.pod == f"tune-train-1-{pod}-x"


def test_the_verdict_on_a_pod_that_is_gone_is_not_overruled_by_one_that_fell_with_it():
    report = {"step": "train", "resumedFromStep": 50, "result": {"checkpoint": {"step": 100}}}
    left = Pod("train", index=0).failed(Step.TRAIN, 69, report)
    found = judged(Job("train").failed_by_rule(0, suffix="1-x"), left, nodes=2)
    assert found.attempt.outcome == AttemptOutcome.PREEMPTED
    assert (found.attempt.resumed_from_step, found.attempt.checkpoint_step) == (50, 100)


def test_one_pod_that_failed_is_not_the_end_while_the_other_runs():
    pods = Pod("train", index=0).running(Step.TRAIN), Pod("train", index=1).failed(Step.TRAIN, 1)
    found = judged(FAILED, *pods, nodes=2)
    assert not found.over
    assert found.live


# --- when it is over


@pytest.mark.parametrize(
    ("job", "over"),
    [
        (Job("train").failing(terminating=1), False),
        (Job("train").failing(terminating=0, active=1), False),
        (Job("train").failing(), False),  # a server that does not count pods that are told to stop
        (Job("train").failing(terminating=0), True),
        (Job("train").failing(terminating=1).failed(), True),
    ],
)
def test_a_job_that_will_fail_is_not_over_while_it_counts_pods_that_nobody_saw(job, over):
    assert judged(job, Pod("train", index=0).failed(Step.TRAIN, 1), nodes=2).over == over


def test_pods_that_only_the_job_counts_still_run():
    assert judged(Job("train").failing(terminating=1)).live


def test_an_end_that_no_pod_explains_yet_says_since_when():
    assert judged(Job("train").complete().ended_at(NOW)).unseen_since == NOW
    assert judged(Job("train").failed().ended_at(NOW)).unseen_since == NOW
    assert judged(Job("train").complete().ended_at(NOW), Pod("train").succeeded()).unseen_since is None
    assert judged(Job("train").failed().ended_at(NOW), Pod("train").failed(Step.TRAIN, 1)).unseen_since is None


def test_a_report_that_the_kubelet_cut_is_told_with_the_attempt():
    message = '{"step": "train", "result": {"steps": 1, "warnings": ["' + "x" * 4100
    found = judged(FAILED, Pod("train").failed(Step.TRAIN, 1, message[:4096])).attempt.message
    assert "keep it below 4096 bytes" in found
