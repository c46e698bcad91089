"""What this machine gives a training process: packages and devices."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from importlib.util import find_spec

from finetune.api.spec import FineTuneJobSpec

GPU = "nvidia.com/gpu"


STEPS_NEED = ("tokenizers", "datasets", "torch", "transformers")


def absent_packages(needed: Iterable[str] = STEPS_NEED) -> list[str]:
    """What the steps import and this environment lacks."""
    return [name for name in needed if find_spec(name) is None]


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
