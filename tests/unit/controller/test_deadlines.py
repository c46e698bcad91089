"""Deadlines that mean what people mean: of starting, of getting on, of running; and a limit for preemptions."""

from __future__ import annotations

from datetime import timedelta

import pytest

from finetune.api.conditions import ConditionType, find, is_true
from finetune.api.contract import Step
from finetune.api.reasons import Reason
from finetune.api.status import AttemptOutcome, Phase, Progress
from finetune.controller.decision.decide import document
from tests.builders import NOW, Claim, FineTuneJob, Job, Pod
from tests.unit.controller.test_decide import created, decided, observe, prepared, started

QUEUED = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."


def later(seconds: float):
    return NOW + timedelta(seconds=seconds)


class TestStartDeadline:
    def queued(self, **spec) -> tuple[FineTuneJob, tuple]:
        job = prepared(startDeadlineSeconds=60, **spec)
        return job, (Claim(), Job("train").started(), Pod("train").unschedulable(QUEUED))

    def test_an_attempt_that_does_not_start_in_time_is_withdrawn_in_the_schedulers_words(self):
        job, children = self.queued()
        waiting = decided(job, *children)
        assert waiting.again_at == later(60)
        assert not waiting.delete
        decision = decided(job, *children, after=60)
        assert [child.name for child in decision.delete] == ["tune-train-1"]
        assert "spec.startDeadlineSeconds, 60 s" in decision.status.message
        assert QUEUED in decision.status.message

    def test_it_is_no_failure_and_the_next_one_waits_for_longer_each_time(self):
        job, children = self.queued(retry={"limit": 0})
        at = 60.0
        for number, pause in enumerate((10, 20, 40), 1):
            job.with_status(decided(job, *children, after=at).status)
            decision = decided(job, Claim(), after=at + 1)
            ended = decision.status.attempts.history[-1]
            assert (ended.outcome, ended.reason) == (AttemptOutcome.NEVER_STARTED, Reason.START_DEADLINE_EXCEEDED)
            assert (decision.status.attempts.failures, decision.status.attempts.preemptions) == (0, 0)
            assert decision.status.attempts.retry_after == later(at + 1 + pause)
            assert decision.status.phase == Phase.WAITING
            job.with_status(decision.status)
            at += 1 + pause
            decision = decided(job, Claim(), after=at)
            assert created(decision) == [f"Job/tune-train-{number + 1}"]
            job.with_status(decision.status)
            child = Job("train", number + 1).started(later(at))
            children = (Claim(), child, Pod("train", number + 1).unschedulable(QUEUED))
            at += 60

    def test_the_next_one_waits_until_the_pods_of_the_withdrawn_one_are_gone(self):
        job, children = self.queued()
        job.with_status(decided(job, *children, after=60).status)
        decision = decided(job, Claim(), Pod("train").unschedulable(QUEUED).deleting(later(90)), after=61)
        assert not decision.create

    def test_a_deletion_that_a_crash_prevented_is_made_up_for(self):
        job, children = self.queued()
        job.with_status(decided(job, *children, after=60).status)
        assert [child.name for child in decided(job, *children, after=61).delete] == ["tune-train-1"]

    def test_one_pod_of_two_is_not_enough(self):
        job = prepared(startDeadlineSeconds=60, workspace={"accessModes": ["ReadWriteMany"]}).training(
            nodes=2, batchSize=2
        )
        pods = (Pod("train", index=0).on("n").running(Step.TRAIN), Pod("train", index=1).unschedulable(QUEUED))
        decision = decided(job, Claim(), Job("train").started(), *pods, after=60)
        assert decision.delete
        assert "1 of its 2 pods had not started" in decision.status.message

    def test_an_attempt_that_started_has_no_such_deadline(self):
        job, _ = self.queued()
        pod = Pod("train").on("n").running(Step.TRAIN)
        assert not decided(job, Claim(), Job("train").started(), pod, after=3_600).delete

    @pytest.mark.parametrize("child", [Job("train").suspended(), Job("train")], ids=["held by a queue", "not taken up"])
    def test_time_in_which_nothing_could_start_does_not_count(self, child):
        job, _ = self.queued()
        assert not decided(job, Claim(), child, after=3_600).delete


class TestProgressDeadline:
    def training(self, last: float, advanced: float) -> FineTuneJob:
        job = prepared().training(progressDeadlineSeconds=100)
        job.with_status(decided(job, Claim(), Job("train"), self.pod()).status)
        shown = Progress(
            step="train", percent=50, current=2, last_update_time=later(last), last_advance_time=later(advanced)
        )
        return job.with_status({**document(observe(job).status), "progress": shown.wire()})

    def pod(self) -> Pod:
        return Pod("train").on("n").running(Step.TRAIN, since=later(0))

    def test_a_training_that_reports_no_step_any_more_is_ended_a_minute_after_its_own_watch_should_have(self):
        job = self.training(last=140, advanced=50)
        before = decided(job, Claim(), Job("train"), self.pod(), after=209)
        assert not before.delete
        assert before.again_at == later(50 + 100 + 60)
        decision = decided(job, Claim(), Job("train"), self.pod(), after=210)
        assert [child.name for child in decision.delete] == ["tune-train-1"]
        assert "no step since 12:00:50 UTC" in decision.status.message

    def test_it_counts_as_a_failure(self):
        job = self.training(last=140, advanced=50)
        job.with_status({**document(decided(job, Claim(), Job("train"), self.pod(), after=210).status)})
        decision = decided(job, Claim(), after=220)
        ended = decision.status.attempts.history[-1]
        assert (ended.outcome, ended.reason) == (AttemptOutcome.CRASHED, Reason.HUNG)
        assert decision.status.attempts.failures == 1
        assert find(decision.status.conditions, ConditionType.TRAINED).reason == Reason.HUNG

    def test_reports_of_the_attempt_before_say_nothing_about_this_one(self):
        job = self.training(last=-10, advanced=-10)
        assert not decided(job, Claim(), Job("train"), self.pod(), after=3_600).delete

    def test_a_trainer_that_never_reports_is_left_alone(self):
        job = prepared().training(progressDeadlineSeconds=100)
        assert not decided(job, Claim(), Job("train"), self.pod(), after=3_600).delete


class TestActiveDeadline:
    def test_neither_queueing_nor_suspension_counts(self):
        job, running = prepared(activeDeadlineSeconds=100), Pod("train").on("n").running(Step.TRAIN)
        job.with_status(decided(job, Claim(), Job("train"), Pod("train").unschedulable(QUEUED), after=500).status)
        job.with_status(decided(job, Claim(), Job("train"), running, after=1_000).status)
        job.with_spec(suspend=True)
        job.with_status(decided(job, Claim(), Job("train").suspended(), after=1_060).status)
        assert observe(job).status.active_seconds == 60
        assert decided(job, Claim(), Job("train").suspended(), after=9_000).status is None
        job.with_spec(suspend=False)
        resumed = decided(job, Claim(), Job("train"), running, after=10_000)
        assert resumed.again_at == later(10_040)
        job.with_status(resumed.status)
        stopping = decided(job, Claim(), Job("train"), running, after=10_040).status
        assert find(stopping.conditions, ConditionType.FAILURE_TARGET).reason == Reason.DEADLINE_EXCEEDED

    def test_it_begins_anew_with_a_retry(self):
        job, pod = prepared(activeDeadlineSeconds=100), Pod("train").on("n").running(Step.TRAIN)
        job.with_status(decided(job, Claim(), Job("train"), pod).status)
        job.with_status(decided(job, Claim(), Job("train"), pod, after=100).status)
        job.with_status(decided(job, Claim().kept(), after=103).status)
        assert is_true(observe(job).status.conditions, ConditionType.FAILED)
        decision = decided(job.with_spec(retry={"at": "now"}), Claim().kept(), after=200)
        assert created(decision) == ["Job/tune-train-2"]
        assert decision.status.active_seconds is None


class TestPreemptionLimit:
    def preempted(self, times: int, limit: int | None):
        job = prepared(retry={"limit": 0, **({} if limit is None else {"preemptionLimit": limit})})
        for number in range(1, times + 1):
            pod = Pod("train", number).on("n").failed(Step.TRAIN, 75).disrupted()
            decision = decided(job, Claim(), Job("train", number).failed_by_rule(0), pod, after=3_600 * number)
            job.with_status(decision.status)
        return observe(job).status

    def test_without_one_preemptions_never_fail_a_job(self):
        assert not is_true(self.preempted(20, None).conditions, ConditionType.FAILED)

    def test_beyond_it_the_job_fails_and_says_how_it_was_preempted(self):
        assert not is_true(self.preempted(2, 2).conditions, ConditionType.FAILED)
        failed = find(self.preempted(3, 2).conditions, ConditionType.FAILED)
        assert (failed.status, failed.reason) == ("True", Reason.PREEMPTION_LIMIT_EXCEEDED)
        assert "preempted 3 times, spec.retry.preemptionLimit is 2" in failed.message
        assert "evicted" in failed.message


def test_a_job_that_has_no_deadlines_is_visited_for_none():
    assert decided(started(), Claim(), Job("prepare"), Pod("prepare").on("n").running(Step.DOWNLOAD)).again_at is None
