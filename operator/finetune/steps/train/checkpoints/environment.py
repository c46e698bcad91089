"""What has to be equal for a resumed run to repeat the undisturbed one bit for bit, besides the code.

Sums of floats depend on how many threads share them and on which vector instructions they use. Both are pinned in the
training process's environment and recorded in each checkpoint: the instructions to AVX2, which every server of the last
decade has, so that a pod that lands on another machine goes on as before; the threads to what the first attempt had.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

INSTRUCTIONS = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2,STRICT"}
"""One name for AVX2 in each of the libraries that torch computes with on a CPU."""

PINNED = ("OMP_NUM_THREADS", *INSTRUCTIONS)
"""The variables that are pinned. What the pod's environment says takes precedence. MKL uses as many threads as OpenMP,
unless somebody says otherwise: two libraries that disagree wait for each other's threads."""


def pinned(environment: Mapping[str, str], recorded: Mapping[str, str], devices: int) -> dict[str, str]:
    """The pinned variables of a training process: as set, else as recorded in the checkpoint, else for this machine."""
    threads = str(max(1, processors() // devices))
    here = {"OMP_NUM_THREADS": threads, **(INSTRUCTIONS if _has_avx2() else {})}
    values = {name: environment.get(name, recorded.get(name, here.get(name))) for name in PINNED}
    return {name: value for name, value in values.items() if value is not None and _possible(name)}


def processors() -> int:
    """How many processors this container may use: its CPU limit, not the node's size."""
    available = len(os.sched_getaffinity(0))
    quota = _quota()
    return min(available, max(1, math.ceil(quota))) if quota else available


def _quota() -> float | None:
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit, period = (
                Path("/sys/fs/cgroup/cpu", name).read_text().strip()
                for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            )
        except OSError:
            return None
    return int(limit) / int(period) if limit not in ("max", "-1") else None


def _possible(name: str) -> bool:
    """Whether this machine can do what a checkpoint of another one may have recorded."""
    return name not in INSTRUCTIONS or _has_avx2()


def _has_avx2() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return False
    return {"avx2", "fma"} <= set(flags)
