"""How much memory a step may use: what the container's limit and the machine leave."""

from __future__ import annotations

import re
from pathlib import Path

from finetune.api.contract import ExitCode
from finetune.steps.runtime.disk import in_words
from finetune.steps.runtime.failure import StepFailure

LIMITS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
"""Files of cgroup version 2 and 1, below the root that a container sees."""


def available_memory(cgroup: Path = Path("/sys/fs/cgroup"), meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that can still be allocated without being killed, roughly: page cache counts as free."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
    free = [int(match.group(1)) * 1024] if match else []
    for limit_file, usage_file in LIMITS:
        try:
            limit, usage = (cgroup / limit_file).read_text().strip(), (cgroup / usage_file).read_text().strip()
        except OSError:
            continue
        if limit.isdigit() and int(limit) < 1 << 60:
            free.append(max(int(limit) - int(usage) + _file_cache(cgroup / limit_file), 0))
    return min(free, default=1 << 62)


def require_memory(needed: int, what: str) -> None:
    """Raise StepFailure unless `needed` more bytes can be allocated by a step that prepares."""
    free = available_memory()
    if needed > free:
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "OutOfMemory",
            f"{what} takes {in_words(needed)} of memory, {in_words(free)} are free",
            "Raise spec.prepare.resources.limits.memory, delete and apply the job anew.",
        )


def _file_cache(limit_file: Path) -> int:
    try:
        lines = (limit_file.parent / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    counts = dict(line.split() for line in lines)
    return int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0))
