"""Trainers of the user's own under the contract: a plain trl script, and one that launches through Ray. Both are the
examples that the documentation shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.jobs import CHECKPOINT_EVERY, STEPS, Object, tiny_job, training, training_attempts
from tests.e2e.namespace import Namespace
from tests.installation import Installation

EXAMPLES = Path(__file__).parents[2] / "manifests/examples/own-trainer"


def scripts(*names: str) -> Object:
    """A ConfigMap of the example's scripts, as `kubectl create configmap --from-file` makes it."""
    data = {name: (EXAMPLES / name).read_text() for name in names}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "own-trainer"}, "data": data}


def own(name: str, container: Object, **changes: object) -> Object:
    return tiny_job(name, training=training(container=container, **changes), output={"uri": f"pvc://models/{name}"})


TRL = {"command": ["python3", "/scripts/train_trl.py"], "scripts": {"configMap": "own-trainer"}}


def test_a_plain_trl_script_trains_shows_progress_and_its_model_is_published(namespace: Namespace) -> None:
    namespace.apply(namespace.claim("models"), scripts("train_trl.py"), own("plain", TRL))
    namespace.until("plain", lambda job: shown(job).get("loss") is not None, "showing its loss", 300)
    job = namespace.until_phase("plain", "Complete", seconds=300)
    assert job["status"]["training"]["steps"] == STEPS
    assert job["status"]["training"]["loss"] > 0
    output = namespace.volume("models") / "plain"
    assert "<think>" in (output / "tokenizer.json").read_text()
    assert (output / "model.safetensors").is_file()


def test_a_trl_script_that_is_evicted_goes_on_from_its_checkpoint(namespace: Namespace) -> None:
    job = own("evicted", TRL, maxSteps=150)
    job["spec"]["retry"] = {"limit": 0}
    namespace.apply(namespace.claim("models"), scripts("train_trl.py"), job)
    namespace.until_phase("evicted", "Training")
    checkpoints = namespace.volume("evicted-work") / "checkpoints"
    namespace.until_true(lambda: list(checkpoints.glob("*/trainer_state.json")), "a checkpoint of trl's trainer", 300)
    namespace.evict(namespace.pod("evicted", "train"))
    done = namespace.until_phase("evicted", "Complete", seconds=400)
    first, second = training_attempts(done)
    assert (first["outcome"], second["outcome"]) == ("Preempted", "Succeeded")
    assert first["checkpointStep"] >= CHECKPOINT_EVERY
    assert done["status"]["attempts"]["failures"] == 0


def test_a_script_that_fails_is_told_in_its_own_last_words(namespace: Namespace) -> None:
    said = "import sys; print('ValueError: the moon is not full', file=sys.stderr); sys.exit(65)"
    namespace.apply(namespace.claim("models"), own("moody", {"command": ["python3", "-c", said]}))
    job = namespace.until_phase("moody", "Failed", seconds=300)
    assert "the moon is not full" in job["status"]["message"]


@pytest.fixture(scope="module")
def ray_image(installation: Installation) -> str:
    """The training image plus Ray, from the target ray."""
    return installation.cluster.build_image("ray")


def test_a_trainer_that_launches_through_ray(namespace: Namespace, ray_image: str) -> None:
    container = {
        "image": ray_image,
        "command": ["python3", "/scripts/train_ray.py"],
        "scripts": {"configMap": "own-trainer"},
    }
    resources = {
        "limits": {"nvidia.com/gpu": "2", "cpu": "2", "memory": "5Gi"},
        "requests": {"cpu": "500m", "memory": "3Gi"},
    }
    job = own("ray", container, maxSteps=10, resources=resources)
    namespace.apply(namespace.claim("models"), scripts("train_trl.py", "train_ray.py"), job)
    done = namespace.until_phase("ray", "Complete", seconds=500)
    assert done["status"]["training"]["steps"] == 10
    assert (namespace.volume("models") / "ray/model.safetensors").is_file()


def shown(job: Object) -> Object:
    progress = job.get("status", {}).get("progress", {})
    assert isinstance(progress, dict)
    return progress
