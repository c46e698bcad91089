"""The operator as a process of its own against the local cluster: its entry point, its environment, its probes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.cluster import Cluster

CRD = Path(__file__).parents[3] / "manifests" / "crd.yaml"


def install_crd(cluster: Cluster, definition: Path = CRD) -> None:
    """The definition that these operators serve; it stays."""
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", definition)
    cluster.until_served("finetunejobs.finetune.dev")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


class OperatorProcess:
    """One replica; it serves only FineTuneJobs that carry the label of its name, in one namespace."""

    def __init__(
        self, cluster: Cluster, namespace: str, name: str, log: Path, source: Path | None = None, **settings: str
    ) -> None:
        """`source` is the folder with another build's code; `settings` are further variables."""
        self.name, self.namespace, self.log = name, namespace, log
        self.http_port, self.progress_port = free_port(), free_port()
        self._environment = {
            **os.environ,
            "KUBECONFIG": str(cluster.kubeconfig),
            "FINETUNE_STEPS_IMAGE": "finetune-steps:none",
            "FINETUNE_TRAIN_IMAGE": "finetune-train:none",
            "FINETUNE_NAMESPACES": namespace,
            "FINETUNE_OPERATOR_NAMESPACE": namespace,
            "FINETUNE_OPERATOR": name,
            "FINETUNE_HTTP_PORT": str(self.http_port),
            "FINETUNE_PROGRESS_PORT": str(self.progress_port),
            "FINETUNE_LEASE_SECONDS": "3",
            **({"PYTHONPATH": str(source)} if source else {}),
            **settings,
        }
        self.process: subprocess.Popen[bytes] | None = None

    def progress_at(self, host: str) -> None:
        """Serve live progress, reachable at that address."""
        self._environment["FINETUNE_PROGRESS_URL"] = f"https://{host}:{self.progress_port}/"

    def tail(self) -> str:
        return self.log.read_text()[-4000:]

    def start(self, *, ready: bool = True, seconds: float = 30) -> OperatorProcess:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "finetune.controller.main"], env=self._environment, stdout=log, stderr=log
            )
        if ready:
            leads = "finetune_leading 1.0"
            self.wait_until(lambda: self.probe("readyz") == 200 and leads in self.page("metrics"), seconds)
        return self

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the process; its exit status."""
        if self.process is None or self.process.poll() is not None:
            return self.process.returncode if self.process else 0
        self.process.send_signal(number)
        return self.process.wait(timeout=40)

    def wait_until(self, condition, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the operator is not ready:\n{self.tail()}")
            time.sleep(0.1)

    def page(self, path: str) -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/{path}", timeout=5) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            return str(error.read().decode())
        except OSError:
            return ""

    def probe(self, path: str) -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/{path}", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def peak_memory(self) -> int:
        """Bytes of the largest resident set so far."""
        assert self.process is not None
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return 0


@contextlib.contextmanager
def fresh_namespace(cluster: Cluster, prefix: str, *, wait: bool = False) -> Iterator[str]:
    """A namespace for one case; with `wait`, its end is awaited, since thousands of deletions disturb what follows."""
    name = f"{prefix}-{os.getpid()}-{time.time_ns() % 10**9}"
    cluster.kubectl("create", "namespace", name)
    try:
        yield name
    finally:
        cluster.kubectl("delete", "namespace", name, f"--wait={str(wait).lower()}", check=False)
