"""How a replica reaches the API server: few and many namespaces, every kind of kubeconfig, a server that is busy."""

from __future__ import annotations

import base64
import contextlib
import json
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from finetune.api import KIND
from finetune.api.contract import Step
from tests.cluster import Cluster
from tests.cluster.api import Api
from tests.cluster.layout import CONTROL_PLANE_ADDRESS
from tests.cluster.pki import PORT
from tests.integration.controller.busy_server import busy_server
from tests.integration.controller.playground import Playground
from tests.integration.controller.process import OperatorProcess
from tests.integration.controller.test_flow import told
from tests.integration.controller.test_service import report, token

pytestmark = pytest.mark.cluster


@pytest.fixture
def namespaces(cluster, request):
    """That many namespaces."""
    api, names = Api(cluster.layout, timeout=30), [f"many-{time.time_ns() % 10**9}-{n}" for n in range(request.param)]
    for name in names:
        api.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
    yield names
    for name in names:
        api.request("DELETE", f"/api/v1/namespaces/{name}")


@pytest.mark.parametrize("namespaces", [1, 7, 40], indirect=True, ids=lambda count: f"{count} namespaces")
def test_however_many_namespaces_each_is_served(cluster, namespaces, tmp_path):
    operator = OperatorProcess(
        cluster, namespaces[0], namespaces[0], tmp_path / "log", FINETUNE_NAMESPACES=",".join(namespaces)
    ).start()
    try:
        for name in {namespaces[0], namespaces[-1]}:
            playground = Playground(Api(cluster.layout, timeout=30), name, operator)
            playground.submit()
            pod = playground.pod("prepare")
            playground.run(pod, "prepare", Step.DOWNLOAD)  # the watch of pods, too, stands
            playground.until_phase("Downloading")
    finally:
        operator.stop()


def test_a_busy_server_costs_nothing_but_time(cluster, playground, tmp_path):
    """From the first list to the job's last condition lists, watches, writes and reviews are refused; all is well."""
    playground.operator.stop()
    with busy_server(cluster, tmp_path) as (server, kubeconfig):
        operator = OperatorProcess(
            cluster,
            playground.namespace,
            playground.namespace,
            tmp_path / "busy.log",
            KUBECONFIG=str(kubeconfig),
            FINETUNE_LEASE="busy",  # they are created anew, so that creating them is refused, too
            FINETUNE_CA_SECRET="busy-ca",
            FINETUNE_LEASE_SECONDS="15",
        )
        operator.progress_at("127.0.0.1")
        playground.operator = operator
        try:
            operator.start(seconds=90)
            process = operator.process.pid
            playground.submit()
            pod = playground.pod("prepare", seconds=60)
            playground.run(pod, "prepare", Step.DOWNLOAD)
            playground.until_phase("Downloading", seconds=60)
            bearer = token(playground, pod)
            playground.until(lambda: report(playground, pod, bearer, progressPercentage=43) == 200)
            playground.until(lambda: playground.status()["progress"].get("percent") == 43, 60)
            playground.succeed(pod, "prepare")
            for stage, step in (("train", Step.TRAIN), ("save", Step.SAVE)):
                pod = playground.pod(stage, seconds=60)
                playground.run(pod, stage, step)
                playground.succeed(pod, stage)
            playground.until_phase("Complete", seconds=60)
            wanted = {"ModelDownloaded", "DatasetLoaded", "Trained", "Saved", "Complete"}
            playground.until(lambda: wanted <= told(playground), 60, "Events are missing")
            assert playground.status()["attempts"]["failures"] == 0
            assert [name for name in playground.children() if name.startswith("Job/")] == [
                "Job/tune-prepare-1",
                "Job/tune-save-1",
                "Job/tune-train-1",
            ]
            playground.delete(KIND, "tune")
            playground.submit()  # a store that missed the deletion would not take the new one up
            playground.until(lambda: playground.status().get("phase") == "Pending", 60)
            assert (operator.process.pid, operator.process.poll()) == (process, None)
            for which in (
                *(
                    f"{verb} {kind}"
                    for verb in ("LIST", "WATCH")
                    for kind in ("finetunejobs", "jobs", "pods", "events")
                ),
                *("PATCH finetunejobs/status", "POST jobs", "POST persistentvolumeclaims", "POST events"),
                *("POST leases", "PUT leases", "POST secrets", "POST tokenreviews"),
            ):
                assert server.refused[which], f"{which} was never refused: {server.refused}"
        finally:
            status = operator.stop()
    assert status == 0
    assert "Traceback" not in operator.log.read_text()


def kubeconfig(cluster: Cluster, path: Path, user: dict, **of_cluster) -> Path:
    """The cluster's kubeconfig with another user."""
    document = yaml.safe_load(cluster.kubeconfig.read_text())
    document["users"][0]["user"] = user
    document["clusters"][0]["cluster"] |= of_cluster
    path.write_text(yaml.safe_dump(document))
    return path


def certificate(cluster: Cluster) -> dict[str, str]:
    return {name: (cluster.layout.pki / f"admin.{name}").read_text() for name in ("crt", "key")}


def by_token(playground: Playground) -> str:
    """A token of a service account that may do everything."""
    account = {"metadata": {"name": "operator"}}
    playground.api.request("POST", f"/api/v1/namespaces/{playground.namespace}/serviceaccounts", account)
    subject = {"kind": "ServiceAccount", "name": "operator", "namespace": playground.namespace}
    binding = {
        "metadata": {"name": playground.namespace},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [subject],
    }
    playground.api.request("POST", "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", binding)
    path = f"/api/v1/namespaces/{playground.namespace}/serviceaccounts/operator/token"
    return str(playground.api.request("POST", path, {"spec": {"expirationSeconds": 3600}})["status"]["token"])


@pytest.fixture
def bound(playground):
    """A token, whose rights end with the test."""
    yield by_token(playground)
    path = f"/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/{playground.namespace}"
    playground.api.request("DELETE", path)


@pytest.fixture
def relay():
    """A port of 127.0.0.2 that leads to the API server."""

    def pass_on(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection((CONTROL_PLANE_ADDRESS, PORT))
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=pass_on, args=ends, daemon=True).start()

    with socket.create_server(("127.0.0.2", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("way", ["exec with a token", "exec with a certificate", "tokenFile", "tls-server-name"])
def test_every_kind_of_kubeconfig_lets_the_operator_in(cluster, playground, bound, relay, tmp_path, way):
    playground.operator.stop()
    (tmp_path / "token").write_text(bound + "\n")
    pem = certificate(cluster)
    credential = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential"}
    given = {"token": bound} if "token" in way else {"clientCertificateData": pem["crt"], "clientKeyData": pem["key"]}
    (tmp_path / "credential").write_text(json.dumps(credential | {"status": given}))
    script = tmp_path / "plugin.py"
    script.write_text("import pathlib; print((pathlib.Path(__file__).parent / 'credential').read_text())")
    plugin = {
        "apiVersion": credential["apiVersion"],
        "command": sys.executable,
        "args": [str(script)],
        "interactiveMode": "Never",
    }
    encoded = {name: base64.b64encode(text.encode()).decode() for name, text in pem.items()}
    users = {
        "tokenFile": {"tokenFile": "token"},
        "tls-server-name": {"client-certificate-data": encoded["crt"], "client-key-data": encoded["key"]},
    }
    of_cluster = {}
    if way == "tls-server-name":  # an address that the certificate does not name, and a name that it does
        of_cluster = {"server": f"https://127.0.0.2:{relay}", "tls-server-name": "kubernetes.default.svc"}
    path = kubeconfig(cluster, tmp_path / "config", users.get(way, {"exec": plugin}), **of_cluster)
    operator = OperatorProcess(
        cluster, playground.namespace, playground.namespace, tmp_path / "log", KUBECONFIG=str(path)
    )
    playground.operator = operator
    operator.start()
    try:
        playground.submit()
        playground.pod("prepare")
        playground.until_says("Unschedulable")
    finally:
        assert operator.stop(signal.SIGTERM) == 0


@pytest.mark.parametrize(
    ("trouble", "said"),
    [("credentials", "does not accept the operator's credentials"), ("rights", "cannot be listed: 403 Forbidden")],
)
def test_what_no_waiting_would_change_ends_the_process_in_one_sentence(cluster, playground, tmp_path, trouble, said):
    playground.operator.stop()
    user = {"token": "invented"}
    if trouble == "rights":
        path = f"/api/v1/namespaces/{playground.namespace}/serviceaccounts/default/token"
        user = {"token": playground.api.request("POST", path, {"spec": {}})["status"]["token"]}
    path = kubeconfig(cluster, tmp_path / "config", user)
    operator = OperatorProcess(
        cluster, playground.namespace, playground.namespace, tmp_path / "log", KUBECONFIG=str(path)
    )
    operator.start(ready=False)
    assert operator.process.wait(timeout=60) == 1
    (sentence,) = [line for line in operator.tail().splitlines() if line.startswith("finetune-operator:")]
    assert said in sentence
    assert "Traceback" not in operator.tail()
