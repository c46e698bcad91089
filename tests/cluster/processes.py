"""Starting, finding and ending the cluster's processes: each with a pid file, a log, and a place in our cgroup."""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import cgroups
from tests.cluster.console import ClusterError
from tests.cluster.layout import CGROUP, Layout, Node

Condition = Callable[[], bool]

MOUNT_SETUP = 'set -e; umask 022; {mounts} exec "$@"'


@dataclass(frozen=True)
class Mount:
    """A mount in a process's own mount namespace: a folder bound to a target, or (source None) an empty tmpfs on it."""

    target: Path
    source: Path | None = None

    def command(self) -> str:
        if self.source is None:
            return f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(self.target))}; "
        return f"mount --bind {shlex.quote(str(self.source))} {shlex.quote(str(self.target))}; "


class Processes:
    """The managed processes of the cluster, by name."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def start(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        mounts: Sequence[Mount] | None = None,
        join: str | None = None,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        """Starts a process unless it runs.

        Args:
            mounts: gives it a mount namespace of its own with these mounts; all of them vanish with its last process.
            join: name of a running process whose mount namespace it enters.
        """
        if self.alive(name):
            return
        self.layout.pids.mkdir(parents=True, exist_ok=True)
        self.layout.logs.mkdir(parents=True, exist_ok=True)
        arguments = [str(part) for part in command]
        if mounts is not None:
            script = MOUNT_SETUP.format(mounts="".join(mount.command() for mount in mounts))
            arguments = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", script, name, *arguments]
        elif join is not None:
            arguments = ["nsenter", f"--mount=/proc/{self.pid(join)}/ns/mnt", "--", *arguments]
        groups = [str(group / "cgroup.procs") for group in cgroups.create("system")]
        enter = " ".join(f"echo $$ > {shlex.quote(group)};" for group in groups)
        with (self.layout.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                ["sh", "-c", f'{enter} exec "$@"', name, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder or self.layout.state,
                env={
                    **os.environ,
                    "PATH": f"{self.layout.bin}:/usr/local/sbin:/usr/sbin:/sbin:{os.environ['PATH']}",
                    **(environment or {}),
                },
                start_new_session=True,
            )
        pid_file = self.layout.pids / name
        pid_file.write_text(f"{process.pid} {_start_time(process.pid)}\n")

    def pid(self, name: str) -> int | None:
        """The id of a running process; None when it has ended, also when its number is now another's."""
        try:
            pid, started = (self.layout.pids / name).read_text().split()
        except (OSError, ValueError):
            return None
        return int(pid) if started == _start_time(int(pid)) else None

    def alive(self, name: str) -> bool:
        return self.pid(name) is not None

    def names(self) -> list[str]:
        """All processes that were started since the last `down`, running or not."""
        return sorted(path.name for path in self.layout.pids.iterdir()) if self.layout.pids.is_dir() else []

    def stop(self, *names: str, patience: float = 10) -> None:
        """Ends processes together: SIGTERM, and SIGKILL for what still runs after `patience` seconds."""
        pids = [pid for name in names if (pid := self.pid(name)) is not None]
        _signal(pids, signal.SIGTERM)
        if not _wait(lambda: not any(self.alive(name) for name in names), patience):
            _signal([pid for name in names if (pid := self.pid(name)) is not None], signal.SIGKILL)
            _wait(lambda: not any(self.alive(name) for name in names), patience)
        for name in names:
            (self.layout.pids / name).unlink(missing_ok=True)

    def require_alive(self, name: str) -> None:
        """Raises with the end of its log when a process has ended."""
        if not self.alive(name):
            log = self.layout.logs / f"{name}.log"
            raise ClusterError(f"{name} has ended; the end of {log}:\n{tail(log)}")

    def kill_containers(self, node: Node | None = None) -> None:
        """Ends pods' processes and their shims, of one node or all, and leaves containerd running."""
        sockets = [one.socket for one in ([node] if node else self.layout.known_nodes())]
        kept = {self.pid(name) for name in self.names()}
        prefix = f"/{CGROUP}/{node.name if node else ''}"
        _signal(
            [
                pid
                for pid, place in cgroups.processes().items()
                if pid not in kept
                and (place.startswith(f"{prefix}/") or any(_is_shim(pid, socket) for socket in sockets))
            ],
            signal.SIGKILL,
        )

    def living(self) -> list[int]:
        """Ids of all processes of the cluster, those left out that only wait to be reaped by their parent."""
        return [pid for pid in cgroups.processes() if _start_time(pid) is not None]

    def kill_everything(self) -> None:
        """Ends whatever lives in our cgroup, shims and containers included; raises if something survives."""

        def gone() -> bool:
            remaining = self.living()
            _signal(remaining, signal.SIGKILL)
            return not remaining

        if not _wait(gone, 30):
            raise ClusterError(
                f"Processes {self.living()} do not end, even after SIGKILL; see their state in /proc/<pid>/stack."
            )


def tail(path: Path, lines: int = 12) -> str:
    """The last lines of a file."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else "(no log)"


def wait_until(name: str, condition: Condition, seconds: float, interval: float = 0.1) -> None:
    """Waits for a condition; raises when it does not come true in time."""
    if not _wait(condition, seconds, interval):
        raise ClusterError(f"{name} did not happen within {seconds:.0f} s; see the logs folder of `status`.")


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _is_shim(pid: int, socket: Path) -> bool:
    """Whether a process is a shim that a containerd with this socket started."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return arguments[0].rsplit("/", 1)[-1].startswith("containerd-shim") and str(socket) in arguments


def _start_time(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None for one that has ended or only waits to be reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _wait(condition: Condition, seconds: float, interval: float = 0.05) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(interval)
    return True
