"""Jobs on a real API server, from kubectl apply to whatever end."""

from __future__ import annotations

import signal

import pytest

from finetune.api import KIND
from finetune.api.contract import Step
from tests.builders import error_report
from tests.integration.controller.playground import Playground

pytestmark = pytest.mark.cluster


def to_training(playground: Playground, **spec) -> str:
    """A job whose training pod runs; the pod's name."""
    playground.submit(**spec)
    playground.succeed(playground.pod("prepare"), "prepare")
    pod = playground.pod("train")
    playground.run(pod, "train", Step.TRAIN)
    playground.until_phase("Training")
    return pod


def told(playground: Playground) -> set[str]:
    """The reasons of the Events about FineTuneJobs."""
    return {event["reason"] for event in playground.list("Event") if event["involvedObject"]["kind"] == KIND}


def test_a_job_runs_from_start_to_end_and_shows_each_step(playground):
    playground.submit()
    pod = playground.pod("prepare")
    playground.until_says("Unschedulable")
    results = {Step.DOWNLOAD: {"commit": "abc", "sizeBytes": 7}, Step.LOAD_DATASET: {"examples": 3}}
    for step, phase in (
        (Step.DOWNLOAD, "Downloading"),
        (Step.ADD_TOKENS, "AddingTokens"),
        (Step.RELOAD, "Reloading"),
        (Step.LOAD_DATASET, "LoadingDataset"),
    ):
        playground.run(pod, "prepare", step, results)
        playground.until_phase(phase)
    assert playground.status()["model"] == {"commit": "abc", "sizeBytes": 7}
    playground.succeed(pod, "prepare", results)
    pod = playground.pod("train")
    playground.run(pod, "train", Step.TRAIN)
    playground.until_phase("Training")
    playground.succeed(pod, "train", {Step.TRAIN: {"steps": 4, "loss": 0.5, "checkpoint": {"step": 4}}})
    pod = playground.pod("save")
    playground.succeed(pod, "save", {Step.SAVE: {"uri": "pvc://x/y", "sha256": "0" * 64}})
    status = playground.until_phase("Complete")
    assert status["dataset"]["examples"] == 3
    assert status["training"]["loss"] == 0.5
    assert status["output"]["uri"] == "pvc://x/y"
    assert status["progress"]["percent"] == 100
    assert {item["type"]: item["status"] for item in status["conditions"]} == {
        **dict.fromkeys(
            ("ModelDownloaded", "TokensAdded", "ModelReloaded", "DatasetLoaded", "Trained", "Saved", "Complete"), "True"
        ),
        **dict.fromkeys(("Failed", "FailureTarget", "Suspended", "Reconciling", "Stalled"), "False"),
        "Ready": "True",
    }
    playground.until(
        lambda: {"ModelDownloaded", "Trained", "Complete"} <= told(playground), message="Events are missing"
    )


def test_a_preempted_attempt_is_followed_by_the_next(playground):
    pod = to_training(playground)
    report = {"step": "train", "resumedFromStep": 0, "result": {"checkpoint": {"step": 2}}}
    playground.fail(pod, "train", Step.TRAIN, 75, report)
    playground.pod("train", 2)
    attempts = playground.until(lambda: playground.status()["attempts"].get("preemptions") and playground.status())
    assert attempts["attempts"]["failures"] == 0
    ended = [item for item in attempts["attempts"]["history"] if item["stage"] == "train" and item["number"] == 1]
    assert (ended[0]["outcome"], ended[0]["checkpointStep"]) == ("Preempted", 2)


def test_a_user_error_fails_the_job_in_the_steps_words_and_nothing_is_tried_again(playground):
    playground.submit()
    report = error_report(
        Step.DOWNLOAD, "RepositoryNotFound", "hf://models/tiny does not exist", "check spec.model.uri"
    )
    playground.fail(playground.pod("prepare"), "prepare", Step.DOWNLOAD, 66, report)
    playground.until_phase("Failed")
    failed = playground.condition("Failed")
    assert failed["reason"] == "RepositoryNotFound"
    assert "check spec.model.uri" in failed["message"]
    assert playground.children() == ["Job/tune-prepare-1", "PersistentVolumeClaim/tune-work"]


def test_a_crash_is_tried_again_after_a_while(playground):
    pod = to_training(playground)
    playground.fail(pod, "train", Step.TRAIN, 1)
    playground.until_says("train attempt 2 starts at")
    playground.pod("train", 2)
    assert playground.status()["attempts"]["failures"] == 1


def test_an_output_claim_that_is_missing_is_waited_for(playground):
    playground.submit(output={"uri": "pvc://later/out"})
    playground.until_says("waits for the claim later, which does not exist: create it and the job goes on")
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Mi"}}}
    playground.create(
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "later"}, "spec": spec}
    )
    playground.until_says("node(s) didn't match Pod's node affinity/selector")


def test_a_quota_is_told_in_the_servers_words(playground):
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}
    playground.create(quota)
    playground.until(lambda: (playground.list("ResourceQuota")[0].get("status") or {}).get("hard"))
    playground.submit()
    assert "exceeded quota: none" in playground.until_says("the pod cannot be created: FailedCreate")


def test_a_pod_that_the_server_never_accepts_fails_the_job_in_its_words(playground):
    playground.submit(prepare={"resources": {"limits": {"memory": "1Gi"}, "requests": {"memory": "2Gi"}}})
    playground.until_phase("Failed")
    assert playground.condition("Failed")["reason"] == "InvalidSpec"
    assert "must be less than or equal to memory limit" in playground.condition("Failed")["message"]


def test_suspended_it_stops_and_later_the_same_job_goes_on(playground):
    to_training(playground)
    playground.patch(KIND, "tune", {"spec": {"suspend": True}})
    playground.until_phase("Suspended")
    assert playground.condition("Suspended")["status"] == "True"
    assert playground.get("Job", "tune-train-1")["spec"]["suspend"]
    playground.patch(KIND, "tune", {"spec": {"suspend": False}})
    pod = playground.pod("train", 1)
    playground.run(pod, "train", Step.TRAIN)
    playground.until_phase("Training")
    assert playground.condition("Suspended")["status"] == "False"
    assert playground.status()["attempts"]["count"] == 1


def test_deleted_and_applied_again_at_once_the_new_job_waits_for_the_old_pod(playground):
    pod = to_training(playground)
    playground.patch("Pod", pod, {"metadata": {"finalizers": ["finetune.dev/test"]}})
    playground.delete(KIND, "tune")
    new = playground.submit()
    playground.until_says(f"waiting for pod {pod} of the former job of this name to be gone")
    assert "Job/tune-prepare-1" not in [
        f"Job/{item['metadata']['name']}"
        for item in playground.list("Job")
        if item["metadata"]["ownerReferences"][0]["uid"] == new["metadata"]["uid"]
    ]
    playground.patch("Pod", pod, {"metadata": {"finalizers": None}})
    playground.pod("prepare")
    playground.until(lambda: playground.get("Job", "tune-prepare-1"))
    owner = playground.get("Job", "tune-prepare-1")["metadata"]["ownerReferences"][0]["uid"]
    assert owner == new["metadata"]["uid"]


def test_deleted_while_the_operator_is_down_everything_goes(playground):
    to_training(playground)
    playground.operator.stop()
    playground.delete(KIND, "tune")
    playground.until(lambda: not playground.children() and not playground.list("Pod"), 60)
    playground.operator.start()


def test_killed_at_any_time_the_operator_goes_on_where_it_was(playground):
    pod = to_training(playground)
    playground.operator.stop(signal.SIGKILL)
    playground.succeed(pod, "train")
    playground.operator.start()
    playground.succeed(playground.pod("save"), "save")
    status = playground.until_phase("Complete")
    assert status["attempts"]["count"] == 1


def test_a_failed_job_is_deleted_in_its_time(playground):
    playground.submit(output={"uri": "pvc://later/out"}, ttlSecondsAfterFailed=1)
    report = error_report(Step.DOWNLOAD, "Gated", "x")
    playground.fail(playground.pod("prepare"), "prepare", Step.DOWNLOAD, 78, report)
    playground.until(lambda: playground.get(KIND, "tune") is None)
