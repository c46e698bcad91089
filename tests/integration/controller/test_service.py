"""What a replica is besides decisions: live progress, probes, leadership, a tidy end."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request

import pytest

from finetune.api.contract import CA_ANNOTATION, TOKEN_AUDIENCE, Step
from tests.integration.controller.playground import Playground
from tests.integration.controller.process import OperatorProcess

pytestmark = pytest.mark.cluster


def token(playground: Playground, pod: str, audience: str = TOKEN_AUDIENCE) -> str:
    """A token such as the kubelet projects into the pod."""
    uid = playground.get("Pod", pod)["metadata"]["uid"]
    bound = {"apiVersion": "v1", "kind": "Pod", "name": pod, "uid": uid}
    body = {"spec": {"audiences": [audience], "expirationSeconds": 600, "boundObjectRef": bound}}
    path = f"/api/v1/namespaces/{playground.namespace}/serviceaccounts/default/token"
    return str(playground.api.request("POST", path, body)["status"]["token"])


def report(playground: Playground, pod: str, bearer: str, **status) -> int:
    """POST as the stock callback does, trusting what the pod's annotation says."""
    authority = playground.get("Pod", pod)["metadata"]["annotations"][CA_ANNOTATION]
    request = urllib.request.Request(
        f"https://127.0.0.1:{playground.operator.progress_port}/",
        data=json.dumps({"trainerStatus": status}).encode(),
        headers={"Authorization": f"Bearer {bearer}", "Content-Type": "application/json"},
        method="POST",
    )
    try:
        with urllib.request.urlopen(request, timeout=5, context=ssl.create_default_context(cadata=authority)) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_pods_report_is_in_status_within_seconds(playground):
    playground.submit()
    pod = playground.pod("prepare")
    playground.run(pod, "prepare", Step.DOWNLOAD)
    playground.until_phase("Downloading")
    metrics = [{"name": "current", "value": "43"}, {"name": "total", "value": "100"}, {"name": "unit", "value": "row"}]
    bearer = token(playground, pod)
    assert report(playground, pod, bearer, progressPercentage=43, estimatedRemainingSeconds=61, metrics=metrics) == 200
    shown = playground.until(lambda: playground.status()["progress"].get("current") and playground.status()["progress"])
    assert (shown["step"], shown["summary"], shown["remaining"]) == ("download", "43% 43/100", "1m")
    assert playground.status()["phase"] == "Downloading"


def test_reports_that_are_not_a_living_pods_are_refused(playground):
    playground.submit()
    pod = playground.pod("prepare")
    playground.run(pod, "prepare", Step.DOWNLOAD)
    playground.until_phase("Downloading")
    assert report(playground, pod, "invented", progressPercentage=1) == 401
    audience = playground.api.request("GET", "/.well-known/openid-configuration")["issuer"]
    assert report(playground, pod, token(playground, pod, audience), progressPercentage=1) == 401
    bearer = token(playground, pod)
    assert report(playground, pod, bearer, metrics="no list") == 400
    playground.succeed(pod, "prepare")
    playground.pod("train")
    assert report(playground, pod, bearer, progressPercentage=1) == 403


def test_a_stranger_pod_cannot_report_by_wearing_the_labels(playground):
    playground.submit()
    pod = playground.pod("prepare")
    labels = playground.get("Pod", pod)["metadata"]["labels"]
    annotations = playground.get("Pod", pod)["metadata"]["annotations"]
    spec = playground.get("Pod", pod)["spec"]
    labels = {key: value for key, value in labels.items() if key.startswith("finetune.dev")}
    metadata = {"name": "stranger", "labels": labels, "annotations": annotations}
    playground.create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    playground.run("stranger", "prepare", Step.DOWNLOAD)
    assert report(playground, "stranger", token(playground, "stranger"), progressPercentage=1) == 403


def test_the_stock_callback_of_transformers_is_understood(playground, monkeypatch, tmp_path):
    integrations = pytest.importorskip("transformers.integrations.integration_utils")
    playground.submit()
    playground.succeed(playground.pod("prepare"), "prepare")
    pod = playground.pod("train")
    playground.run(pod, "train", Step.TRAIN)
    playground.until_phase("Training")
    (tmp_path / "token").write_text(token(playground, pod))
    (tmp_path / "ca.crt").write_text(playground.get("Pod", pod)["metadata"]["annotations"][CA_ANNOTATION])
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", f"https://127.0.0.1:{playground.operator.progress_port}/")
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_CA_CERT", str(tmp_path / "ca.crt"))
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(tmp_path / "token"))
    callback = integrations.KubeflowCallback()
    metrics = {"loss": 1.25, "learning_rate": 1e-5, "current_step": 120, "total_steps": 562, "current_epoch": 0.2}
    assert callback._update_status(21, 754, metrics, force=True)
    shown = playground.until(lambda: playground.status()["progress"].get("loss") and playground.status()["progress"])
    assert (shown["summary"], shown["remaining"], shown["loss"]) == ("21% 120/562", "12m", 1.25)


def test_when_the_leader_dies_another_replica_goes_on(playground, cluster, tmp_path):
    second = OperatorProcess(
        cluster, playground.namespace, playground.operator.name, tmp_path / "second.log", FINETUNE_IDENTITY="second"
    )
    second.progress_at("127.0.0.1")
    second.start(ready=False)
    try:
        second.wait_until(lambda: second.probe("readyz") == 200)
        assert "finetune_leading 0.0" in second.page("metrics")
        playground.operator.stop(9)
        playground.submit()
        playground.pod("prepare")
        assert "finetune_leading 1.0" in second.page("metrics")
    finally:
        second.stop()
        playground.operator.start()


def test_at_its_end_the_operator_releases_the_lease_and_leaves_cleanly(playground):
    assert playground.operator.stop() == 0
    assert playground.get("Lease", "finetune-operator")["spec"]["holderIdentity"] == ""
    playground.operator.start()


def test_probes_and_metrics_are_served(playground):
    assert playground.operator.probe("healthz") == 200
    playground.submit()
    playground.pod("prepare")
    playground.until(lambda: 'finetune_jobs{phase="Pending"} 1.0' in playground.operator.page("metrics"))
    assert 'finetune_api_writes_total{kind="jobs",verb="POST"} 1.0' in playground.operator.page("metrics")
