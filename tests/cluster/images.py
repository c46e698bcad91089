"""Images: built by BuildKit from the users' own Dockerfile into the first node's store, and tagged by content."""

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from tests.cluster import containers
from tests.cluster.console import ClusterError, step
from tests.cluster.layout import CGROUP, REPOSITORY, Layout, Node
from tests.cluster.processes import Processes, wait_until

if TYPE_CHECKING:
    from tests.cluster.cluster import Cluster

REQUIREMENTS = {
    "operator": ("operator.txt",),
    "steps": ("steps.txt",),
    "train": ("train.txt",),
    "ray": ("train.txt", "ray.txt"),
}
"""The images of this repository, which are targets of images/Dockerfile, and the requirements of each."""
BUILDKITD = "buildkitd"
SUITE = "bookworm"
BASE_PACKAGES = ("python3", "python3-venv", "ca-certificates")
SOURCES = Path("/etc/apt/sources.list.d/debian.sources")
KEPT = 2
KEPT_SECONDS = 3600
"""Of each image the newest are kept, and those used within this time: other checkouts use the same store."""
LITTLE_DISK = 20 * 10**9
"""With fewer bytes free only the newest of each image stays."""
CACHE_BYTES = 20 * 10**9
"""What BuildKit may keep: the layers of dependencies, each of which counts as a blob and unpacked, so that a change of
our source builds in seconds; and the installer's cache."""


def tag(name: str, repository: Path = REPOSITORY) -> str:
    """The full name of an image for what its files hold now."""
    if name not in REQUIREMENTS:
        raise ClusterError(f"There is no image {name}; choose one of {', '.join(REQUIREMENTS)}.")
    digest = sha256(BASE.encode())
    for path in _inputs(name, repository):
        digest.update(f"\0{path.relative_to(repository)}\0".encode() + path.read_bytes())
    return f"localhost/finetune-{name}:{digest.hexdigest()[:16]}"


def _inputs(name: str, repository: Path) -> list[Path]:
    requirements = [repository / "requirements" / file for file in ("build.txt", *REQUIREMENTS[name])]
    fixed = [
        repository / "images" / "Dockerfile",
        repository / "images" / "install",
        repository / "pyproject.toml",
    ]
    source = [
        path for path in (repository / "operator").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    return [*fixed, *requirements, *sorted(source)]


def _context(layout: Layout, name: str) -> Path:
    """Copies what an image is built from; returns the folder."""
    folder = layout.state / "context"
    shutil.rmtree(folder, ignore_errors=True)
    for path in [
        *_inputs(name, REPOSITORY),
        *(REPOSITORY / file for file in (".dockerignore", "LICENSE", "README.md")),
    ]:
        target = folder / path.relative_to(REPOSITORY)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    return folder


def _base_command(output: Path) -> list[str]:
    """mmdebstrap's command for a Debian with Python; documentation and translations are left out."""
    left_out = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("man", "doc", "locale", "info")]
    include = f"--include={','.join(BASE_PACKAGES)}"
    licences = "--dpkgopt=path-include=/usr/share/doc/*/copyright"
    merged = "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr"  # without the package usrmerge, and so without Perl
    return ["mmdebstrap", "--quiet", "--variant=minbase", merged, include, *left_out, licences, SUITE, str(output)]


BASE = f"localhost/python-base:{sha256(' '.join(_base_command(Path('base'))).encode()).hexdigest()[:16]}"
"""Stands in for python:*-slim-bookworm, which only Docker Hub has; its Python is Debian's."""


def build(cluster: "Cluster", name: str) -> str:
    """Builds an image unless its content is in the store already; returns its full name."""
    image = tag(name)
    layout, node = cluster.layout, cluster.layout.node(1)
    if image not in containers.images(node):
        with _locked(layout):
            if image not in containers.images(node):
                # A copy, because the files may change while they are built.
                context = _context(layout, name)
                image = tag(name, context)
                _base(layout, node)
                _build(layout, cluster.processes, name, image, context)
                _remember(layout, image)
                _prune(layout, node, name)
    _remember(layout, image)
    return image


@contextmanager
def _locked(layout: Layout) -> Iterator[None]:
    with (layout.cache / "images.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _base(layout: Layout, node: Node) -> None:
    if BASE in containers.images(node):
        return
    with step("making the base image"), tempfile.TemporaryDirectory(dir=layout.state) as folder:
        archive = Path(folder) / "base.tar"
        command = [*_base_command(archive), *([str(SOURCES)] if SOURCES.exists() else [])]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise ClusterError(f"mmdebstrap failed:\n{result.stderr.strip()[-2000:]}")
        containers.import_image(
            node, BASE, archive, {"Env": ["PATH=/usr/local/bin:/usr/bin:/bin", "LANG=C.UTF-8"], "Cmd": ["python3"]}
        )


def _build(layout: Layout, processes: Processes, name: str, image: str, context: Path) -> None:
    node = layout.node(1)
    with step(f"building {image}"), tempfile.TemporaryDirectory(dir=layout.state) as folder:
        _start_buildkit(layout, processes, node)
        try:
            result = _buildctl(
                layout,
                "build",
                "--progress=plain",
                "--frontend=dockerfile.v0",
                f"--local=context={context}",
                f"--local=dockerfile={context / 'images'}",
                f"--opt=target={name}",
                f"--opt=build-arg:BASE={BASE}",
                "--opt=image-resolve-mode=local",
                *_secrets(Path(folder)),
                f"--output=type=image,name={image},unpack=true,compression=uncompressed",
            )
            pruned = _buildctl(layout, "prune", "--all", f"--keep-storage={CACHE_BYTES // 10**6}")
            if result.returncode == 0 and pruned.returncode != 0:
                raise ClusterError(f"BuildKit's cache could not be pruned: {pruned.stderr.strip()}")
        finally:
            processes.stop(BUILDKITD)
        (layout.logs / f"build-{name}.log").write_text(result.stderr)
        if result.returncode != 0:
            raise ClusterError(
                f"Building {image} failed; {layout.logs}/build-{name}.log ends:\n{result.stderr.strip()[-3000:]}"
            )


def _start_buildkit(layout: Layout, processes: Processes, node: Node) -> None:
    """BuildKit works in the node's own mount namespace and store: what it builds needs no export and no import."""
    configuration = layout.state / "buildkitd.toml"
    configuration.write_text(
        f"""root = "{layout.buildkit}"
[grpc]
  address = ["unix://{layout.buildkit_socket}"]
[worker.oci]
  enabled = false
[worker.containerd]
  enabled = true
  address = "{node.socket}"
  namespace = "{containers.NAMESPACE}"
  networkMode = "host"
  defaultCgroupParent = "/{CGROUP}/build"
  gc = false
"""
    )
    processes.stop(BUILDKITD)
    processes.start(BUILDKITD, [layout.bin / "buildkitd", f"--config={configuration}"], join=node.containerd)

    def answers() -> bool:
        processes.require_alive(BUILDKITD)
        return _buildctl(layout, "debug", "workers").returncode == 0

    wait_until("buildkitd answering", answers, 30)


def _buildctl(layout: Layout, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(layout.bin / "buildctl"), f"--addr=unix://{layout.buildkit_socket}", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def _secrets(folder: Path) -> list[str]:
    """This machine's own certificates and package index, for the time of the build only."""
    secrets = []
    for variable in ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        if (path := os.environ.get(variable)) and Path(path).is_file():
            secrets.append(f"--secret=id=ca,src={path}")
            break
    for variable in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL"):
        if address := os.environ.get(variable):
            file = folder / "index"
            file.touch(mode=0o600)
            file.write_text(address)
            secrets.append(f"--secret=id=index,src={file}")
            break
    return secrets


def _remember(layout: Layout, image: str) -> None:
    """Notes that an image was used now."""
    folder = layout.state / "built"
    folder.mkdir(exist_ok=True)
    (folder / image.removeprefix("localhost/")).touch()


def _prune(layout: Layout, node: Node, name: str) -> None:
    """Removes former versions of an image."""
    used = sorted(
        (layout.state / "built").glob(f"finetune-{name}:*"), key=lambda path: path.stat().st_mtime, reverse=True
    )
    if shutil.disk_usage(layout.cache).free < LITTLE_DISK:
        old = used[1:]
    else:
        old = [path for path in used[KEPT:] if time.time() - path.stat().st_mtime > KEPT_SECONDS]
    present = set(containers.images(node))
    containers.remove_images(node, [f"localhost/{path.name}" for path in old if f"localhost/{path.name}" in present])
    for path in old:
        path.unlink()
