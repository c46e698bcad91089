"""Images: built by BuildKit from the users' own Dockerfiles into the first node's store, and tagged by content."""

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

REQUIREMENTS = {"operator": "operator.txt", "steps": "steps.txt", "train": "train.txt"}
"""The images of this repository, and the requirements of each."""
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
"""What BuildKit may keep: the layers of dependencies (each counts twice: as a blob and unpacked), so that a change of our
source builds in seconds, and the installer's cache."""This machine's own certificates and package index, for the time of the build only."""
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
