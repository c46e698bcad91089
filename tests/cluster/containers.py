"""A node's containerd: configuration, start, leftovers of former runs, and images."""

import io
import json
import subprocess
import tarfile
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from tests.cluster.console import ClusterError
from tests.cluster.layout import Node
from tests.cluster.processes import Mount, Processes, wait_until

NAMESPACE = "k8s.io"
PAUSE_IMAGE = "localhost/busybox:1"
"""The sandbox image; busybox with its commands, so that tests may use it for small pods."""
CNI = Path("/usr/lib/cni")

HIDDEN = (
    # Places that containerd, its shims, CNI and kubelet have built in: each node sees folders of its own there.
    Path("/run/containerd"),
    Path("/run/netns"),
    Path("/var/lib/cni"),
    Path("/var/lib/kubelet"),
    Path("/var/log/containers"),
)


def start(node: Node, processes: Processes) -> None:
    """Starts the node's containerd, after what a former run left in its store is cleared away."""
    if processes.alive(node.containerd):
        return
    node.run.mkdir(parents=True, exist_ok=True)
    node.store.mkdir(parents=True, exist_ok=True)
    node.folder.mkdir(parents=True, exist_ok=True)
    if (node.store / "io.containerd.metadata.v1.bolt").exists():
        # Without the CRI plugin, which would remember the containers that are removed here.
        _launch(node, processes, cri=False)
        remove_containers(node)
        processes.stop(node.containerd)
    _launch(node, processes, cri=True)
    if PAUSE_IMAGE not in images(node):
        import_image(node, PAUSE_IMAGE, _busybox_layer(), {"Entrypoint": ["/bin/sleep"], "Cmd": ["infinity"]})


def _launch(node: Node, processes: Processes, cri: bool) -> None:
    configuration = node.folder / "containerd.toml"
    disabled = [] if cri else ["io.containerd.grpc.v1.cri"]
    cni = node.folder / "cni"
    cni.mkdir(exist_ok=True)
    network = {
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [
            {
                "type": "ptp",
                "ipMasq": False,  # done once for all, in a table of our own
                "ipam": {
                    "type": "host-local",
                    "dataDir": str(node.run / "addresses"),
                    "ranges": [[{"subnet": node.pod_network}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            }
        ],
    }
    (cni / "10-pods.conflist").write_text(json.dumps(network))
    configuration.write_text(
        f"""version = 2
root = "{node.store}"
state = "{node.run}/containerd"
disabled_plugins = {json.dumps(disabled)}
[grpc]
  address = "{node.socket}"
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true  # machines without CAP_SYS_RESOURCE cannot lower a score
  sandbox_image = "{PAUSE_IMAGE}"
  stream_server_address = "{node.address}"
  max_container_log_line_size = 262144
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{CNI}"
    conf_dir = "{cni}"
"""
    )
    for path in HIDDEN:
        path.mkdir(parents=True, exist_ok=True)
    processes.start(node.containerd, ["containerd", "--config", configuration], mounts=[Mount(path) for path in HIDDEN])
    wait_until(f"{node.containerd} answering", lambda: _answers(node, processes), 20)


def _answers(node: Node, processes: Processes) -> bool:
    processes.require_alive(node.containerd)
    return node.socket.exists() and ctr(node, "version", check=False).returncode == 0


def ctr(node: Node, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs containerd's client against a node."""
    command = ["ctr", "--address", str(node.socket), "--namespace", NAMESPACE, *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if check and result.returncode != 0:
        raise ClusterError(f"ctr {' '.join(arguments)} on {node.name} failed: {result.stderr.strip()}")
    return result


def remove_containers(node: Node) -> None:
    """Removes the records and snapshots of containers of a former run; images stay."""
    containers = ctr(node, "containers", "ls", "-q").stdout.split()
    for start in range(0, len(containers), 100):
        ctr(node, "containers", "rm", *containers[start : start + 100], check=False)


def images(node: Node) -> list[str]:
    """Names of the images in a node's store."""
    return ctr(node, "images", "ls", "-q").stdout.split()


def remove_images(node: Node, names: Sequence[str]) -> None:
    """Removes images, and their layers at once."""
    if names:
        ctr(node, "images", "rm", "--sync", *names)
        if orphans := _orphans(node):
            ctr(node, "images", "rm", "--sync", *orphans)


def _orphans(node: Node) -> list[str]:
    """The kubelet's own references to images that have no name any more: each would keep its layers for ever."""
    digests = {line.split()[0]: line.split()[2] for line in ctr(node, "images", "ls").stdout.splitlines()[1:]}
    named = {digest for name, digest in digests.items() if not name.startswith("sha256:")}
    return [name for name, digest in digests.items() if name.startswith("sha256:") and digest not in named]


def import_image(node: Node, name: str, layer: Path | bytes, config: dict[str, object]) -> None:
    """Puts an image of one layer (an uncompressed tar) into a node's store."""
    digest = sha256(layer).hexdigest() if isinstance(layer, bytes) else _digest(layer)
    description = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        }
    ).encode()
    manifest = json.dumps([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]).encode()
    command = [
        "ctr",
        "--address",
        str(node.socket),
        "--namespace",
        NAMESPACE,
        "images",
        "import",
        "--all-platforms",
        "-",
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stderr is not None
        with tarfile.open(fileobj=process.stdin, mode="w|") as archive:
            for file, data in (("manifest.json", manifest), ("config.json", description)):
                _add(archive, file, data)
            if isinstance(layer, bytes):
                _add(archive, "layer.tar", layer)
            else:
                archive.add(layer, "layer.tar")
        process.stdin.close()
        message = process.stderr.read().decode()
    if process.returncode != 0:
        raise ClusterError(f"Importing {name} failed: {message.strip()}")


def copy_image(source: Node, target: Node, name: str) -> None:
    """Copies an image between nodes' stores."""

    def command(node: Node, *arguments: str) -> list[str]:
        return ["ctr", "--address", str(node.socket), "--namespace", NAMESPACE, "images", *arguments]

    with subprocess.Popen(
        command(source, "export", "-", name), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as export:
        result = subprocess.run(command(target, "import", "-"), stdin=export.stdout, capture_output=True, text=True)
        assert export.stderr is not None
        message = export.stderr.read().decode()
    if export.returncode != 0 or result.returncode != 0:
        raise ClusterError(
            f"Copying {name} from {source.name} to {target.name} failed: {message.strip()} {result.stderr.strip()}"
        )


def _digest(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def _busybox_layer() -> bytes:
    """A file system with busybox, links for its commands, and the files that programs expect."""
    binary = Path("/bin/busybox")
    commands = subprocess.run([binary, "--list"], capture_output=True, text=True, check=True).stdout.split()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for folder, mode in (("bin", 0o755), ("etc", 0o755), ("tmp", 0o1777), ("root", 0o700)):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            archive.addfile(entry)
        entry = tarfile.TarInfo("bin/busybox")
        data = binary.read_bytes()
        entry.size, entry.mode = len(data), 0o755
        archive.addfile(entry, io.BytesIO(data))
        for command in sorted(set(commands) - {"busybox"}):
            entry = tarfile.TarInfo(f"bin/{command}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(entry)
        _add(archive, "etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnonroot:x:65532:65532:nonroot:/tmp:/bin/sh\n")
        _add(archive, "etc/group", b"root:x:0:\nnonroot:x:65532:\n")
    return buffer.getvalue()
