"""Two pods train one model over gloo; whatever befalls one of them, the weights are those of the undisturbed run."""

from __future__ import annotations

import pytest

from tests.e2e.jobs import CHECKPOINT_EVERY, STEPS, Object, tiny_job, training, training_attempts
from tests.e2e.namespace import Namespace
from tests.e2e.test_flow import stage_of, suspend, wait_for_checkpoint
from tests.installation import Installation

SMALL = {"limits": {"nvidia.com/gpu": "1", "cpu": "1", "memory": "2Gi"}, "requests": {"cpu": "200m", "memory": "1Gi"}}
"""Two of them beside everything else on a machine of two cores."""


def two_pods(name: str, **changes: object) -> Object:
    """The tiny job on two pods."""
    section = training(nodes=2, resources=SMALL, **changes)
    return tiny_job(name, training=section, workspace={"size": "1Gi", "accessModes": ["ReadWriteMany"]})


@pytest.fixture(scope="module")
def undisturbed(installation: Installation):
    """The job as nothing happened to it: its last state and its namespace."""
    namespace = Namespace.create(installation.cluster, "e2e")
    namespace.apply(two_pods("calm"))
    yield namespace.until_phase("calm", "Complete", seconds=400), namespace
    namespace.delete()


def test_two_pods_train_one_model(undisturbed):
    job, namespace = undisturbed
    status = job["status"]
    assert status["training"]["steps"] == STEPS
    assert status["training"]["exact"] is True
    assert status["attempts"]["count"] == 1
    pods = [pod for pod in namespace.list("pods", "calm") if stage_of(pod) == "train"]
    assert sorted(pod["spec"]["hostname"] for pod in pods) == ["calm-train-1-0", "calm-train-1-1"]
    assert {pod["spec"]["subdomain"] for pod in pods} == {"calm-train"}
    log = namespace.cluster.kubectl("logs", pods[0]["metadata"]["name"], namespace=namespace.name).stdout
    assert f"{STEPS} steps of 8 (4 x 1 x 2 devices)" in log


def test_one_pod_evicted_in_mid_run_stops_both_and_they_resume_to_equal_weights(undisturbed, namespace):
    calm, _ = undisturbed
    namespace.apply({**two_pods("evicted"), "spec": two_pods("evicted")["spec"] | {"retry": {"limit": 0}}})
    wait_for_checkpoint(namespace, "evicted")
    namespace.evict(pod_of_index(namespace, "evicted", 1))
    job = namespace.until_phase("evicted", "Complete", seconds=400)
    first, second = training_attempts(job)
    assert first["outcome"] == "Preempted"
    assert second["resumedFromStep"] >= CHECKPOINT_EVERY
    assert job["status"]["attempts"]["preemptions"] == 1
    assert job["status"]["attempts"]["failures"] == 0
    assert job["status"]["training"]["exact"] is True
    assert job["status"]["output"]["sha256"] == calm["status"]["output"]["sha256"]


def test_one_pod_killed_without_a_word_does_not_hang_the_other(undisturbed, namespace):
    calm, _ = undisturbed
    namespace.apply(two_pods("killed"))
    wait_for_checkpoint(namespace, "killed")
    namespace.kill(pod_of_index(namespace, "killed", 1))
    job = namespace.until_phase("killed", "Complete", seconds=400)
    first, second = training_attempts(job)
    assert first["outcome"] == "Crashed"
    assert first["pod"].startswith("killed-train-1-1")
    assert second["resumedFromStep"] >= CHECKPOINT_EVERY
    assert job["status"]["output"]["sha256"] == calm["status"]["output"]["sha256"]


def test_suspended_both_pods_go_and_the_same_job_goes_on(undisturbed, namespace):
    calm, _ = undisturbed
    namespace.apply(two_pods("paused"))
    wait_for_checkpoint(namespace, "paused")
    suspend(namespace, "paused", True)
    namespace.until_phase("paused", "Suspended")
    suspend(namespace, "paused", False)
    job = namespace.until_phase("paused", "Complete", seconds=400)
    assert job["status"]["attempts"]["failures"] == 0
    assert job["status"]["output"]["sha256"] == calm["status"]["output"]["sha256"]


def test_a_deleted_job_takes_its_service_with_it(namespace):
    namespace.apply(two_pods("gone"))
    path = f"/api/v1/namespaces/{namespace.name}/services"
    namespace.until_true(lambda: names(namespace, path) == ["gone-train"], "the Service of the training pods", 240)
    namespace.delete_job("gone")
    namespace.until_true(lambda: not names(namespace, path), "the Service goes with its job")


def test_fsdp_splits_the_model_between_two_pods(namespace):
    namespace.apply(two_pods("divided", parallelism="FSDP"))
    job = namespace.until_phase("divided", "Complete", seconds=400)
    assert job["status"]["training"]["steps"] == STEPS


def names(namespace: Namespace, path: str) -> list[str]:
    return [item["metadata"]["name"] for item in namespace.api.request("GET", path)["items"]]


def pod_of_index(namespace: Namespace, job: str, index: int) -> Object:
    """The running training pod of that index."""
    label = "batch.kubernetes.io/job-completion-index"
    return next(
        pod
        for pod in namespace.list("pods", job)
        if pod["metadata"]["labels"].get(label) == str(index) and pod["status"]["phase"] == "Running"
    )
