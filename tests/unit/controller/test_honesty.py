"""Status says what is so: no condition, phase or promise that stands beside the facts."""

from __future__ import annotations

from datetime import timedelta

import pytest

from finetune.api.conditions import SUMMARIES, ConditionStatus, ConditionType, find, is_true
from finetune.api.contract import Step
from finetune.api.reasons import Reason
from finetune.api.status import FineTuneJobStatus, Phase, Progress
from finetune.controller.decision.decide import document
from tests.builders import NOW, Claim, FineTuneJob, Job, Pod
from tests.unit.controller.test_decide import decided, observe, prepared, started, trained

TRAINED = ConditionType.TRAINED


def training(**spec) -> FineTuneJob:
    """A job whose pod trains."""
    job = prepared(**spec)
    return job.with_status(decided(job, Claim(), Job("train"), Pod("train").on("n").running(Step.TRAIN)).status)


def trained_is(status: FineTuneJobStatus) -> tuple[str, str]:
    condition = find(status.conditions, TRAINED)
    return condition.status, condition.reason


def summary(status: FineTuneJobStatus) -> dict[str, str]:
    return {kind.value: find(status.conditions, kind).status.value for kind in SUMMARIES}


def complete(**spec) -> FineTuneJob:
    job = trained(**spec)
    return job.with_status(decided(job, Claim(), Job("save"), Pod("save").succeeded()).status)


class TestTheStepThatIsNext:
    def test_it_does_not_run_while_its_pod_is_queued(self):
        job = training()
        status = decided(job, Claim(), Job("train"), Pod("train").unschedulable("0/3 nodes")).status
        assert trained_is(status) == ("False", Reason.WAITING)
        assert status.phase == Phase.WAITING

    def test_it_waits_from_the_moment_that_its_job_is_made(self):
        status = decided(started(), Claim(), Job("prepare"), Pod("prepare").succeeded()).status
        assert trained_is(status) == ("False", Reason.WAITING)
        assert find(decided(FineTuneJob()).status.conditions, ConditionType.MODEL_DOWNLOADED).reason == Reason.WAITING

    def test_it_does_not_run_while_the_job_is_suspended(self):
        status = decided(training().with_spec(suspend=True), Claim(), Job("train").suspended()).status
        assert trained_is(status) == ("False", Reason.SUSPENDED)

    def test_it_has_the_reason_of_the_last_attempts_end_until_the_next_one(self):
        pod = Pod("train").on("n").failed(Step.TRAIN, 1)
        assert trained_is(decided(training(), Claim(), Job("train").failed(), pod).status) == ("False", Reason.CRASHED)

    def test_a_container_of_others_that_outlives_the_training_is_named(self):
        pod = Pod("train").on("n").ended(Step.TRAIN, 0, {"step": "train", "result": {"steps": 4}})
        item = pod.build()
        item["status"]["phase"] = "Running"
        item["status"]["containerStatuses"].append({"name": "istio-proxy", "state": {"running": {}}})

        class Built:
            def build(self):
                return item

        status = decided(training(), Claim(), Job("train"), Built()).status
        assert trained_is(status) == ("False", Reason.SIDECAR_RUNS)
        assert "pod tune-train-1-x" in status.message
        assert "container istio-proxy" in status.message


class TestPhase:
    def test_it_is_pending_only_before_anything_ran(self):
        assert decided(FineTuneJob()).status.phase == Phase.PENDING
        queued = Pod("prepare").unschedulable("0/3 nodes")
        assert decided(started(), Claim(), Job("prepare"), queued).status.phase == Phase.PENDING

    def test_between_two_stages_the_job_waits(self):
        job = started()
        pod = Pod("prepare").on("n").running(Step.LOAD_DATASET)
        job.with_status(decided(job, Claim(), Job("prepare"), pod).status)
        assert decided(job, Claim(), Job("prepare"), Pod("prepare").succeeded()).status.phase == Phase.WAITING

    def test_a_pause_before_the_next_attempt_is_no_beginning(self):
        pod = Pod("train").on("n").failed(Step.TRAIN, 1)
        assert decided(training(), Claim(), Job("train").failed(), pod).status.phase == Phase.WAITING


class TestEnds:
    def test_a_job_that_failed_is_not_suspended_besides(self):
        job = training().with_spec(suspend=True)
        job.with_status(decided(job, Claim(), Job("train").suspended()).status)
        assert is_true(observe(job).status.conditions, ConditionType.SUSPENDED)
        bad = Pod("train").on("n").failed(Step.TRAIN, 65)
        status = decided(job, Claim(), Job("train").suspended().failed_by_rule(2, code=65), bad).status
        assert is_true(status.conditions, ConditionType.FAILED)
        suspended = find(status.conditions, ConditionType.SUSPENDED)
        assert (suspended.status, suspended.reason) == ("False", Reason.FINISHED)

    def test_a_finished_job_that_is_edited_is_observed(self):
        job = complete().with_spec(ttlSecondsAfterFailed=5).edited()
        decision = decided(job, Claim(), after=60)
        assert decision.status.observed_generation == 2
        assert {item.observed_generation for item in decision.status.conditions} == {2}
        assert decision.status.phase == Phase.COMPLETE
        assert decision.status.completion_time == NOW
        assert not decided(job.with_status(decision.status), Claim(), after=61).status


class TestPromises:
    def shown(self, **fields) -> FineTuneJob:
        progress = Progress(step="train", percent=50, remaining="5m", last_update_time=NOW, **fields)
        job = training()
        return job.with_status({**document_of(job), "progress": progress.wire()})

    @pytest.mark.parametrize(("minutes", "remaining"), [(1, "5m"), (5, "")])
    def test_no_time_is_promised_when_the_pod_stopped_reporting(self, minutes, remaining):
        job, pod = self.shown(), Pod("train").on("n").running(Step.TRAIN)
        decision = decided(job, Claim(), Job("train"), pod, after=60 * minutes)
        assert (decision.progress or observe(job).status.progress).remaining == remaining

    def test_somebody_looks_when_it_has_been_silent_for_too_long_and_then_no_more(self):
        job, pod = self.shown(), Pod("train").on("n").running(Step.TRAIN)
        decision = decided(job, Claim(), Job("train"), pod)
        assert decision.again_at == NOW + timedelta(minutes=5)
        assert decided(job, Claim(), Job("train"), pod, after=300).again_at is None


class TestWhatOtherToolsRead:
    def test_a_job_on_its_way_reconciles(self):
        wanted = {"Ready": "False", "Reconciling": "True", "Stalled": "False"}
        for job in (started(), training(), trained()):
            assert summary(observe(job).status) == wanted

    def test_a_complete_one_is_ready(self):
        assert summary(observe(complete()).status) == {"Ready": "True", "Reconciling": "False", "Stalled": "False"}

    def test_a_failed_one_is_stalled_for_its_reason(self):
        status = decided(FineTuneJob().with_spec(layout="SinglePod")).status
        assert summary(status) == {"Ready": "False", "Reconciling": "False", "Stalled": "True"}
        assert find(status.conditions, ConditionType.STALLED).reason == Reason.NOT_IMPLEMENTED
        assert "spec.layout" in find(status.conditions, ConditionType.STALLED).message

    def test_one_that_stops_before_it_fails_still_reconciles(self):
        job, pod = training(activeDeadlineSeconds=60), Pod("train").on("n").running(Step.TRAIN)
        status = decided(job, Claim(), Job("train"), pod, after=60).status
        assert summary(status) == {"Ready": "False", "Reconciling": "True", "Stalled": "False"}
        assert find(status.conditions, ConditionType.RECONCILING).reason == Reason.STOPPING

    def test_a_suspended_one_waits_for_nobody_but_its_user(self):
        status = decided(training().with_spec(suspend=True), Claim(), Job("train").suspended()).status
        assert summary(status) == {"Ready": "False", "Reconciling": "False", "Stalled": "False"}
        assert find(status.conditions, ConditionType.READY).reason == Reason.SUSPENDED

    def test_every_condition_is_there_from_the_first_write_with_a_status_that_kubernetes_knows(self):
        conditions = decided(FineTuneJob()).status.conditions
        assert {item.type for item in conditions} == set(ConditionType)
        assert {item.status for item in conditions} <= set(ConditionStatus)


def document_of(job: FineTuneJob):
    return document(observe(job).status)
