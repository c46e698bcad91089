"""What has to be equal for a resumed run to repeat the undisturbed one bit for bit, besides the code.

Sums of floats depend on how many threads share them and on which vector instructions they use. Both are pinned in the
training process's environment and recorded in each checkpoint; a resumed run takes them from there, so that a pod that
lands on another machine goes on as before, if that machine can.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

PINNED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR")
"""The variables that are pinned. What the pod's environment says takes precedence."""

ISA = {"avx512": "AVX512_CORE", "avx2": "AVX2"}
"""oneDNN's names for torch's CPU capabilities."""


def pinned(environment: Mapping[str, str], recorded: Mapping[str, str], devices: int) -> dict[str, str]:
    """The pinned variables of a training process: as set, else as recorded in the checkpoint, else for this machine."""
    threads = str(max(1, processors() // devices))
    capability = _capability()
    here = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "MKL_CBWR": "AUTO,STRICT"}
    if capability:
        here |= {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": ISA[capability]}
    values = {name: environment.get(name, recorded.get(name, here.get(name))) for name in PINNED}
    return {name: value for name, value in values.items() if value is not None}


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


def _capability() -> str | None:
    """The best capability of torch's CPU kernels that this machine has; None where there is no choice."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    except OSError:
        return None
    if {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= flags:
        return "avx512"
    return "avx2" if {"avx2", "fma"} <= flags else None
