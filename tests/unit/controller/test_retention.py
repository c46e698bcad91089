"""What becomes of a workspace when its job is over, and how a failed job goes on."""

from __future__ import annotations

from datetime import timedelta

import pytest

from finetune.api.conditions import ConditionStatus, ConditionType, find, is_true
from finetune.api.contract import KEPT_ANNOTATION, KEPT_LABEL, SPEC_LABEL, Step
from finetune.api.reasons import Reason
from finetune.api.status import AttemptOutcome, Phase
from finetune.controller.decision.stages.pod import spec_digest
from finetune.controller.decision.transitions import transitions
from tests.builders import NOW, Claim, FineTuneJob, Job, Pod, error_report
from tests.unit.controller.test_decide import created, decided, observe, prepared, started, trained

LONG = 365 * 86_400


def crashed_while_saving():
    return Job("save").failed(), Pod("save").on("n").failed(Step.SAVE, 65, error_report(Step.SAVE, "DiskFull", "full"))


def failed(**spec) -> FineTuneJob:
    """A job that failed as its result was saved."""
    job = trained(**spec)
    return job.with_status(decided(job, Claim(), *crashed_while_saving()).status)


class TestRetention:
    def test_the_claim_goes_with_its_job_until_that_fails(self):
        (claim, _) = decided(FineTuneJob()).create
        assert claim["metadata"]["ownerReferences"][0]["uid"] == "job-1"
        decision = decided(trained(), Claim(), *crashed_while_saving())
        ((child, change),) = decision.keep
        assert is_true(decision.status.conditions, ConditionType.FAILED)
        assert (child.kind, child.name) == ("PersistentVolumeClaim", "tune-work")
        assert change["ownerReferences"] is None
        assert change["labels"] == {KEPT_LABEL: "true"}
        assert change["annotations"] == {KEPT_ANNOTATION: "team/tune/job-1"}

    def test_a_release_that_a_crash_prevented_is_made_up_for(self):
        assert decided(failed(), Claim()).keep
        assert not decided(failed(), Claim().kept()).keep

    def test_it_is_kept_already_while_pods_of_a_failing_job_stop(self):
        job = started(activeDeadlineSeconds=60)
        children = (Claim(), Job("prepare"), Pod("prepare").on("n").running(Step.DOWNLOAD))
        decision = decided(job.with_status(decided(job, *children).status), *children, after=60)
        assert decision.status.phase == Phase.STOPPING
        assert decision.keep

    def test_a_completed_job_takes_its_claim_along(self):
        job = trained()
        decision = decided(job, Claim(), Job("save"), Pod("save").succeeded())
        assert not decision.keep
        assert not decided(job.with_status(decision.status), Claim()).keep

    def test_always_means_that_it_never_has_an_owner(self):
        (claim, _) = decided(FineTuneJob().with_spec(workspace={"retain": "Always"})).create
        assert "ownerReferences" not in claim["metadata"]
        assert claim["metadata"]["labels"][KEPT_LABEL] == "true"
        assert claim["metadata"]["annotations"] == {KEPT_ANNOTATION: "team/tune/job-1"}

    def test_always_said_later_holds_from_then_on_and_can_be_taken_back(self):
        job = prepared()
        ((_, change),) = decided(job.with_spec(workspace={"retain": "Always"}), Claim(), Job("train")).keep
        assert change["ownerReferences"] is None
        ((_, change),) = decided(job.with_spec(workspace={"retain": "Never"}), Claim().kept(), Job("train")).keep
        (owner,) = change["ownerReferences"]
        assert owner["uid"] == "job-1"
        assert change["labels"] == {KEPT_LABEL: None}

    def test_never_lets_it_go_with_a_failed_job(self):
        assert not decided(trained(workspace={"retain": "Never"}), Claim(), *crashed_while_saving()).keep

    def test_other_owners_of_the_claim_stay(self):
        claim = Claim()
        other = {"apiVersion": "v1", "kind": "ConfigMap", "name": "other", "uid": "o"}
        claim._item["metadata"]["ownerReferences"].append(other)
        ((_, change),) = decided(failed(), claim).keep
        assert change["ownerReferences"] == [other]

    def test_a_new_job_of_the_name_is_told_how_to_go_on_from_the_kept_claim(self):
        decision = decided(FineTuneJob(uid="job-2"), Claim(owner="job-1").kept())
        assert not decision.create
        assert "spec.workspace.claimName: tune-work" in decision.status.message
        assert "delete the claim" in decision.status.message

    def test_a_job_that_names_the_kept_claim_goes_on_from_it(self):
        job = FineTuneJob(uid="job-2").with_spec(workspace={"claimName": "tune-work"})
        decision = decided(job, Claim(owner="job-1").kept())
        assert created(decision) == ["Job/tune-prepare-1"]
        (volume, *_) = decision.create[0]["spec"]["template"]["spec"]["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == "tune-work"
        assert not decision.keep


class TestTimeToLive:
    def test_a_failed_job_is_not_deleted_by_the_time_for_completed_ones(self):
        job = failed(ttlSecondsAfterFinished=8)
        assert not decided(job, Claim().kept(), after=LONG).delete

    def test_it_has_a_time_of_its_own(self):
        job = failed(ttlSecondsAfterFailed=100)
        assert decided(job, Claim().kept()).again_at == NOW + timedelta(seconds=100)
        (child,) = decided(job, Claim().kept(), after=100).delete
        assert child.kind == "FineTuneJob"

    def test_a_completed_one_is_not_deleted_by_the_time_for_failed_ones(self):
        job = trained(ttlSecondsAfterFailed=1)
        job.with_status(decided(job, Claim(), Job("save"), Pod("save").succeeded()).status)
        assert not decided(job, Claim(), after=LONG).delete


class TestRetry:
    def test_a_changed_retry_starts_the_failed_stage_again_and_nothing_before_it(self):
        job = failed(retry={"limit": 3, "at": "first"}).with_spec(retry={"limit": 3, "at": "again"})
        decision = decided(job, Claim().kept(), *crashed_while_saving(), after=60)
        assert created(decision) == ["Job/tune-save-2"]
        status = decision.status
        assert status.completion_time is None
        condition = find(status.conditions, ConditionType.FAILED)
        assert (condition.status, condition.reason) == (ConditionStatus.FALSE, "Retrying")
        assert (status.attempts.failures, status.attempts.retried_at) == (0, "again")

    def test_an_event_tells_of_it(self):
        job = failed().with_spec(retry={"at": "again"})
        told = transitions(observe(job).status, decided(job, Claim().kept()).status)
        assert [item.reason for item in told] == [Reason.RETRYING]

    def test_the_claim_belongs_to_the_job_again(self):
        job = failed().with_spec(retry={"at": "again"})
        ((_, change),) = decided(job, Claim().kept()).keep
        (owner,) = change["ownerReferences"]
        assert owner["uid"] == "job-1"

    def test_the_same_word_again_starts_nothing(self):
        job = failed().with_spec(retry={"at": "again"})
        job.with_status(decided(job, Claim().kept(), *crashed_while_saving()).status)
        again = crashed_while_saving()
        pod = Pod("save", 2).on("n").failed(Step.SAVE, 65, error_report(Step.SAVE, "DiskFull", "full"))
        job.with_status(decided(job, Claim(), *again, Job("save", 2).failed(), pod).status)
        decision = decided(job, Claim().kept(), *again, after=LONG)
        assert not decision.create
        assert not decision.status

    def test_a_word_that_stood_there_from_the_start_starts_nothing(self):
        assert not decided(failed(retry={"at": "first"}), Claim().kept(), after=60).create

    def test_in_a_running_job_it_ends_the_pause_and_renews_the_budget(self):
        job, children = prepared(), (Claim(), Job("train").failed(), Pod("train").on("n").failed(Step.TRAIN, 1))
        job.with_status(decided(job, *children).status)
        assert not created(decided(job, *children, after=1))
        decision = decided(job.with_spec(retry={"at": "now"}), *children, after=1)
        assert created(decision) == ["Job/tune-train-2"]
        assert decision.status.attempts.failures == 0

    def test_asked_for_while_pods_of_a_failing_job_stop_it_follows_when_they_have(self):
        job, pod = prepared(activeDeadlineSeconds=60), Pod("train").on("n").running(Step.TRAIN)
        job.with_status(decided(job, Claim(), Job("train"), pod).status)
        job.with_status(decided(job, Claim(), Job("train"), pod, after=60).status)
        job.with_spec(retry={"at": "now"})
        pod.deleting(NOW + timedelta(seconds=90))
        assert not created(decided(job, Claim().kept(), pod, after=61))
        decision = decided(job, Claim().kept(), after=70)
        assert created(decision) == ["Job/tune-train-2"]
        assert decision.status.attempts.retried_at == "now"
        assert decision.status.completion_time is None
        ((_, change),) = decision.keep
        assert change["ownerReferences"]

    def test_a_complete_job_does_not_begin_again(self):
        job = trained()
        job.with_status(decided(job, Claim(), Job("save"), Pod("save").succeeded()).status)
        decision = decided(job.with_spec(retry={"at": "now"}), Claim())
        assert not decision.create
        assert is_true((decision.status or job_status(job)).conditions, ConditionType.COMPLETE)

    def test_a_job_whose_spec_could_not_run_is_judged_anew(self):
        job = FineTuneJob().with_spec(layout="SinglePod")
        job.with_status(decided(job).status)
        decision = decided(job.with_spec(layout="Staged", retry={"at": "now"}))
        assert created(decision) == ["PersistentVolumeClaim/tune-work", "Job/tune-prepare-1"]
        assert not is_true(decision.status.conditions, ConditionType.FAILED)


class TestMending:
    @pytest.fixture
    def suspended(self):
        """A job that was suspended in its training."""
        job = prepared().with_spec(suspend=True)
        status = decided(job, Claim(), Job("train"), Pod("train").on("n").running(Step.TRAIN)).status
        job.with_status(status)
        return job.with_status(decided(job, Claim(), Job("train").suspended()).status)

    def child(self, job: FineTuneJob) -> Job:
        return Job("train").suspended().labelled(**{SPEC_LABEL: spec_digest(observe(job).spec)})

    def test_a_child_of_the_spec_as_it_stands_goes_on(self, suspended):
        child = self.child(suspended)
        decision = decided(suspended.with_spec(suspend=False), Claim(), child)
        assert [wanted for _, wanted in decision.suspend] == [False]

    def test_one_of_a_spec_that_changed_is_replaced_by_another_attempt_that_costs_nothing(self, suspended):
        child = self.child(suspended)
        suspended.training(resources={"limits": {"nvidia.com/gpu": "1", "memory": "64Gi"}}).with_spec(suspend=False)
        decision = decided(suspended, Claim(), child)
        assert not decision.suspend
        assert [child.name for child in decision.delete] == ["tune-train-1"]
        suspended.with_status(decision.status)
        assert not decided(suspended, Claim(), child.deleting()).create
        decision = decided(suspended, Claim())
        (new,) = decision.create
        assert new["metadata"]["name"] == "tune-train-2"
        limits = new["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert limits["memory"] == "64Gi"
        assert new["metadata"]["labels"][SPEC_LABEL] == spec_digest(observe(suspended).spec)
        ended = decision.status.attempts.history[-1]
        assert (ended.outcome, ended.reason) == (AttemptOutcome.STOPPED, "SpecChanged")
        assert (decision.status.attempts.failures, decision.status.attempts.preemptions) == (0, 0)

    def test_a_deletion_that_a_crash_prevented_is_made_up_for(self, suspended):
        child = self.child(suspended)
        suspended.training(microBatchSize=2, batchSize=2).with_spec(suspend=False)
        suspended.with_status(decided(suspended, Claim(), child).status)
        assert [child.name for child in decided(suspended, Claim(), child).delete] == ["tune-train-1"]


def job_status(job: FineTuneJob):
    return observe(job).status
