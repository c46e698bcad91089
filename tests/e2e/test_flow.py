"""A FineTuneJob goes through the whole flow, undisturbed and disturbed, and ends with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.jobs import CHECKPOINT_EVERY, STEPS, condition, holds, tiny_job, training_attempts
from tests.e2e.namespace import Namespace
from tests.installation import Installation

FLOW = ("ModelDownloaded", "TokensAdded", "ModelReloaded", "DatasetLoaded", "Trained", "Saved", "Complete")


@pytest.fixture(scope="module")
def undisturbed(installation: Installation):
    """The job as nothing happened to it: its last state and its namespace."""
    namespace = Namespace.create(installation.cluster, "e2e")
    namespace.apply(namespace.claim("models"), tiny_job("calm", output={"uri": "pvc://models/calm"}))
    yield namespace.until_phase("calm", "Complete"), namespace
    namespace.delete()


def test_every_phase_is_passed_and_recorded(undisturbed):
    job, namespace = undisturbed
    status = job["status"]
    assert [kind for kind in FLOW if not holds(job, kind)] == []
    assert condition(job, "Failed")["status"] == "False"
    assert status["observedGeneration"] == job["metadata"]["generation"]
    assert status["model"]["commit"]
    assert status["tokens"]["added"] == 2
    assert status["tokens"]["vocabularySize"] == status["tokens"]["vocabularySizeBefore"] + 2
    assert status["dataset"]["validationExamples"] > 0
    assert status["training"]["steps"] == STEPS
    assert status["training"]["exact"] is True
    assert status["progress"]["percent"] == 100
    attempts = status["attempts"]
    assert (attempts["count"], attempts["failures"], attempts["preemptions"]) == (1, 0, 0)
    assert 0 < attempts["goodput"] <= 1
    names = [container["name"] for container in pod_of(namespace, "calm", "prepare")["spec"]["initContainers"]]
    assert names == ["download-model", "add-tokens", "reload-model"]


def test_the_result_lies_where_the_job_said_and_is_what_status_says(undisturbed):
    job, namespace = undisturbed
    output = namespace.volume("models") / "calm"
    files = {path.name for path in output.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "provenance.json", "loss.png"} <= files
    assert job["status"]["output"]["uri"] == "pvc://models/calm"
    assert "<think>" in (output / "tokenizer.json").read_text()


def test_kubectl_shows_the_flow_at_a_glance(undisturbed):
    _, namespace = undisturbed
    table = namespace.cluster.kubectl("get", "ftj", namespace=namespace.name).stdout
    assert table.splitlines()[0].split() == ["NAME", "PHASE", "PROGRESS", "LOSS", "REMAINING", "ATTEMPT", "AGE"]
    assert "Complete" in table


def test_events_tell_the_transitions(undisturbed):
    _, namespace = undisturbed
    reasons = {
        event["reason"] for event in namespace.list("events") if event["involvedObject"]["kind"] == "FineTuneJob"
    }
    assert {"Trained", "Complete"} <= reasons


def test_a_training_pod_killed_in_mid_training_resumes_to_equal_weights(undisturbed, namespace):
    calm, _ = undisturbed
    namespace.apply(tiny_job("killed"))
    wait_for_checkpoint(namespace, "killed")
    namespace.kill(namespace.pod("killed", "train"))
    job = namespace.until_phase("killed", "Complete")
    first, second = training_attempts(job)
    assert first["outcome"] == "Crashed"
    assert second["outcome"] == "Succeeded"
    assert second["resumedFromStep"] >= CHECKPOINT_EVERY
    assert job["status"]["output"]["sha256"] == calm["status"]["output"]["sha256"]


def test_an_evicted_training_pod_resumes_to_equal_weights_at_no_cost(undisturbed, namespace):
    calm, _ = undisturbed
    namespace.apply(tiny_job("evicted", retry={"limit": 0}))
    wait_for_checkpoint(namespace, "evicted")
    namespace.evict(namespace.pod("evicted", "train"))
    job = namespace.until_phase("evicted", "Complete")
    first, second = training_attempts(job)
    assert first["outcome"] == "Preempted"
    assert second["resumedFromStep"] >= CHECKPOINT_EVERY
    assert job["status"]["attempts"]["preemptions"] == 1
    assert job["status"]["attempts"]["failures"] == 0
    assert job["status"]["output"]["sha256"] == calm["status"]["output"]["sha256"]


def test_training_goes_on_without_the_operator_and_nothing_is_repeated(undisturbed, namespace, installation):
    calm, _ = undisturbed
    namespace.apply(tiny_job("alone"))
    namespace.until_phase("alone", "Training")
    wait_for_checkpoint(namespace, "alone")
    installation.scale(0)
    try:
        pod = next(pod for pod in namespace.list("pods", "alone") if stage_of(pod) == "train")
        namespace.until_true(
            lambda: phase_of_pod(namespace, "alone", pod) == "Succeeded", "the training pod ends by itself"
        )
    finally:
        installation.scale(1)
    job = namespace.until_phase("alone", "Complete")
    assert len(training_attempts(job)) == 1
    assert sorted(stage_of(item) for item in namespace.list("jobs", "alone")) == ["prepare", "save", "train"]
    assert job["status"]["output"]["sha256"] == calm["status"]["output"]["sha256"]


def test_a_suspended_job_stops_after_a_checkpoint_and_goes_on_from_there(undisturbed, namespace):
    calm, _ = undisturbed
    namespace.apply(tiny_job("paused"))
    wait_for_checkpoint(namespace, "paused")
    suspend(namespace, "paused", True)
    job = namespace.until_phase("paused", "Suspended")
    assert holds(job, "Suspended")
    namespace.until_true(
        lambda: not [pod for pod in namespace.list("pods", "paused") if pod["status"]["phase"] == "Running"],
        "no pod runs while the job is suspended",
    )
    suspend(namespace, "paused", False)
    job = namespace.until_phase("paused", "Complete")
    assert not holds(job, "Suspended")
    assert job["status"]["attempts"]["failures"] == 0
    assert job["status"]["output"]["sha256"] == calm["status"]["output"]["sha256"]


def suspend(namespace: Namespace, name: str, value: bool) -> None:
    patch = f'{{"spec": {{"suspend": {str(value).lower()}}}}}'
    namespace.cluster.kubectl("patch", "ftj", name, "--type=merge", "-p", patch, namespace=namespace.name)


def wait_for_checkpoint(namespace: Namespace, name: str) -> Path:
    """Wait until a first checkpoint is complete; training goes on."""
    namespace.until_phase(name, "Training")
    checkpoints = namespace.volume(f"{name}-work") / "checkpoints"
    # not step-10.partial: its marker is in it for a moment before it gets its name
    namespace.until_true(lambda: list(checkpoints.glob("step-*[0-9]/COMPLETE")), "a complete checkpoint")
    return checkpoints


def stage_of(item: dict) -> str:
    return str(item["metadata"]["labels"]["finetune.dev/stage"])


def phase_of_pod(namespace: Namespace, job: str, pod: dict) -> str:
    uid = pod["metadata"]["uid"]
    return next(item["status"]["phase"] for item in namespace.list("pods", job) if item["metadata"]["uid"] == uid)


def pod_of(namespace: Namespace, job: str, stage: str) -> dict:
    return next(pod for pod in namespace.list("pods", job) if stage_of(pod) == stage)
