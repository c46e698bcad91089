"""What the machine must offer: Linux, root, Go, and some Debian packages (installed when missing)."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

from tests.cluster.console import ClusterError, step

PACKAGES = {
    "containerd": "containerd",
    "runc": "runc",
    "nft": "nftables",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "busybox": "busybox-static",
    "mmdebstrap": "mmdebstrap",
    "/usr/lib/cni/ptp": "containernetworking-plugins",
}
"""What is needed (a command or a file), and the Debian package that brings it."""


def missing_packages() -> list[str]:
    """The Debian packages that are not there yet."""

    def present(thing: str) -> bool:
        return Path(thing).exists() if thing.startswith("/") else shutil.which(thing) is not None

    return sorted({package for thing, package in PACKAGES.items() if not present(thing)})


def check(go: bool) -> None:
    """Raises with a remedy when the machine cannot carry the cluster; installs missing Debian packages.

    Args:
        go: whether binaries remain to be built.
    """
    if platform.system() != "Linux":
        raise ClusterError("The local cluster needs Linux: run it in a Linux virtual machine.")
    if os.geteuid() != 0:
        raise ClusterError("The local cluster needs root (mounts, network, cgroups): run the command with sudo -E.")
    if not any((Path("/sys/fs/cgroup") / name).exists() for name in ("cgroup.controllers", "memory")):
        raise ClusterError("No cgroups under /sys/fs/cgroup: mount them, or run outside a restricted container.")
    if go and shutil.which("go") is None:
        raise ClusterError(
            "Go is missing and binaries remain to be built: install Go 1.26 or newer (https://go.dev/dl), on PATH."
        )
    packages = missing_packages()
    if packages:
        install(packages)


def install(packages: list[str]) -> None:
    """Installs Debian packages without starting their services."""
    if shutil.which("apt-get") is None:
        raise ClusterError(
            f"Install what these Debian packages bring, by your distribution's means: {' '.join(packages)}."
        )
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with step(f"installing {' '.join(packages)}"):
        for arguments in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", *packages]):
            result = subprocess.run(["apt-get", *arguments], env=environment, capture_output=True, text=True)
            if result.returncode != 0:
                raise ClusterError(
                    f"apt-get {' '.join(arguments)} failed; install the packages yourself:\n{result.stderr.strip()}"
                )
