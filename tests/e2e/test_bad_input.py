"""Whatever is wrong with a job, its status says what and how to mend it; nothing is tried again in vain."""

from __future__ import annotations

import pytest

from tests.cluster import CommandFailed
from tests.e2e.jobs import condition, holds, tiny_job, training
from tests.e2e.namespace import Namespace


def failed(namespace: Namespace, name: str) -> tuple[str, str]:
    """The Failed condition's reason and message of a job that failed without a second try."""
    job = namespace.until_phase(name, "Failed")
    jobs = [item["metadata"]["name"] for item in namespace.list("jobs", name)]
    assert len(jobs) == 1, f"tried again: {jobs}"
    assert holds(job, "Failed")
    assert condition(job, "Complete")["status"] == "False"
    found = condition(job, "Failed")
    return found["reason"], found["message"]


def test_a_repository_that_does_not_exist(namespace):
    namespace.apply(tiny_job("bad", model={"uri": "hf://tests/nowhere"}))
    reason, message = failed(namespace, "bad")
    assert reason == "ModelNotFound"
    assert "tests/nowhere" in message
    assert "spec.model.uri" in message


def test_a_gated_repository_without_credentials(namespace):
    namespace.apply(tiny_job("bad", model={"uri": "hf://tests/gated"}))
    reason, message = failed(namespace, "bad")
    assert reason == "ModelGated"
    assert "spec.credentials" in message


def test_a_truncated_safetensors_file(namespace):
    namespace.apply(tiny_job("bad", model={"uri": "hf://tests/truncated"}))
    _, message = failed(namespace, "bad")
    assert "model.safetensors" in message


def test_an_empty_token_is_refused_at_apply(namespace):
    with pytest.raises(CommandFailed, match="content"):
        namespace.apply(tiny_job("bad", tokens={"add": [{"content": ""}]}))


def test_a_copy_of_a_token_that_is_unknown(namespace):
    tokens = {"add": [{"content": "<think>", "init": {"copyOf": "<|im_strat|>"}}]}
    namespace.apply(tiny_job("bad", tokens=tokens))
    reason, message = failed(namespace, "bad")
    assert reason == "UnknownToken"
    assert "spec.tokens.add[0].init.copyOf" in message
    assert "<|im_strat|>" in message


def test_a_template_that_names_a_missing_column(namespace):
    dataset = tiny_job("any")["spec"]["dataset"]
    dataset["sources"][0]["template"]["user"] = "{{ question }}"
    namespace.apply(tiny_job("bad", dataset=dataset))
    _, message = failed(namespace, "bad")
    assert "spec.dataset.sources[0].template.user" in message
    assert "question" in message
    assert "instruction" in message


def test_an_output_claim_that_does_not_exist_is_waited_for(namespace):
    namespace.apply(tiny_job("waits", output={"uri": "pvc://later/model"}))
    job = namespace.until(
        "waits", lambda job: "later" in job.get("status", {}).get("message", ""), "waiting for the claim"
    )
    assert job["status"]["phase"] == "Pending"
    namespace.apply(namespace.claim("later"))
    namespace.until_phase("waits", "Complete")
    assert (namespace.volume("later") / "model" / "model.safetensors").exists()


def test_gpus_that_no_node_has(namespace):
    limits = {"nvidia.com/gpu": "64", "memory": "1Gi"}
    namespace.apply(tiny_job("big", training=training(batchSize=256, resources={"limits": limits})))
    job = namespace.until(
        "big", lambda job: "nvidia.com/gpu" in job.get("status", {}).get("message", ""), "waiting for GPUs"
    )
    assert "Insufficient nvidia.com/gpu" in job["status"]["message"], "the scheduler's own words"
    assert not holds(job, "Failed")


def test_a_value_without_behaviour_names_its_field(namespace):
    namespace.apply(tiny_job("bad", training=training(parallelism="DeepSpeedZeRO")))
    job = namespace.until_phase("bad", "Failed")
    found = condition(job, "Failed")
    assert found["reason"] == "NotImplemented"
    assert "spec.training.parallelism" in found["message"]
    assert namespace.owned("bad") == []
