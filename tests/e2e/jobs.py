"""The small job of the end-to-end tests: a tiny model, long enough to be interrupted, quick enough to repeat."""

from __future__ import annotations

from typing import Any

Object = dict[str, Any]
STEPS = 40
CHECKPOINT_EVERY = 10


def tiny_job(name: str, **spec: Any) -> Object:
    """A FineTuneJob that adds two tokens and trains the hub's tiny model; `spec` replaces top-level fields."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": "hf://tests/tiny"},
            "tokens": {"add": [{"content": "<think>"}, {"content": "</think>"}]},
            "dataset": {
                "sources": [
                    {
                        "uri": "hf://datasets/tests/rows",
                        "template": {
                            "user": "{{ instruction }}",
                            "assistant": "<think>{{ reasoning }}</think>{{ output }}",
                        },
                    }
                ],
                "validation": {"fraction": 0.1},
                "maxLength": 256,
            },
            "training": {
                "maxSteps": STEPS,
                "batchSize": 8,
                "microBatchSize": 4,
                "learningRate": 1e-3,
                "checkpoint": {"everySteps": CHECKPOINT_EVERY},
                "resources": {"limits": {"nvidia.com/gpu": "1", "cpu": "1", "memory": "3Gi"}},
                "terminationGracePeriodSeconds": 30,
            },
            "workspace": {"size": "1Gi"},
            **spec,
        },
    }


def training(**changes: Any) -> Object:
    """The tiny job's training section with changes."""
    section = tiny_job("any")["spec"]["training"]
    assert isinstance(section, dict)
    return {**section, **changes}


def condition(job: Object, kind: str) -> Object:
    """One of the job's conditions."""
    found = [item for item in job["status"]["conditions"] if item["type"] == kind]
    assert found, f"no condition {kind}"
    result = found[0]
    assert isinstance(result, dict)
    return result


def holds(job: Object, kind: str) -> bool:
    """Whether the condition is True."""
    return bool(condition(job, kind)["status"] == "True")


def training_attempts(job: Object) -> list[Object]:
    """The training attempts that status remembers."""
    return [attempt for attempt in job["status"]["attempts"]["history"] if attempt["stage"] == "train"]
