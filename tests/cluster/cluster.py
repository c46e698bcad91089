"""The cluster as a whole: up, down, status, and what tests use."""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import addons, binaries, cgroups, containers, controlplane, network, nodes, pki, prerequisites
from tests.cluster.api import Api
from tests.cluster.console import ClusterError, say, step
from tests.cluster.layout import REPOSITORY, Layout, Node
from tests.cluster.processes import Processes

PROVISIONER = "provisioner"
RUN_PROVISIONER = "import sys; from tests.cluster.provisioner import main; main(sys.argv[1])"
MOST_NODES = 8


class CommandFailed(AssertionError):
    """A command that had to succeed did not; the message holds what it wrote."""

    def __init__(self, result: subprocess.CompletedProcess[str]) -> None:
        output = "\n".join(text.strip() for text in (result.stdout, result.stderr) if text.strip())
        super().__init__(f"{' '.join(map(str, result.args))}\nexit code {result.returncode}\n{output}")
        self.result = result


@dataclass(frozen=True)
class Cluster:
    """The machine's cluster. `Cluster.current()` for one that runs."""

    layout: Layout

    @classmethod
    def current(cls) -> "Cluster":
        """The running cluster; raises when there is none."""
        cluster = cls(Layout.default())
        if not cluster.running():
            raise ClusterError("No cluster runs on this machine: start one with `python -m tests.cluster up`.")
        return cluster

    @property
    def processes(self) -> Processes:
        return Processes(self.layout)

    @property
    def kubeconfig(self) -> Path:
        return self.layout.kubeconfig

    @property
    def binaries(self) -> Path:
        """One folder with kubectl, helm, kube-apiserver, etcd and the others."""
        return self.layout.bin

    @property
    def state(self) -> Path:
        return self.layout.state

    def environment(self) -> dict[str, str]:
        """This process's environment, with KUBECONFIG and PATH for the cluster."""
        return {
            **os.environ,
            "KUBECONFIG": str(self.kubeconfig),
            "PATH": f"{self.binaries}:{os.environ.get('PATH', '')}",
        }

    def run(
        self,
        *command: str | Path,
        input: str | None = None,
        check: bool = True,
        timeout: float = 300,
        folder: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command against the cluster; raises CommandFailed with its output when it fails and `check` is set."""
        arguments = [str(part) for part in command]
        result = subprocess.run(
            arguments, input=input, capture_output=True, text=True, env=self.environment(), timeout=timeout, cwd=folder
        )
        if check and result.returncode != 0:
            raise CommandFailed(result)
        return result

    def kubectl(
        self,
        *arguments: str | Path,
        namespace: str | None = None,
        input: str | None = None,
        check: bool = True,
        timeout: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        """Runs kubectl as the cluster's administrator."""
        scope = ["--namespace", namespace] if namespace else []
        return self.run("kubectl", *scope, *arguments, input=input, check=check, timeout=timeout)

    def until_served(self, definition: str, seconds: float = 30) -> None:
        """Waits until the API server serves a CustomResourceDefinition. (`kubectl wait` fails at once on one that is so
        new that it has no conditions.)"""
        deadline = time.monotonic() + seconds
        while True:
            waited = self.kubectl(
                "wait", "--for=condition=Established", f"crd/{definition}", "--timeout=5s", check=False
            )
            if waited.returncode == 0:
                return
            if time.monotonic() > deadline:
                raise CommandFailed(waited)
            time.sleep(0.1)

    def helm(
        self, *arguments: str | Path, namespace: str | None = None, check: bool = True, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Runs helm as the cluster's administrator."""
        scope = ["--namespace", namespace] if namespace else []
        return self.run("helm", *scope, *arguments, check=check, timeout=timeout)

    def nodes(self) -> list[Node]:
        """The nodes that run."""
        return nodes.running(self.layout, self.processes)

    def build_image(self, name: str) -> str:
        """Builds an image of ours unless its content is in the first node's store already; returns its full name."""
        from tests.cluster.images import build

        return build(self, name)

    def load_image(self, image: str, number: int) -> None:
        """Copies an image from the first node to another, unless it is there; former versions of it go."""
        target = self.layout.node(number)
        present = containers.images(target)
        if image not in present:
            repository = image.rsplit(":", 1)[0]
            containers.remove_images(target, [name for name in present if name.rsplit(":", 1)[0] == repository])
            containers.copy_image(self.layout.node(1), target, image)

    def running(self) -> bool:
        """Whether all processes of the control plane and of at least one node run, and the API server answers."""
        wanted = {*controlplane.NAMES, PROVISIONER, *self._node_processes(1)}
        return all(self.processes.alive(name) for name in wanted) and Api(self.layout).ready()

    def _node_processes(self, count: int) -> list[str]:
        return [
            name
            for number in range(1, count + 1)
            for node in [self.layout.node(number)]
            for name in (node.containerd, node.kubelet)
        ]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one command at a time changes the cluster of this machine."""
        self.layout.cache.mkdir(parents=True, exist_ok=True)
        with (self.layout.cache / "cluster.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("another command is changing the cluster; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def up(self, count: int = 1) -> None:
        """Starts at least `count` nodes: builds what is missing, mends what broke, or does nothing."""
        if not 1 <= count <= MOST_NODES:
            raise ClusterError(f"{count} nodes were asked for; between 1 and {MOST_NODES} can run.")
        complete = binaries.complete(self.layout)
        prerequisites.check(go=not complete)
        with self.locked():
            if self.running() and all(self.processes.alive(name) for name in self._node_processes(count)):
                say(f"the cluster runs: {self.kubeconfig}")
                return
            binaries.ensure(self.layout)
            with step("starting Kubernetes"):
                if not all(self.processes.alive(name) for name in ("etcd", "kube-apiserver")):
                    self._clean()  # its data is lost: nothing of it may stay
                self._start(count)
        say(f"the cluster runs: {self.kubeconfig}")

    def _start(self, count: int) -> None:
        processes = self.processes
        self.layout.state.mkdir(parents=True, exist_ok=True)
        pki.create(self.layout)
        network.up(self.layout)
        wanted = [self.layout.node(number) for number in range(1, count + 1)]
        network.add_node(wanted[0])
        with ThreadPoolExecutor() as pool:
            stores = [pool.submit(self._start_store, node) for node in wanted]
            controlplane.start_api_server(self.layout, processes)
            for store in stores:
                store.result()
        for node in wanted:
            nodes.start(node, processes)
        controlplane.start_controllers(self.layout, processes)
        api = Api(self.layout)
        addons.apply(api)
        processes.start(PROVISIONER, [sys.executable, "-c", RUN_PROVISIONER, self.layout.cache], folder=REPOSITORY)
        for node in wanted:
            nodes.wait(node, processes, api)
        for name in (*controlplane.NAMES, PROVISIONER):
            processes.require_alive(name)

    def _start_store(self, node: Node) -> None:
        network.add_node(node)
        containers.start(node, self.processes)

    def down(self) -> None:
        """Ends the cluster and removes every trace but binaries, images and logs."""
        prerequisites.check(go=False)
        with self.locked(), step("stopping Kubernetes"):
            self._clean()

    def _clean(self) -> None:
        layout, processes = self.layout, self.processes
        names = processes.names()
        stores = [name for name in names if name.startswith("containerd")]
        processes.stop(*(name for name in names if name not in stores), patience=1)
        processes.kill_containers()
        processes.stop(*stores, patience=5)
        processes.kill_everything()
        network.down(layout)
        for folder in (layout.run, layout.pids, layout.pki, layout.etcd, layout.volumes, layout.state / "nodes"):
            shutil.rmtree(folder, ignore_errors=True)
        layout.kubeconfig.unlink(missing_ok=True)
        for path in containers.HIDDEN:
            try:
                path.rmdir()  # made by us when empty
            except OSError:
                continue
        cgroups.remove()

    def leftovers(self) -> list[str]:
        """What of a stopped cluster is still there; nothing, one hopes."""
        found = [f"process {pid}" for pid in self.processes.living()]
        found += [f"cgroup {path}" for path in cgroups.leftovers()]
        found += [f"network {name}" for name in network.leftovers()]
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        ours = (str(self.layout.state), str(self.layout.run))
        found += [f"mount {line.split()[1]}" for line in mounts if line.split()[1].startswith(ours)]
        return found + [f"folder {self.layout.run}" for _ in [0] if self.layout.run.exists()]

    def stop_node(self, number: int) -> None:
        """Cuts a node's power: its processes and containers end at once, its Node object stays."""
        with self.locked():
            nodes.stop(self.layout.node(number), self.processes)

    def remove_node(self, number: int) -> None:
        """Ends a node and deletes its Node object."""
        self.stop_node(number)
        self.kubectl("delete", "node", self.layout.node(number).name, "--ignore-not-found")

    def status(self) -> Sequence[tuple[str, str]]:
        """Each process with its state."""
        known = [*controlplane.NAMES, PROVISIONER, *self._node_processes(1)]
        names = [*known, *(name for name in self.processes.names() if name not in known)]
        return [(name, f"running, pid {pid}" if (pid := self.processes.pid(name)) else "stopped") for name in names]
