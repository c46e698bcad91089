"""Where everything of the cluster lies, and the addresses it uses. No I/O."""

import os
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

POD_NETWORK = "10.244.0.0/16"
SERVICE_NETWORK = "10.96.0.0/16"
SERVICE_ADDRESS = "10.96.0.1"
"""The Service `kubernetes`: the first address of the service network."""
CONTROL_PLANE_ADDRESS = "10.244.0.1"
LINK = "finetune0"
"""The network link that carries the nodes' addresses. Pods are routed (CNI's ptp), so no bridge filtering is needed."""
CGROUP = "finetune-operator"
"""Every process of the cluster lives below this cgroup: so leftovers are found, whatever became of the pid files."""


def cache_folder() -> Path:
    """The user's cache folder of this project."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-operator"


@dataclass(frozen=True)
class Node:
    """One node: a containerd and a kubelet in a mount namespace of their own. Nodes are numbered from 1."""

    number: int
    layout: "Layout"

    @property
    def name(self) -> str:
        return f"node-{self.number}"

    @property
    def address(self) -> str:
        return f"10.244.{self.number - 1}.1"

    @property
    def pod_network(self) -> str:
        return f"10.244.{self.number - 1}.0/24"

    @property
    def store(self) -> Path:
        """containerd's images and snapshots; survives `down`."""
        return self.layout.state / "stores" / self.name

    @property
    def folder(self) -> Path:
        """kubelet's root, configuration and logs; new with each start."""
        return self.layout.state / "nodes" / self.name

    @property
    def run(self) -> Path:
        return self.layout.run / self.name

    @property
    def socket(self) -> Path:
        return self.run / "containerd.sock"

    @property
    def containerd(self) -> str:
        """Name of the node's containerd among the processes."""
        return f"containerd-{self.number}"

    @property
    def kubelet(self) -> str:
        return f"kubelet-{self.number}"


@dataclass(frozen=True)
class Layout:
    """All paths of the cluster."""

    cache: Path
    run: Path = Path("/run/finetune-operator")

    @classmethod
    def default(cls) -> "Layout":
        return cls(cache_folder())

    @property
    def binaries(self) -> Path:
        """One folder per component and version."""
        return self.cache / "binaries"

    @property
    def state(self) -> Path:
        return self.cache / "cluster"

    @property
    def bin(self) -> Path:
        """Links to the binaries of the versions in use: one folder for PATH."""
        return self.state / "bin"

    @property
    def kubeconfig(self) -> Path:
        return self.state / "kubeconfig"

    @property
    def pki(self) -> Path:
        return self.state / "pki"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def pids(self) -> Path:
        return self.state / "pids"

    @property
    def etcd(self) -> Path:
        return self.state / "etcd"

    @property
    def volumes(self) -> Path:
        """Folders of the dynamically provisioned volumes."""
        return self.state / "volumes"

    @property
    def buildkit(self) -> Path:
        return self.state / "buildkit"

    @property
    def buildkit_socket(self) -> Path:
        return self.run / "buildkitd.sock"

    def node(self, number: int) -> Node:
        return Node(number, self)

    def known_nodes(self) -> list[Node]:
        """Nodes that have a folder, hence were started since the last `down`."""
        folder = self.state / "nodes"
        numbers = (
            sorted(int(path.name.removeprefix("node-")) for path in folder.glob("node-*")) if folder.is_dir() else []
        )
        return [self.node(number) for number in numbers]
