"""What this machine gives a training process: its devices, and what decides the last bit of a sum."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib.util import find_spec

from finetune.api.contract import DEVICES
from finetune.api.spec import FineTuneJobSpec

GPU = "nvidia.com/gpu"


STEPS_NEED = ("tokenizers", "datasets", "torch", "transformers")


def absent_packages() -> list[str]:
    """What the steps import and this environment lacks."""
    return [name for name in STEPS_NEED if find_spec(name) is None]


def gpus() -> int:
    """How many GPUs the driver lists."""
    if not shutil.which("nvidia-smi"):
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    return len(listed.stdout.splitlines()) if listed.returncode == 0 else 0


def wanted_gpus(spec: FineTuneJobSpec) -> int:
    """How many GPUs the job asks for."""
    return int((spec.training.resources.limits or {}).get(GPU, "0"))


def devices(spec: FineTuneJobSpec, present: int) -> int:
    """How many training processes to start: as many as the job has GPUs, if they are here and divide the batch."""
    count = max(1, min(wanted_gpus(spec), present))
    while spec.training.batch_size % (spec.training.micro_batch_size * count):
        count -= 1
    return count


def environment(count: int) -> dict[str, str]:
    """Fixed, so that a run that was stopped and goes on equals an undisturbed one on this machine, bit for bit."""
    threads = str(max(1, (os.cpu_count() or 1) // count))
    return {
        DEVICES: str(count),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_CBWR": "COMPATIBLE",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TOKENIZERS_PARALLELISM": "false",
    }
