"""A real API server that refuses, and a tenant who plays with labels: one job is held up, and nobody else."""

from __future__ import annotations

import re
import time

import pytest

from finetune.api import KIND
from finetune.api.contract import JOB_LABEL, Step
from tests.integration.controller.process import OperatorProcess

pytestmark = pytest.mark.cluster

WEBHOOKS = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"


@pytest.fixture
def broken_webhook(playground):
    """A webhook for Jobs of the namespace that nobody answers; a call removes it."""
    name = f"{playground.namespace}.finetune.dev"
    service = {"name": "nobody", "namespace": playground.namespace, "path": "/"}
    webhook = {
        "name": name,
        "admissionReviewVersions": ["v1"],
        "sideEffects": "None",
        "failurePolicy": "Fail",
        "clientConfig": {"service": service},
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": playground.namespace}},
        "rules": [{"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}],
    }
    playground.api.request("POST", WEBHOOKS, {"metadata": {"name": name}, "webhooks": [webhook]})

    def remove() -> None:
        playground.api.request("DELETE", f"{WEBHOOKS}/{name}")

    removed = []
    yield lambda: (removed.append(name), remove())
    if not removed:
        remove()


def writes(playground, verb: str, kind: str) -> int:
    line = re.search(
        rf'finetune_api_writes_total{{kind="{kind}",verb="{verb}"}} (\d+)', playground.operator.page("metrics")
    )
    return int(line[1]) if line else 0


def test_a_webhook_that_nobody_answers_is_told_once_and_costs_next_to_nothing(playground, broken_webhook):
    playground.until(lambda: refuses(playground), message="the webhook is not in place")
    playground.submit()
    began = time.monotonic()
    said = playground.until_says("the Job tune-prepare-1 cannot be created: ")
    assert "failed calling webhook" in said
    playground.until(lambda: writes(playground, "POST", "jobs") == 4, 60, "it is not tried again")
    assert time.monotonic() - began > 15
    assert writes(playground, "PATCH", "finetunejobs/status") <= 2
    assert playground.status()["message"] == said
    told = [item for item in playground.list("Event") if "cannot be created" in item["message"]]
    assert [(item["type"], item["reason"]) for item in told] == [("Warning", "Waiting")]
    broken_webhook()
    playground.until(lambda: not refuses(playground), message="the webhook is still in place")
    playground.patch(KIND, "tune", {"spec": {"activeDeadlineSeconds": 86_400}})
    playground.pod("prepare", seconds=10)
    playground.until(lambda: "cannot be created" not in playground.status()["message"], 10)


def refuses(playground) -> bool:
    container = {"name": "x", "image": "none"}
    template = {"spec": {"containers": [container], "restartPolicy": "Never"}}
    body = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "probe"}, "spec": {"template": template}}
    try:
        playground.api.request("POST", playground.path("Job") + "?dryRun=All", body)
    except Exception as error:
        return "webhook" in str(error)
    return False


def test_a_label_taken_off_and_put_back_turns_nothing_red_and_the_job_goes_on(cluster, playground, tmp_path):
    playground.operator.stop()
    operator = OperatorProcess(
        cluster, playground.namespace, playground.namespace, tmp_path / "labels.log", FINETUNE_RESYNC_SECONDS="0.5"
    )
    playground.operator = operator.start()
    try:
        playground.submit()
        pod = playground.pod("prepare")
        playground.run(pod, "prepare", Step.DOWNLOAD)
        playground.until_phase("Downloading")
        for value in (None, "tune"):
            playground.patch("Pod", pod, {"metadata": {"labels": {JOB_LABEL: value}}})
        compared = time.monotonic() + 20  # three rounds with a grace of three seconds each make a watch a dead one
        while time.monotonic() < compared:
            assert operator.probe("healthz") == 200, operator.page("healthz")
            time.sleep(0.2)
        playground.succeed(pod, "prepare")
        playground.pod("train")
        assert "lag behind" not in operator.log.read_text()
    finally:
        operator.stop()


def test_the_definition_of_the_same_age_is_known_in_full(playground):
    assert playground.operator.page("readyz") == "ok"
    assert "finetune_definition_unknown_fields 0.0" in playground.operator.page("metrics")
