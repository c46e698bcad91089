"""The operator on the local cluster, as a user would install it: images, a hub with real models, the Helm chart.

End-to-end tests and the demo share one installation; making it twice does nothing.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import Cluster
from tests.cluster.console import step
from tests.hub import content

ROOT = Path(__file__).parents[1]
SYSTEM = "finetune-system"
RELEASE = "finetune-operator"
HUB = "hub"


@dataclass(frozen=True)
class Installation:
    """What runs on the cluster."""

    cluster: Cluster
    steps_image: str
    train_image: str
    operator_image: str

    def scale(self, replicas: int) -> None:
        """Run so many operators, and wait until it is so."""
        self.cluster.kubectl("scale", f"deployment/{RELEASE}", f"--replicas={replicas}", namespace=SYSTEM)
        if replicas:
            self.cluster.kubectl("rollout", "status", f"deployment/{RELEASE}", "--timeout=90s", namespace=SYSTEM)
        else:
            self.cluster.kubectl(
                "wait",
                "pod",
                "-l",
                f"app.kubernetes.io/name={RELEASE}",
                "--for=delete",
                "--timeout=60s",
                namespace=SYSTEM,
            )

    def logs(self) -> str:
        """The operator's last words, for a failed test."""
        result = self.cluster.kubectl("logs", f"deployment/{RELEASE}", "--tail=60", namespace=SYSTEM, check=False)
        return result.stdout + result.stderr


def install() -> Installation:
    """Build, serve, install; what is there already stays."""
    cluster = Cluster.current()
    images = {}
    for name in ("operator", "steps", "train"):
        with step(f"image {name}"):
            images[name] = cluster.build_image(name)
    installation = Installation(cluster, images["steps"], images["train"], images["operator"])
    with step("a hub that serves the models"):
        _serve_hub(installation)
    with step("helm install"):
        _helm_install(installation)
    return installation


def _helm_install(installation: Installation) -> None:
    values = {
        "image": _image(installation.operator_image),
        "steps": {"image": _image(installation.steps_image)},
        "train": {"image": _image(installation.train_image)},
        "hfEndpoint": f"http://{HUB}.{HUB}.svc",
    }
    file = installation.cluster.state / "values.json"
    file.write_text(json.dumps(values))
    installation.cluster.helm(
        "upgrade",
        "--install",
        RELEASE,
        ROOT / "charts/finetune-operator",
        "--create-namespace",
        "--take-ownership",  # the integration tests apply the definition by themselves
        "--force-conflicts",
        "--values",
        file,
        "--wait",
        "--timeout=120s",
        namespace=SYSTEM,
    )
    installation.scale(1)


def _image(name: str) -> dict[str, str]:
    repository, _, tag = name.rpartition(":")
    return {"repository": repository, "tag": tag}


def hub_folder(cluster: Cluster) -> Path:
    """The folder that the hub pod serves."""
    return cluster.layout.cache / "hub"


def _serve_hub(installation: Installation) -> None:
    cluster = installation.cluster
    content.write(hub_folder(cluster))
    shutil.copy(ROOT / "tests/hub/server.py", hub_folder(cluster) / "server.py")
    labels = {"app": HUB}
    documents = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": HUB}},
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": HUB, "namespace": HUB},
            "spec": {
                "selector": {"matchLabels": labels},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {
                        "terminationGracePeriodSeconds": 1,
                        "containers": [
                            {
                                "name": HUB,
                                "image": installation.steps_image,
                                "command": [
                                    "python",
                                    "/hub/server.py",
                                    "--root",
                                    "/hub",
                                    "--port",
                                    "8000",
                                    "--rules",
                                    "/hub/rules.json",
                                ],
                                "env": [{"name": "PYTHONDONTWRITEBYTECODE", "value": "1"}],
                                "readinessProbe": {"tcpSocket": {"port": 8000}, "periodSeconds": 1},
                                "volumeMounts": [{"name": "hub", "mountPath": "/hub", "readOnly": True}],
                            }
                        ],
                        "volumes": [{"name": "hub", "hostPath": {"path": str(hub_folder(cluster))}}],
                    },
                },
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": HUB, "namespace": HUB},
            "spec": {"selector": labels, "ports": [{"port": 80, "targetPort": 8000}]},
        },
    ]
    cluster.kubectl(
        "apply", "--server-side", "--force-conflicts", "-f", "-", input="\n---\n".join(map(json.dumps, documents))
    )
    cluster.kubectl("rollout", "status", f"deployment/{HUB}", "--timeout=120s", namespace=HUB)
