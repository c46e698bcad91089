"""The environment that a training process runs in, as far as its numbers depend on it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

import accelerate
import torch
import transformers

from finetune.api.spec import Method, Optimizer
from finetune.steps.train.checkpoints.environment import PINNED
from finetune.steps.train.plan import Plan


def facts(plan: Plan) -> dict[str, Any]:
    """What a checkpoint records, and what must be equal for a resumed run to be bit-exact."""
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        **{name: version(name) for name in _further(plan)},
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cuda": torch.version.cuda if cuda else None,
        "worldSize": plan.devices,
        "nodes": plan.nodes,
        "parallelism": plan.training.parallelism.value,
        "microBatchSize": plan.training.micro_batch_size,
        "gradientCheckpointing": plan.training.gradient_checkpointing.value,
        "threads": torch.get_num_threads(),
        "cpuCapability": torch.backends.cpu.get_cpu_capability(),
        "pinned": {name: os.environ[name] for name in PINNED if name in os.environ},
    }


def _further(plan: Plan) -> list[str]:
    """Libraries that take part in this run only."""
    names = ["peft"] if plan.adapts else []
    if plan.training.method == Method.QLORA or plan.training.optimizer == Optimizer.ADAMW_8BIT:
        names.append("bitsandbytes")
    return names


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What is not as it was, for people; empty when a resumed run repeats the undisturbed one bit for bit."""
    return [f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]]
