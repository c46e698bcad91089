"""What is decided, state by state."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import timedelta

import pytest

from finetune.api.conditions import ConditionType, find, is_true
from finetune.api.contract import Step
from finetune.api.status import AttemptOutcome, Phase, Progress
from finetune.controller.decision.decide import Decision, decide, document
from finetune.controller.decision.observed import Observed, Warned
from finetune.controller.decision.stages.pod import PodSettings
from finetune.controller.decision.transitions import transitions
from tests.builders import NOW, Claim, FineTuneJob, Job, Pod, error_report, stamp

SETTINGS = PodSettings(steps_image="steps:1", train_image="train:1")
ALLOWED = replace(SETTINGS, force_delete=True)


def observe(job: FineTuneJob, *children) -> Observed:
    items = [child.build() for child in children]
    return Observed(
        job=job.build(),
        jobs=tuple(item for item in items if item["kind"] == "Job"),
        pods=tuple(item for item in items if item["kind"] == "Pod"),
        claims=tuple(item for item in items if item["kind"] == "PersistentVolumeClaim"),
    )


def started(**spec) -> FineTuneJob:
    """A job that was taken up."""
    job = FineTuneJob().with_spec(**spec)
    return job.with_status(decide(observe(job), NOW, SETTINGS).status)


def prepared(**spec) -> FineTuneJob:
    """A job whose prepare stage is done."""
    job = started(**spec)
    return job.with_status(
        decide(observe(job, Claim(), Job("prepare"), Pod("prepare").succeeded()), NOW, SETTINGS).status
    )


def trained(**spec) -> FineTuneJob:
    job = prepared(**spec)
    return job.with_status(decide(observe(job, Claim(), Job("train"), Pod("train").succeeded()), NOW, SETTINGS).status)


def decided(job: FineTuneJob, *children, after: float = 0, settings: PodSettings = SETTINGS, **observed) -> Decision:
    return decide(replace(observe(job, *children), **observed), NOW + timedelta(seconds=after), settings)


def created(decision: Decision) -> list[str]:
    return [f"{item['kind']}/{item['metadata']['name']}" for item in decision.create]


def test_a_job_being_deleted_is_left_to_the_garbage_collector():
    assert decided(FineTuneJob().deleting()) == Decision()


def test_the_first_visit_latches_the_spec_shows_all_conditions_and_starts_the_first_pod():
    decision = decided(FineTuneJob())
    assert decision.status.start_time == NOW
    assert decision.status.spec_digest.startswith("sha256:")
    assert {item.type for item in decision.status.conditions} == set(ConditionType)
    assert created(decision) == ["PersistentVolumeClaim/tune-work", "Job/tune-prepare-1"]


def test_nothing_is_written_again_when_the_job_exists_and_its_pod_does_not_yet():
    assert decided(started(), Claim(), Job("prepare")) == Decision()


def test_a_value_without_behaviour_ends_in_a_condition_that_names_the_field():
    decision = decided(FineTuneJob().with_spec(layout="SinglePod"))
    failed = find(decision.status.conditions, ConditionType.FAILED)
    assert failed.reason == "NotImplemented"
    assert "spec.layout" in failed.message
    assert not decision.create


def test_a_spec_too_long_for_a_pod_is_refused_with_the_remedy():
    tokens = {"add": [{"content": f"{number:04}" + "x" * 500} for number in range(500)]}
    decision = decided(FineTuneJob().with_spec(tokens=tokens))
    assert "tokens.addFrom" in decision.status.message
    assert find(decision.status.conditions, ConditionType.FAILED).reason == "SpecTooLarge"


def test_a_job_created_suspended_is_not_taken_up():
    decision = decided(FineTuneJob().with_spec(suspend=True))
    assert decision.status.phase == Phase.SUSPENDED
    assert decision.status.start_time is None
    assert not decision.create


@pytest.mark.parametrize(
    ("step", "phase"),
    [
        (Step.DOWNLOAD, Phase.DOWNLOADING),
        (Step.ADD_TOKENS, Phase.ADDING_TOKENS),
        (Step.RELOAD, Phase.RELOADING),
        (Step.LOAD_DATASET, Phase.LOADING_DATASET),
    ],
)
def test_the_phase_is_the_container_that_runs(step, phase):
    decision = decided(started(), Claim(), Job("prepare"), Pod("prepare").on("node-1").running(step))
    assert decision.status.phase == phase
    assert decision.progress.step == step


def test_what_a_step_reports_is_in_status_as_soon_as_its_container_ends():
    pod = Pod("prepare").on("node-1").done(Step.DOWNLOAD, commit="abc", sizeBytes=7).running(Step.ADD_TOKENS)
    status = decided(started(), Claim(), Job("prepare"), pod).status
    assert (status.model.commit, status.model.size_bytes) == ("abc", 7)
    assert is_true(status.conditions, ConditionType.MODEL_DOWNLOADED)
    assert not is_true(status.conditions, ConditionType.TOKENS_ADDED)


def test_a_report_that_does_not_fit_the_api_is_dropped_field_by_field():
    pod = Pod("prepare").on("n").done(Step.DOWNLOAD, commit="abc", sizeBytes="many", evil={"x": 1})
    status = decided(started(), Claim(), Job("prepare"), pod.running(Step.ADD_TOKENS)).status
    assert status.model.wire() == {"commit": "abc"}


def test_add_tokens_and_reload_both_write_their_part_of_the_tokens():
    pod = Pod("prepare").on("n").done(Step.ADD_TOKENS, added=2).done(Step.RELOAD, vocabularySize=10)
    status = decided(started(), Claim(), Job("prepare"), pod.running(Step.LOAD_DATASET)).status
    assert (status.tokens.added, status.tokens.vocabulary_size) == (2, 10)


def test_a_pod_that_succeeded_starts_the_next_stage_before_the_job_controller_says_so():
    decision = decided(started(), Claim(), Job("prepare"), Pod("prepare").succeeded())
    assert created(decision) == ["Job/tune-train-1"]
    assert decision.status.attempts.count == 1
    assert is_true(decision.status.conditions, ConditionType.DATASET_LOADED)


def test_a_finished_stage_is_not_repeated_when_its_job_is_gone():
    assert created(decided(prepared(), Claim())) == ["Job/tune-train-1"]


def test_after_saving_the_job_is_complete():
    decision = decided(trained(), Claim(), Job("save"), Pod("save").succeeded())
    assert decision.status.phase == Phase.COMPLETE
    assert is_true(decision.status.conditions, ConditionType.COMPLETE)
    assert decision.progress.percent == 100


def test_without_tokens_nothing_waits_for_them():
    job = started(tokens=None)
    assert find(decided(FineTuneJob().with_spec(tokens=None)).status.conditions, ConditionType.TOKENS_ADDED).reason == (
        "NotNeeded"
    )
    pod = Pod("prepare").succeeded()
    assert created(decided(job, Claim(), Job("prepare"), pod)) == ["Job/tune-train-1"]


def test_a_user_error_fails_the_job_at_once_with_the_steps_own_words():
    report = error_report(Step.LOAD_DATASET, "UnknownColumn", "column reason is missing", "columns are: a, b")
    pod = Pod("prepare").on("n").failed(Step.LOAD_DATASET, 65, report)
    decision = decided(started(), Claim(), Job("prepare").failed_by_rule(2), pod)
    failed = find(decision.status.conditions, ConditionType.FAILED)
    assert decision.status.phase == Phase.FAILED
    assert failed.reason == "UnknownColumn"
    assert "column reason is missing" in failed.message
    assert "columns are: a, b" in failed.message
    assert find(decision.status.conditions, ConditionType.DATASET_LOADED).reason == "UnknownColumn"
    assert not decision.create


def test_a_preempted_attempt_is_followed_at_once_and_costs_nothing():
    pod = Pod("train").on("n").failed(Step.TRAIN, 75).disrupted()
    decision = decided(prepared(), Claim(), Job("train").failed_by_rule(0), pod)
    assert created(decision) == ["Job/tune-train-2"]
    assert (decision.status.attempts.failures, decision.status.attempts.preemptions) == (0, 1)
    assert decision.status.attempts.history[-1].outcome == AttemptOutcome.PREEMPTED


def test_a_crash_is_followed_after_a_back_off_and_counted():
    job, children = prepared(), (Claim(), Job("train").failed(), Pod("train").on("n").failed(Step.TRAIN, 1))
    decision = decided(job, *children)
    assert not decision.create
    assert decision.status.attempts.failures == 1
    assert decision.status.attempts.retry_after == NOW + timedelta(seconds=10)
    assert decision.again_at == NOW + timedelta(seconds=10)
    assert "train attempt 2 starts at" in decision.status.message
    job.with_status(decision.status)
    assert created(decided(job, *children, after=9)) == []
    later = decided(job, *children, after=10)
    assert created(later) == ["Job/tune-train-2"]
    assert later.status.attempts.failures == 1


def test_what_is_done_stays_done_also_where_doing_it_again_fails():
    job = started()
    first = decided(job, Claim(), Job("prepare"), Pod("prepare").on("n").done(Step.DOWNLOAD).running(Step.ADD_TOKENS))
    job.with_status(first.status)
    pod = Pod("prepare").on("n").failed(Step.DOWNLOAD, 1)
    status = decided(job, Claim(), Job("prepare").failed(), pod).status
    assert status.attempts.failures == 1
    assert is_true(status.conditions, ConditionType.MODEL_DOWNLOADED)


def test_failures_in_a_row_beyond_the_limit_fail_the_job():
    job = prepared(retry={"limit": 0})
    decision = decided(
        job, Claim(), Job("train").failed(), Pod("train").on("n").failed(Step.TRAIN, 137, "", "OOMKilled")
    )
    failed = find(decision.status.conditions, ConditionType.FAILED)
    assert failed.reason == "OutOfMemory"
    assert "memory" in failed.message
    assert "spec.retry.limit is 0" in failed.message


def test_an_attempt_is_not_over_while_a_pod_of_it_may_still_run():
    decision = decided(prepared(), Claim(), Job("train").failed_by_rule(0), Pod("train").on("n").running(Step.TRAIN))
    assert not decision.create


def test_an_attempt_is_not_over_before_the_job_says_so():
    decision = decided(prepared(), Claim(), Job("train"), Pod("train").on("n").failed(Step.TRAIN, 75))
    assert not decision.create


def test_the_jobs_condition_tells_the_class_when_pod_and_report_are_gone():
    decision = decided(prepared(), Claim(), Job("train").failed_by_rule(1, code=75))
    assert decision.status.attempts.preemptions == 1
    decision = decided(started(), Claim(), Job("prepare").failed_by_rule(2, "load-dataset", 65))
    assert decision.status.phase == Phase.FAILED
    assert "load-dataset" in decision.status.message


def test_a_job_that_somebody_deleted_is_an_attempt_that_ended():
    job, pod = prepared(), Pod("train").on("n").running(Step.TRAIN)
    job.with_status(decided(job, Claim(), Job("train"), pod).status)
    assert not decided(job, Claim(), pod).create
    decision = decided(job, Claim())
    assert decision.status.attempts.history[-1].reason == "JobDeleted"
    assert decision.status.attempts.retry_after is not None


def test_the_schedulers_words_are_the_message():
    pod = Pod("train").unschedulable("0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")
    decision = decided(prepared(), Claim(), Job("train"), pod)
    assert decision.status.phase == Phase.WAITING
    assert decision.status.message == "Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu."


def test_a_missing_claim_is_named_with_what_to_do():
    pod = Pod("prepare").unschedulable('0/1 nodes are available: persistentvolumeclaim "models" not found.')
    message = decided(started(), Claim(), Job("prepare"), pod).status.message
    assert message.startswith("waits for the claim models, which does not exist: create it and the job goes on")


def test_an_image_that_cannot_be_pulled_is_told_in_the_kubelets_words():
    pod = Pod("prepare").on("n").waiting(Step.DOWNLOAD, "ImagePullBackOff", "Back-off pulling image x")
    message = decided(started(), Claim(), Job("prepare"), pod).status.message
    assert message.startswith("container download-model: ImagePullBackOff: Back-off pulling image x")


def test_quota_and_storage_speak_through_events():
    job = Job("prepare").build()
    warned = Warned("Job", "tune-prepare-1", job["metadata"]["uid"], "FailedCreate", "exceeded quota: gpus")
    assert decided(started(), Claim(), Job("prepare"), warnings=(warned,)).status.message == (
        "the pod cannot be created: FailedCreate: exceeded quota: gpus"
    )
    warned = Warned("PersistentVolumeClaim", "tune-work", "job-1-work", "ProvisioningFailed", "no class fast")
    decision = decided(started(), Claim().pending(), Job("prepare"), warnings=(warned,))
    assert decision.status.message == "the workspace volume is not provisioned: ProvisioningFailed: no class fast"


def test_nothing_starts_while_a_pod_of_the_former_job_runs():
    decision = decided(FineTuneJob(uid="job-2"), Pod("train", owner="job-1").on("n").running(Step.TRAIN))
    assert not decision.create
    assert decision.status.message == "waiting for pod tune-train-1-x of the former job of this name to be gone"
    assert decision.again_at is not None


def test_nothing_starts_while_the_former_jobs_volume_exists():
    decision = decided(FineTuneJob(uid="job-2"), Claim(owner="job-1").deleting())
    assert not decision.create
    assert "volume claim tune-work of the former job" in decision.status.message


def test_a_child_that_the_server_will_never_accept_fails_the_job_in_its_words():
    decision = decided(started(), refused='Job "x" is invalid: limits[memory]: must match')
    assert decision.status.phase == Phase.FAILED
    assert "limits[memory]" in decision.status.message


def test_a_child_that_the_server_refuses_for_now_is_waited_for():
    decision = decided(started(), conflicts=("the Job tune-prepare-1 cannot be created: exceeded quota",))
    assert not decision.create
    assert decision.status.message.endswith("exceeded quota")


def test_a_lost_workspace_is_not_silently_replaced():
    decision = decided(prepared())
    assert find(decision.status.conditions, ConditionType.FAILED).reason == "WorkspaceLost"
    assert not decision.create


def test_the_users_own_workspace_claim_is_used_and_not_created():
    job = started(workspace={"claimName": "mine"})
    decision = decided(FineTuneJob().with_spec(workspace={"claimName": "mine"}))
    assert created(decision) == ["Job/tune-prepare-1"]
    assert created(decided(job)) == ["Job/tune-prepare-1"]


class TestSuspension:
    def test_it_suspends_the_running_job_and_says_so(self):
        job = prepared().with_spec(suspend=True)
        decision = decided(job, Claim(), Job("train"), Pod("train").on("n").running(Step.TRAIN))
        ((child, wanted),) = decision.suspend
        assert (child.name, wanted) == ("tune-train-1", True)
        assert decision.status.phase == Phase.TRAINING
        assert "checkpoint" in decision.status.message

    def test_the_job_stands_still_when_no_pod_is_left(self):
        job = prepared().with_spec(suspend=True)
        decision = decided(job, Claim(), Job("train").suspended())
        assert decision.status.phase == Phase.SUSPENDED
        assert is_true(decision.status.conditions, ConditionType.SUSPENDED)
        assert not decision.create

    def test_the_same_job_goes_on(self):
        job = prepared().with_spec(suspend=True)
        job.with_status(decided(job, Claim(), Job("train").suspended()).status)
        decision = decided(job.with_spec(suspend=False), Claim(), Job("train").suspended())
        ((child, wanted),) = decision.suspend
        assert (child.name, wanted) == ("tune-train-1", False)
        assert not decision.create

    def test_what_somebody_else_suspended_stays_suspended_and_is_said(self):
        decision = decided(prepared(), Claim(), Job("train").suspended(by="kubectl-patch"))
        assert not decision.suspend
        assert decision.status.phase == Phase.WAITING
        assert decision.status.message.startswith("held by kubectl-patch: the Job tune-train-1 was suspended")

    def test_a_queue_that_holds_the_job_is_named(self):
        job = Job("train").labelled(queue="gpus").suspended(by="finetune-operator")
        assert decided(prepared(), Claim(), job).status.message.startswith("held by the queue gpus (Kueue)")
        webhook = decided(prepared(), Claim(), Job("train").suspended(by="finetune-operator"))
        assert webhook.status.message.startswith("held by whoever changes new Jobs at admission")

    def test_a_job_that_is_suspended_while_somebody_else_holds_it_is_not_resumed_afterwards(self):
        job, child = prepared().with_spec(suspend=True), Job("train").suspended(by="kueue")
        first = decided(job, Claim(), child)
        assert (first.suspend, first.status.phase) == ((), Phase.SUSPENDED)
        job.with_status(first.status).with_spec(suspend=False)
        assert not decided(job, Claim(), child).suspend

    def test_a_child_that_somebody_resumes_while_the_spec_says_suspend_is_deleted_and_not_suspended_again(self):
        job, pod = prepared().with_spec(suspend=True), Pod("train").on("n").running(Step.TRAIN)
        decision = decided(job, Claim(), Job("train").resumed_elsewhere(), pod)
        assert not decision.suspend
        assert [child.name for child in decision.delete] == ["tune-train-1"]

    def test_what_an_operator_suspended_before_it_left_a_mark_is_resumed(self):
        job, child = prepared(), Job("train").suspended(by="finetune-operator")
        running = decided(job, Claim(), Job("train"), Pod("train").on("n").running(Step.TRAIN)).status
        record = running.attempts.history[-1].model_copy(update={"outcome": AttemptOutcome.SUSPENDED})
        history = [*running.attempts.history[:-1], record]
        job.with_status(
            running.model_copy(update={"attempts": running.attempts.model_copy(update={"history": history})})
        )
        assert [wanted for _, wanted in decided(job, Claim(), child).suspend] == [False]

    @pytest.mark.parametrize(
        "children",
        [
            (Job("train").suspended().failed_by_rule(1, code=75), Pod("train").on("n").failed(Step.TRAIN, 75)),
            (Job("train").suspended().failed(), Pod("train").on("n").failed(Step.TRAIN, 143)),
            (Job("train").suspended().failed_by_rule(1, code=75),),
            (),
        ],
    )
    def test_an_attempt_that_ends_while_it_is_being_suspended_costs_nothing_and_counts_as_no_preemption(self, children):
        job = prepared().with_spec(suspend=True)
        pod = Pod("train").on("n").running(Step.TRAIN)
        job.with_status(decided(job, Claim(), Job("train"), pod).status)
        status = decided(job, Claim(), *children).status
        assert (status.attempts.failures, status.attempts.preemptions, status.attempts.retry_after) == (0, 0, None)
        last = status.attempts.history[-1]
        assert (last.outcome, last.reason) == (AttemptOutcome.SUSPENDED, "Suspended")
        assert status.phase == Phase.SUSPENDED
        job.with_status(status).with_spec(suspend=False)
        assert created(decided(job, Claim(), *children)) == ["Job/tune-train-2"]

    def test_between_stages_nothing_is_started(self):
        decision = decided(prepared().with_spec(suspend=True), Claim())
        assert decision.status.phase == Phase.SUSPENDED
        assert not decision.create


class TestTime:
    def test_a_job_beyond_its_deadline_fails_and_its_pods_are_stopped(self):
        job = started(activeDeadlineSeconds=60)
        children = (Claim(), Job("prepare"), Pod("prepare").on("n").running(Step.DOWNLOAD))
        running = decided(job, *children)
        assert running.again_at == NOW + timedelta(seconds=60)
        decision = decided(job.with_status(running.status), *children, after=60)
        assert find(decision.status.conditions, ConditionType.FAILURE_TARGET).reason == "DeadlineExceeded"
        assert [child.name for child in decision.delete] == ["tune-prepare-1"]

    def test_it_has_failed_only_when_its_pods_have_stopped(self):
        job = started(activeDeadlineSeconds=60)
        pod = Pod("prepare").on("n").running(Step.DOWNLOAD)
        job.with_status(decided(job, Claim(), Job("prepare"), pod).status)
        stopping = decided(job, Claim(), Job("prepare"), pod, after=60).status
        assert stopping.phase == Phase.STOPPING
        assert not is_true(stopping.conditions, ConditionType.FAILED)
        assert stopping.message.startswith("stopping, because the job ran longer than")
        job.with_status(stopping)
        still = decided(job, Claim(), pod.deleting(NOW + timedelta(seconds=90)), after=61).status
        assert still.phase == Phase.STOPPING
        over = decided(job, Claim(), after=62).status
        assert find(over.conditions, ConditionType.FAILED).reason == "DeadlineExceeded"
        assert over.attempts.history[-1].outcome == AttemptOutcome.STOPPED

    def test_a_crash_before_the_children_were_stopped_is_made_up_for(self):
        job = started(activeDeadlineSeconds=60)
        children = (Claim(), Job("prepare"), Pod("prepare").on("n").running(Step.DOWNLOAD))
        job.with_status(decided(job, *children).status)
        job.with_status(decided(job, *children, after=60).status)
        decision = decided(job, *children, after=61)
        assert [child.name for child in decision.delete] == ["tune-prepare-1"]

    def test_a_finished_job_is_deleted_when_its_time_has_come(self):
        job = trained()
        job.with_status(decided(job, Claim(), Job("save"), Pod("save").succeeded()).status)
        job.with_spec(ttlSecondsAfterFinished=100)
        assert decided(job).again_at == NOW + timedelta(seconds=100)
        (child,) = decided(job, after=100).delete
        assert (child.kind, child.uid) == ("FineTuneJob", "job-1")

    def test_the_decision_that_finishes_a_job_already_knows_when_to_delete_it(self):
        job = trained().with_spec(ttlSecondsAfterFinished=100)
        decision = decided(job, Claim(), Job("save"), Pod("save").succeeded())
        assert decision.again_at == NOW + timedelta(seconds=100)

    def test_a_pod_that_does_not_stop_is_named_with_its_node_and_the_remedy_that_works(self):
        decision = decided(prepared(), Claim(), Job("train"), lost_pod(), after=120)
        assert decision.status.message.startswith("NodeLost: pod tune-train-1-x was told to stop, but node gone-node")
        taint = "kubectl taint nodes gone-node node.kubernetes.io/out-of-service=nodeshutdown:NoExecute"
        assert taint in decision.status.message
        assert not decision.create

    @pytest.mark.parametrize("after", [0, 30, 59, 60, 61, 120, 299, 300, 3600])
    @pytest.mark.parametrize("policy", ["Wait", "ForceDelete"])
    def test_a_pod_that_does_not_stop_is_never_looked_at_again_in_the_past(self, policy, after):
        job = prepared().training(onNodeLost=policy)
        decision = decided(job, Claim(), Job("train"), lost_pod(), settings=ALLOWED, after=after + 0.7)
        due = [second for second in ((60, 300) if policy == "ForceDelete" else (60,)) if second > after]
        assert decision.again_at == (NOW + timedelta(seconds=due[0]) if due else None)


class TestProgress:
    def test_another_step_starts_anew_but_keeps_the_loss(self):
        job = trained()
        status = document(decided(job, Claim(), Job("save")).status or job_status(job))
        shown = Progress(step="train", percent=100, summary="100% 4/4", loss=0.5)
        job.with_status({**status, "progress": shown.wire()})
        decision = decided(job, Claim(), Job("save"), Pod("save").on("n").running(Step.SAVE))
        assert decision.progress == Progress(step="save", summary="0%", loss=0.5)

    def test_no_time_is_promised_while_nothing_runs(self):
        job = prepared()
        shown = Progress(step="train", percent=50, remaining="5m")
        job.with_status({**document(job_status(job)), "progress": shown.wire()})
        decision = decided(job, Claim(), Job("train"), Pod("train").on("n").failed(Step.TRAIN, 75))
        assert decision.progress.remaining == ""

    def test_a_live_checkpoint_counts_when_the_pod_died_without_a_word(self):
        job = prepared()
        shown = Progress(step="train", percent=50, checkpoint_step=100)
        job.with_status({**document(job_status(job)), "progress": shown.wire()})
        decision = decided(job, Claim(), Job("train").failed(), Pod("train").on("n").failed(Step.TRAIN, 137))
        assert decision.status.attempts.history[-1].checkpoint_step == 100


def lost_pod() -> Pod:
    return Pod("train").on("gone-node").running(Step.TRAIN).deleting(NOW).unreachable()


FORCE: dict[str, str] = {"onNodeLost": "ForceDelete"}


class TestNodeLost:
    def test_by_default_nothing_is_removed_by_force(self):
        assert not decided(prepared(), Claim(), Job("train"), lost_pod(), settings=ALLOWED, after=3600).force

    def test_five_minutes_after_it_should_have_stopped_the_pod_is_removed_where_job_and_administrator_say_so(self):
        job, children = prepared().training(**FORCE), (Claim(), Job("train"), lost_pod())
        early = decided(job, *children, settings=ALLOWED, after=299)
        assert not early.force
        assert "It is removed by force at 12:05:00 UTC" in early.status.message
        decision = decided(job, *children, settings=ALLOWED, after=300)
        ((pod),) = decision.force
        assert (pod.kind, pod.name, pod.uid) == ("Pod", "tune-train-1-x", "job-1-tune-train-1-x")
        assert not decision.create

    def test_an_operator_without_the_rights_says_so(self):
        decision = decided(prepared().training(**FORCE), Claim(), Job("train"), lost_pod(), after=300)
        assert not decision.force
        assert "nodeLost.forceDelete" in decision.status.message

    def test_a_machine_that_answers_is_not_lost_however_long_its_pod_takes(self):
        pod = Pod("train").on("slow-node").running(Step.TRAIN).deleting(NOW)
        decision = decided(prepared().training(**FORCE), Claim(), Job("train"), pod, settings=ALLOWED, after=3600)
        assert not decision.force
        assert "does not count the machine as unreachable" in decision.status.message

    def test_a_pod_that_kubernetes_evicted_because_its_machine_is_silent_is_lost(self):
        pod = Pod("train").on("n").running(Step.TRAIN).deleting(NOW).disrupted("DeletionByTaintManager")
        job = prepared().training(**FORCE)
        assert decided(job, Claim(), Job("train"), pod, settings=ALLOWED, after=300).force

    def test_a_former_jobs_pod_on_a_lost_machine_is_told_with_the_remedy_too(self):
        pod = Pod("train", owner="job-0").on("gone-node").running(Step.TRAIN).deleting(NOW)
        decision = decided(started(), Claim(), pod, after=60)
        assert decision.status.message.startswith("NodeLost: pod tune-train-1-x was told to stop, but node gone-node")
        assert not (decision.create or decision.force)


class TestOwnership:
    def test_a_copied_pod_that_succeeds_is_not_believed(self):
        job, copy = prepared(), Pod("train").succeeded().copied("debug")
        decision = decided(job, Claim(), Job("train"), Pod("train").on("n").running(Step.TRAIN), copy)
        assert not is_true(decision.status.conditions, ConditionType.TRAINED)
        failed = decided(job, Claim(), Job("train").failed(), Pod("train").on("n").failed(Step.TRAIN, 1), copy)
        assert failed.status.attempts.failures == 1

    def test_a_copied_pod_that_runs_holds_nothing_up(self):
        copy = Pod("train").on("n").running(Step.TRAIN).copied("debug")
        assert created(decided(prepared(), Claim(), copy)) == ["Job/tune-train-1"]

    @pytest.mark.parametrize("owners", [False, True])
    def test_a_copied_job_is_neither_believed_nor_deleted(self, owners):
        job = prepared(activeDeadlineSeconds=60)
        copy = Job("train", 7).complete().copied("debug", owners=owners)
        assert created(decided(job, Claim(), copy)) == ["Job/tune-train-1"]
        running = Job("train", 7).copied("debug", owners=owners)
        pod = Pod("train").on("n").running(Step.TRAIN)
        job.with_status(decided(job, Claim(), Job("train"), running, pod).status)
        decision = decided(job, Claim(), Job("train"), running, pod, after=60)
        assert [child.name for child in decision.delete] == ["tune-train-1"]

    def test_a_copied_claim_is_not_the_workspace(self):
        decision = decided(FineTuneJob(), Claim().copied("mine", owners=True))
        assert created(decision) == ["PersistentVolumeClaim/tune-work", "Job/tune-prepare-1"]

    def test_the_pods_of_a_job_that_somebody_deleted_are_known_by_the_uid_in_status(self):
        job, pod = prepared(), Pod("train").on("n").running(Step.TRAIN)
        job.with_status(decided(job, Claim(), Job("train"), pod).status)
        assert job_status(job).attempts.history[-1].job_uid == "job-1-train-1"
        decision = decided(job, Claim(), Pod("train").on("n").succeeded())
        assert is_true(decision.status.conditions, ConditionType.TRAINED)

    def test_a_pod_of_a_job_that_is_gone_and_was_never_recorded_holds_the_next_attempt_up(self):
        decision = decided(prepared(), Claim(), Pod("train").on("n").running(Step.TRAIN))
        assert not decision.create
        assert decision.status.message == "waiting for pod tune-train-1-x of an earlier attempt to be gone"


class TestTwoStreams:
    """Jobs and pods are watched apart, and either may lag."""

    def test_no_attempt_starts_while_the_job_counts_a_pod_that_was_not_seen(self):
        pods = Pod("train", index=0).on("n").failed(Step.TRAIN, 1)
        job = prepared(workspace={"accessModes": ["ReadWriteMany"]}).training(nodes=2, batchSize=2)
        decision = decided(job, Claim(), Job("train").failing(terminating=1), pods)
        assert not decision.create
        assert decision.status.attempts.failures == 0

    @pytest.mark.parametrize("child", [Job("train").complete(), Job("train").failed()])
    def test_the_pod_that_explains_an_end_is_waited_for_but_not_for_ever(self, child):
        job = prepared()
        early = decided(job, Claim(), child.ended_at(NOW), after=14)
        assert not early.create
        assert early.again_at == NOW + timedelta(seconds=15)
        status = decided(job, Claim(), child.ended_at(NOW), after=15).status
        assert [item.number for item in status.attempts.history if item.stage == "train" and item.end_time] == [1]

    def test_what_a_child_came_to_counts_although_it_vanished_at_once(self):
        gone = (Job("prepare").complete().build(), Pod("prepare").succeeded().build())
        decision = decided(started(), Claim(), departed=gone)
        assert created(decision) == ["Job/tune-train-1"]
        assert is_true(decision.status.conditions, ConditionType.DATASET_LOADED)


class TestOperators:
    def test_the_operator_that_took_the_job_up_is_recorded(self):
        assert decided(FineTuneJob().labelled(operator="canary")).status.operator == "canary"
        assert decided(FineTuneJob()).status.operator == ""

    @pytest.mark.parametrize(
        ("holder", "label", "back"),
        [
            ({}, {"operator": "canary"}, "kubectl label finetunejob tune finetune.dev/operator-"),
            ({"operator": "canary"}, {"operator": "b"}, "tune finetune.dev/operator=canary --overwrite"),
        ],
    )
    def test_another_operator_leaves_the_job_alone_and_says_who_holds_it(self, holder, label, back):
        job = FineTuneJob().labelled(**holder)
        job.with_status(decide(observe(job), NOW, SETTINGS).status)
        decision = decided(job.labelled(**label), after=3600)
        assert not (decision.create or decision.suspend or decision.delete)
        assert decision.status.message.startswith("held by the operator")
        assert back in decision.status.message

    def test_a_job_taken_up_before_that_was_recorded_is_this_operators(self):
        job = started()
        job.with_status(job_status(job).model_copy(update={"operator": None}))
        assert decided(job, Claim(), Job("prepare")).status.operator == ""


class TestClaims:
    def test_a_job_waits_for_the_other_that_works_in_its_claim(self):
        decision = decided(FineTuneJob().with_spec(workspace={"claimName": "mine"}), claim_held_by="first")
        assert not decision.create
        assert decision.status.message == "waits for the claim mine, in which the job first works"
        assert decision.again_at == NOW + timedelta(seconds=15)


def job_status(job: FineTuneJob):
    from finetune.controller.decision.observed import status_of

    return status_of(job.build())


def test_stamps_are_in_utc():
    assert stamp(NOW) == "2026-03-01T12:00:00Z"


def test_a_step_that_ended_in_a_pod_that_has_not_leaves_its_attempt_open():
    """The kubelet tells of a container's end before the pod's: between the two, the outcome must not get lost."""
    report = {"step": "train", "result": {"steps": 4}}
    ended = decided(prepared(), Claim(), Job("train"), Pod("train").ended(Step.TRAIN, 0, report))
    assert not is_true(ended.status.conditions, ConditionType.TRAINED)
    job = prepared().with_status(ended.status)
    over = decided(job, Claim(), Job("train"), Pod("train").ended(Step.TRAIN, 0, report).succeeded())
    assert is_true(over.status.conditions, ConditionType.TRAINED)
    assert [item.outcome for item in over.status.attempts.history if item.stage == "train"] == [
        AttemptOutcome.SUCCEEDED
    ]


def test_a_condition_says_what_its_step_found():
    pod = Pod("prepare").done(Step.DOWNLOAD, commit="0123456789abcdef", sizeBytes=1_334_762).running(Step.ADD_TOKENS)
    decision = decided(started(), Claim(), Job("prepare"), pod)
    assert find(decision.status.conditions, ConditionType.MODEL_DOWNLOADED).message == "commit 0123456789ab, 1.33 MB"


class TestASpecThatANewerOperatorKnows:
    """The definition on the server is newer than this operator."""

    def test_a_job_that_has_not_begun_waits_for_the_newer_operator_and_says_which_field(self):
        job = FineTuneJob().with_spec(newer={"x": 1}).training(speed="high")
        decision = decided(job)
        assert created(decision) == []
        assert (decision.status.phase, decision.status.start_time) == (Phase.PENDING, None)
        said = "this operator does not know spec.training.speed, spec.newer: upgrade the operator"
        assert decision.status.message == f"{said}, or apply the job without"
        assert decided(job.with_status(decision.status)).status is None

    def test_a_job_that_has_begun_goes_on_without_it_and_says_so(self):
        job = prepared()
        job.training(speed="high")
        decision = decided(job, Claim())
        assert created(decision) == ["Job/tune-train-1"]
        said = "this operator does not know spec.training.speed, and goes on without"
        assert decision.status.message == said
        before = Observed(job=job.build()).status
        assert said in {item.message for item in transitions(before, decision.status)}
        assert not list(transitions(decision.status, decision.status))

    def test_a_job_that_is_to_fail_stops_also_when_a_value_cannot_be_read(self):
        job = prepared(activeDeadlineSeconds=1)
        running = Pod("train").on("n").running(Step.TRAIN)
        job.with_status(decided(job, Claim(), Job("train"), running).status)
        job.with_status(decided(job, Claim(), Job("train"), running, after=60).status)
        assert job_status(job).phase == Phase.STOPPING
        job.training(method="Telepathy")
        decision = decided(job, Claim(), Job("train"), lost_pod(), after=120)
        assert [child.name for child in decision.delete] == ["tune-train-1"]
        assert "NodeLost: pod tune-train-1-x" in decision.status.message

    def test_a_job_that_has_begun_is_left_as_it_is_when_a_value_cannot_be_read(self):
        job = prepared()
        job.training(method="Telepathy")
        decision = decided(job, Claim(), Job("train"), Pod("train").on("n").running(Step.TRAIN))
        assert (created(decision), decision.delete, decision.suspend) == ([], (), ())
        assert decision.status.phase == job_status(job).phase
        assert "cannot read the spec and leaves the job as it is; upgrade it" in decision.status.message


@pytest.mark.parametrize("latch", ["startTime", "completionTime"])
def test_a_job_whose_latch_cannot_be_read_is_left_alone(latch):
    job = prepared()
    status = {**document(job_status(job)), latch: "once upon a time"}
    assert decided(job.with_status(status), Claim()) == Decision()


@pytest.mark.parametrize("reason", ["404NotFound", "", "no space left", "é"])
def test_whatever_reason_a_foreign_trainer_gives_its_attempt_ends_in_it(reason):
    pod = Pod("train").on("n").failed(Step.TRAIN, 1, error_report(Step.TRAIN, reason, "m"))
    decision = decided(prepared(), Claim(), Job("train").failed(), pod)
    assert decision.status.attempts.history[-1].outcome == AttemptOutcome.CRASHED
    assert find(decision.status.conditions, ConditionType.TRAINED).status == "False"
    json.dumps(decision.status.wire(), allow_nan=False)


@pytest.mark.parametrize("number", [2**63, 2**70, -(2**70), "Infinity", "NaN"])
def test_whatever_number_a_foreign_trainer_reports_status_can_be_stored(number):
    result = f'{{"steps": {number}, "loss": {number}, "checkpoint": {{"step": {number}}}, "exact": true}}'
    report = f'{{"step": "train", "result": {result}, "resumed_from_step": {number}}}'
    decision = decided(prepared(), Claim(), Job("train"), Pod("train").on("n").ended(Step.TRAIN, 0, report).succeeded())
    assert decision.status.training.exact
    text = json.dumps(decision.status.wire(), allow_nan=False)
    assert all(abs(int(digits)) < 2**63 for digits in re.findall(r"\d{10,}", text))
