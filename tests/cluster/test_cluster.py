"""Claims about the local cluster itself, on the one that runs: storage, names, tokens, GPUs, logs and exec."""

import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster
from tests.cluster.containers import PAUSE_IMAGE as BUSYBOX

SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "runAsGroup": 65532,
    "fsGroup": 65532,
    "seccompProfile": {"type": "RuntimeDefault"},
}
# Debian's static busybox can neither look names up in wget itself nor take its -T.
FETCH = "timeout 2 wget -q -O - http://$(nslookup $name | awk '/^Address: / {print $2}' | tail -1):8080/"
CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}


pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return Cluster.current()


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A fresh namespace that admits only restricted pods."""
    name = f"cluster-test-{uuid.uuid4().hex[:8]}"
    cluster.kubectl("create", "namespace", name)
    cluster.kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


def pod(name: str, script: str, **more: Any) -> dict[str, Any]:
    """A restricted pod with a shell script; `volumeMounts` and `resources` go to its container, the rest to the pod."""
    container: dict[str, Any] = {
        "name": "main",
        "image": BUSYBOX,
        "command": ["/bin/sh", "-euc", script],
        "securityContext": CONTAINER_SECURITY,
        **{key: more.pop(key) for key in ("volumeMounts", "resources") if key in more},
    }
    spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 0,
        "securityContext": SECURITY,
        "containers": [container],
        **more,
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}}, "spec": spec}


def create(cluster: Cluster, namespace: str, *objects: dict[str, Any]) -> None:
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
    cluster.kubectl("create", "-f", "-", namespace=namespace, input=text)


def finished(cluster: Cluster, namespace: str, name: str, seconds: float = 60) -> str:
    """Waits until a pod has succeeded; returns its log."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        phase = cluster.kubectl("get", "pod", name, "-o", "jsonpath={.status.phase}", namespace=namespace).stdout
        if phase in ("Succeeded", "Failed"):
            log = cluster.kubectl("logs", name, namespace=namespace).stdout
            assert phase == "Succeeded", log
            return log
        time.sleep(0.2)
    raise AssertionError(cluster.kubectl("describe", "pod", name, namespace=namespace).stdout)


def running(cluster: Cluster, namespace: str, name: str) -> None:
    cluster.kubectl("wait", "--for=condition=Ready", f"pod/{name}", "--timeout=60s", namespace=namespace)


def claim(name: str, mode: str = "ReadWriteOnce") -> dict[str, Any]:
    spec = {"accessModes": [mode], "resources": {"requests": {"storage": "1Gi"}}}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec}


def with_claim(name: str) -> dict[str, Any]:
    return {
        "volumes": [{"name": "work", "persistentVolumeClaim": {"claimName": name}}],
        "volumeMounts": [{"name": "work", "mountPath": "/work"}],
    }


@pytest.mark.parametrize("mode", ["ReadWriteOnce", "ReadWriteMany"])
def test_a_restricted_pod_writes_to_a_dynamic_volume_whose_folder_goes_with_the_claim(
    cluster: Cluster, namespace: str, mode: str
) -> None:
    script = "echo kept > /work/file; mkdir /work/folder; id -G; ls -ln /work; "
    script += "touch /root-is-read-only 2>/dev/null && exit 1 || true"
    create(cluster, namespace, claim("work", mode), pod("writer", script, **with_claim("work")))
    assert "65532" in finished(cluster, namespace, "writer")
    create(cluster, namespace, pod("reader", "cat /work/file", **with_claim("work")))
    assert finished(cluster, namespace, "reader") == "kept\n"

    volume = cluster.kubectl("get", "pvc", "work", "-o", "jsonpath={.spec.volumeName}", namespace=namespace).stdout
    folder = Path(cluster.kubectl("get", "pv", volume, "-o", "jsonpath={.spec.local.path}").stdout)
    assert (folder / "file").read_text() == "kept\n"
    cluster.kubectl("delete", "pod", "writer", "reader", namespace=namespace)
    cluster.kubectl("delete", "pvc", "work", namespace=namespace)
    cluster.kubectl("wait", "--for=delete", f"pv/{volume}", "--timeout=20s")
    assert not folder.exists()


def test_names_of_services_and_of_headless_services_resolve_in_pods(cluster: Cluster, namespace: str) -> None:
    def service(name: str, **spec: Any) -> dict[str, Any]:
        ports = [{"port": 8080}]
        body = {"selector": {"app": "server"}, "ports": ports, **spec}
        return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": body}

    serve = "mkdir /tmp/www; echo hello > /tmp/www/index.html; exec httpd -f -p 8080 -h /tmp/www"
    temporary = {
        "volumes": [{"name": "tmp", "emptyDir": {}}],
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    early = service("early", clusterIP="None", publishNotReadyAddresses=True)
    create(cluster, namespace, service("web"), early, pod("server", serve, **temporary))
    running(cluster, namespace, "server")
    script = f"""
        nslookup kubernetes.default.svc.cluster.local
        for name in web.{namespace}.svc.cluster.local early.{namespace}.svc.cluster.local; do
            for try in $(seq 50); do {FETCH} && break; sleep 0.2; done
        done
    """
    create(cluster, namespace, pod("client", script))
    assert finished(cluster, namespace, "client").count("hello") == 2


def test_a_pod_reaches_its_own_service(cluster: Cluster, namespace: str) -> None:
    """Hairpin traffic: out through the Service's address and back in."""
    script = "mkdir /tmp/www; echo hello > /tmp/www/index.html; httpd -p 8080 -h /tmp/www; "
    script += (
        f"name=self.{namespace}.svc.cluster.local; for try in $(seq 50); do {FETCH} && exit; sleep 0.2; done; exit 1"
    )
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "self"},
        "spec": {"selector": {"app": "self"}, "ports": [{"port": 8080}]},
    }
    temporary = {
        "volumes": [{"name": "tmp", "emptyDir": {}}],
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    create(cluster, namespace, service, pod("self", script, **temporary))
    assert finished(cluster, namespace, "self") == "hello\n"


def test_logs_and_exec_work(cluster: Cluster, namespace: str) -> None:
    create(cluster, namespace, pod("shell", "echo started; exec sleep 600"))
    running(cluster, namespace, "shell")
    assert cluster.kubectl("logs", "shell", namespace=namespace).stdout == "started\n"
    assert cluster.kubectl("exec", "shell", "--", "id", "-u", namespace=namespace).stdout == "65532\n"


def test_a_token_for_an_audience_is_valid_for_that_audience_only(cluster: Cluster, namespace: str) -> None:
    token = {
        "volumes": [
            {
                "name": "token",
                "projected": {"sources": [{"serviceAccountToken": {"path": "token", "audience": "progress"}}]},
            }
        ],
        "volumeMounts": [{"name": "token", "mountPath": "/token"}],
        "automountServiceAccountToken": False,
    }
    create(cluster, namespace, pod("bearer", "exec sleep 600", **token))
    running(cluster, namespace, "bearer")
    value = cluster.kubectl("exec", "bearer", "--", "cat", "/token/token", namespace=namespace).stdout.strip()

    def review(audience: str) -> dict[str, Any]:
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": value, "audiences": [audience]},
        }
        answer = cluster.kubectl("create", "-f", "-", "-o", "json", input=json.dumps(body))
        status: dict[str, Any] = json.loads(answer.stdout)["status"]
        return status

    status = review("progress")
    assert status["authenticated"] and status["user"]["extra"]["authentication.kubernetes.io/pod-name"] == ["bearer"]
    assert not review("another").get("authenticated", False)


def test_a_pod_that_asks_for_a_gpu_is_scheduled_and_runs(cluster: Cluster, namespace: str) -> None:
    gpu = {"limits": {"nvidia.com/gpu": "1"}}
    create(cluster, namespace, pod("trainer", "echo trained", resources=gpu))
    assert finished(cluster, namespace, "trainer") == "trained\n"


def test_an_admission_policy_refuses_what_it_shall_refuse(cluster: Cluster, namespace: str) -> None:
    policy = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": namespace},
        "spec": {
            "matchConstraints": {
                "resourceRules": [
                    {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["configmaps"]}
                ]
            },
            "validations": [
                {
                    "expression": "object.metadata.name != 'refused' && authorizer.group('').resource('pods')"
                    ".namespace(object.metadata.namespace).check('create').allowed()",
                    "message": "not this one",
                }
            ],
        },
    }
    binding = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": namespace},
        "spec": {
            "policyName": namespace,
            "validationActions": ["Deny"],
            "matchResources": {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}},
        },
    }
    create(cluster, namespace, policy, binding)
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:  # a policy takes effect a moment after it is created
            result = cluster.kubectl("create", "configmap", "refused", namespace=namespace, check=False)
            if result.returncode != 0:
                break
            cluster.kubectl("delete", "configmap", "refused", namespace=namespace)
            time.sleep(0.2)
        assert "not this one" in result.stderr
        cluster.kubectl("create", "configmap", "accepted", namespace=namespace)
    finally:
        for kind in ("validatingadmissionpolicybinding", "validatingadmissionpolicy"):
            cluster.kubectl("delete", kind, namespace)
