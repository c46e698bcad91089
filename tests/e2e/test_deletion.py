"""A deleted job leaves nothing, whatever it was doing and whether or not the operator runs."""

from __future__ import annotations

import pytest

from tests.e2e.jobs import tiny_job, training
from tests.e2e.namespace import Namespace

GRACE = 60
"""Seconds: the pods' own grace period (30) and the garbage collector's work."""

PHASES = ("Downloading", "AddingTokens", "Reloading", "LoadingDataset", "Training", "Saving", "Complete")


def gone(namespace: Namespace, name: str) -> None:
    namespace.until_true(
        lambda: not namespace.owned(name), f"everything that {name} owned is gone; left: {namespace.owned(name)}", GRACE
    )


@pytest.fixture
def stopped_operator(installation):
    """Callable that stops the operator; it runs again after the test."""
    yield lambda: installation.scale(0)
    installation.scale(1)


@pytest.mark.parametrize("phase", PHASES)
def test_deleted_in(phase, namespace):
    namespace.apply(tiny_job("gone"))
    namespace.until_phase("gone", *PHASES[PHASES.index(phase) :])
    namespace.delete_job("gone")
    gone(namespace, "gone")


def test_deleted_while_the_operator_is_down(namespace, stopped_operator):
    """One job with a pod that prepares, one with a pod that trains, one that is done: each held where it is."""
    namespace.apply(tiny_job("complete"))
    namespace.until_phase("complete", "Complete")
    namespace.apply(tiny_job("training", training=training(maxSteps=20_000)))
    namespace.until_phase("training", "Training")
    namespace.apply(tiny_job("downloading", model={"uri": "hf://tests/slow"}))
    namespace.until_phase("downloading", "Downloading")
    stopped_operator()
    jobs = ("downloading", "training", "complete")
    for name in jobs:
        assert namespace.owned(name)
        namespace.delete_job(name)
    for name in jobs:
        gone(namespace, name)


def test_applied_again_under_the_same_name_waits_for_the_old_pods_then_runs_clean(namespace):
    namespace.apply(tiny_job("again"))
    namespace.until_phase("again", "Training")
    namespace.until_true(lambda: namespace.pod("again", "train")["status"]["phase"] == "Running", "training runs")
    old = namespace.job("again")["metadata"]["uid"]
    old_pods = {pod["metadata"]["uid"] for pod in namespace.list("pods", "again")}
    namespace.delete_job("again")
    namespace.until_true(lambda: recreated(namespace, old), "the name is free")
    overlaps = []

    def watched(job: dict) -> bool:
        pods = living(namespace, "again")
        if pods & old_pods and pods - old_pods:
            overlaps.append(pods)
        return bool(job.get("status", {}).get("phase") == "Complete")

    job = namespace.until("again", watched, "Complete")
    assert overlaps == [], "pods of both jobs ran at the same time"
    assert job["metadata"]["uid"] != old
    assert job["status"]["attempts"]["count"] == 1


def recreated(namespace: Namespace, old_uid: str) -> bool:
    """Apply at once, as a user does; while the old object is still there, that only changes the old one."""
    namespace.apply(tiny_job("again", training=training(learningRate=2e-3)))
    return bool(namespace.job("again")["metadata"]["uid"] != old_uid)


def living(namespace: Namespace, name: str) -> set[str]:
    """UIDs of the job's pods that have not ended."""
    pods = namespace.list("pods", name)
    return {pod["metadata"]["uid"] for pod in pods if pod["status"]["phase"] in ("Pending", "Running")}
