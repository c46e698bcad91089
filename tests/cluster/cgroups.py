"""The cgroups of the cluster: what makes every process of ours findable, and where kubelets keep their pods."""

import os
from pathlib import Path

from tests.cluster.layout import CGROUP

ROOT = Path("/sys/fs/cgroup")


def hierarchies() -> list[Path]:
    """The mount points of cgroup hierarchies: one on version 2, one per controller on version 1."""
    if (ROOT / "cgroup.controllers").exists():
        return [ROOT]
    return [
        path
        for path in sorted(ROOT.iterdir())
        if path.is_dir() and not path.is_symlink() and (path / "cgroup.procs").exists()
    ]


def create(name: str) -> list[Path]:
    """Makes <CGROUP>/<name> in every hierarchy, ready to take processes or children; returns the folders."""
    folders = []
    for root in hierarchies():
        folder = root / CGROUP / name
        folder.mkdir(parents=True, exist_ok=True)
        for parent in (root / CGROUP, folder):
            _inherit_cpuset(parent)
        for parent in (root, root / CGROUP):
            _delegate(parent)
        folders.append(folder)
    return folders


def processes() -> dict[int, str]:
    """Ids of all processes below our cgroup, whoever started them, each with the cgroup it is in."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                lines = (entry / "cgroup").read_text().splitlines()
            except OSError:  # it has just ended
                continue
            for line in lines:
                place = line.split(":", 2)[2]
                if place.startswith(f"/{CGROUP}/"):
                    found[int(entry.name)] = place
                    break
    return found


def remove() -> None:
    """Removes our cgroups; they must be empty."""
    for root in hierarchies():
        for folder, _, _ in os.walk(root / CGROUP, topdown=False):
            try:
                Path(folder).rmdir()
            except OSError:  # a process is just leaving it
                continue


def leftovers() -> list[Path]:
    """Our cgroups that still exist."""
    return [root / CGROUP for root in hierarchies() if (root / CGROUP).exists()]


def _inherit_cpuset(folder: Path) -> None:
    """Version 1's cpuset takes no process before its CPUs and memory nodes are set."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        file = folder / name
        if file.exists() and not (folder / "cgroup.controllers").exists() and not file.read_text().strip():
            file.write_text((folder.parent / name).read_text())


def _delegate(folder: Path) -> None:
    """Version 2's children have only the controllers that their parent passes on."""
    controllers = folder / "cgroup.controllers"
    if controllers.exists() and folder.name != "unified":
        for controller in controllers.read_text().split():
            try:
                (folder / "cgroup.subtree_control").write_text(f"+{controller}")
            except OSError:  # a controller that cannot be passed on here
                continue
