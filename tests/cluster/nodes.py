"""Nodes: kubelets with pretended GPUs, each in a mount namespace, cgroup and pod network of its own on this machine."""

import json
import shutil
from datetime import datetime

from tests.cluster import cgroups, containers, network, pki
from tests.cluster.api import Api, ApiError
from tests.cluster.controlplane import DNS_DOMAIN
from tests.cluster.layout import CGROUP, CONTROL_PLANE_ADDRESS, Layout, Node
from tests.cluster.processes import Processes, wait_until

GPUS = "8"
GPU = "nvidia.com/gpu"
READY_SECONDS = 60


def start(node: Node, processes: Processes) -> None:
    """Starts containerd and kubelet of a node; `wait` tells when it is ready."""
    network.add_node(node)
    containers.start(node, processes)
    if processes.alive(node.kubelet):
        return
    identity = pki.create_for_node(node)
    cgroups.create(node.name)
    resolver = node.folder / "resolv.conf"
    resolver.write_text("".join(f"nameserver {server}\n" for server in network.nameservers()))
    configuration = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": node.address,
        "healthzBindAddress": node.address,
        "tlsCertFile": str(identity.certificate),
        "tlsPrivateKeyFile": str(identity.key),
        "authentication": {
            "anonymous": {"enabled": False},
            "x509": {"clientCAFile": str(node.layout.pki / "ca.crt")},
            "webhook": {"enabled": True},
        },
        "authorization": {"mode": "Webhook"},
        "containerRuntimeEndpoint": f"unix://{node.socket}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{CGROUP}/{node.name}",
        "failCgroupV1": False,
        "failSwapOn": False,
        "podCIDR": node.pod_network,
        "podLogsDir": str(node.folder / "logs"),
        "volumePluginDir": str(node.folder / "volume-plugins"),
        "clusterDNS": [CONTROL_PLANE_ADDRESS],
        "clusterDomain": DNS_DOMAIN,
        "resolvConf": str(resolver),
        "makeIPTablesUtilChains": False,  # or it leaves its chains behind
        "maxPods": 250,
        "imageGCHighThresholdPercent": 100,
        "imageMinimumGCAge": "87600h",
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": "100Mi",
            "imagefs.available": "100Mi",
            "nodefs.inodesFree": "1%",
        },
        "kubeAPIQPS": 1000,
        "kubeAPIBurst": 2000,
        "eventRecordQPS": 0,
        "registryPullQPS": 0,
        "syncFrequency": "10s",
        "nodeStatusUpdateFrequency": "5s",
        "nodeLeaseDurationSeconds": 20,
        "shutdownGracePeriod": "0s",
    }
    path = node.folder / "kubelet.json"
    path.write_text(json.dumps(configuration, indent=1))
    processes.start(
        node.kubelet,
        [
            "kubelet",
            f"--config={path}",
            f"--kubeconfig={node.layout.pki}/{node.name}.kubeconfig",
            f"--hostname-override={node.name}",
            f"--node-ip={node.address}",
            f"--root-dir={node.folder}/kubelet",
            f"--cert-dir={node.folder}/kubelet/pki",
        ],
        join=node.containerd,
    )


def wait(node: Node, processes: Processes, api: Api) -> None:
    """Waits until a node is Ready and offers GPUs: a device plugin's place is taken by a patch of the node's status."""

    started = int((node.layout.pids / node.kubelet).stat().st_mtime)

    def ready() -> bool:
        processes.require_alive(node.kubelet)
        try:
            status = api.request("GET", f"/api/v1/nodes/{node.name}")["status"]
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        if not any(_is_ready(one, started) for one in status["conditions"]):
            return False
        if all(status.get(field, {}).get(GPU) == GPUS for field in ("capacity", "allocatable")):
            return True
        patch = {"status": {"capacity": {GPU: GPUS}, "allocatable": {GPU: GPUS}}}
        api.request("PATCH", f"/api/v1/nodes/{node.name}/status", patch, "application/merge-patch+json")
        return False

    wait_until(f"{node.name} ready", ready, READY_SECONDS)


def _is_ready(condition: dict[str, str], started: int) -> bool:
    """Whether a condition says Ready, by a kubelet that was started at that time (seconds since 1970) or later."""
    heartbeat = datetime.fromisoformat(condition["lastHeartbeatTime"]).timestamp()
    return condition["type"] == "Ready" and condition["status"] == "True" and heartbeat >= started


def stop(node: Node, processes: Processes) -> None:
    """Ends a node as a power cut would: kubelet, containerd and all containers at once. Its Node object stays."""
    processes.stop(node.kubelet, patience=0)
    processes.kill_containers(node)
    processes.stop(node.containerd)
    shutil.rmtree(node.folder, ignore_errors=True)
    shutil.rmtree(node.run, ignore_errors=True)


def running(layout: Layout, processes: Processes) -> list[Node]:
    """Nodes whose kubelet runs."""
    return [node for node in layout.known_nodes() if processes.alive(node.kubelet)]
