"""A process, measured from outside: wall time from its start to its end, and the peak of its memory."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BETWEEN_LOOKS = 0.004
"""Seconds. The kernel keeps the peak of resident memory, of anonymous memory only what is there."""


@dataclass(frozen=True)
class Measured:
    """Seconds, and bytes at the peak: resident, and anonymous ones, which cannot be dropped as pages of files can."""

    seconds: float
    resident: int
    anonymous: int
    processors: float = 0.0
    """Seconds on processors, where the process told them."""


def measure(command: Sequence[str], environment: Mapping[str, str], warm: Path) -> Measured:
    """Run a process to its end. The files in `warm` are in the page cache before, and nothing waits to be written."""
    for path in warm.iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    resident = anonymous = 0
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            break
        values = dict(line.split(":", 1) for line in lines if ":" in line)
        resident = max(resident, _bytes(values.get("VmHWM", "0")))
        anonymous = max(anonymous, _bytes(values.get("RssAnon", "0")))
        time.sleep(BETWEEN_LOOKS)
    _, errors = process.communicate()
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(errors.decode())
    return Measured(seconds, resident, anonymous)


def best(runs: Sequence[Measured]) -> Measured:
    """The shortest time of several runs, and the largest memory."""
    return Measured(
        min(run.seconds for run in runs),
        max(run.resident for run in runs),
        max(run.anonymous for run in runs),
        min(run.processors for run in runs),
    )


def _bytes(kibibytes: str) -> int:
    return int(kibibytes.split()[0]) * 1024
