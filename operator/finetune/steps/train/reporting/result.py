"""What a finished run leaves: the model in its own type, and a record of how it came about."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.steps.train.phase import Phase
from finetune.steps.train.plan import Plan
from finetune.steps.workspace.staging import MANIFEST
from finetune.steps.workspace.training_record import write_training_record

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.gguf")
NOT_COPIED = (*WEIGHTS, MANIFEST, "README.md", ".*")
LAST = 10
"""Steps over which the reported loss is averaged."""

MAX_WARNINGS = 16
"""Warnings in `TrainingStatus`."""

RECORDED = 10_000
"""Steps of the loss curve that are kept; longer runs are thinned."""


def write_beside_weights(base: Path, folder: Path) -> None:
    """Every file but the weights as the base has it.

    The architecture did not change, so configuration, tokenizer and chat template are the base's own files, byte for
    byte: nothing that this version of transformers would write differently gets in.
    """
    for path in sorted(base.rglob("*")):
        inner = path.relative_to(base)
        if path.is_file() and not inner.parts[0].startswith(".") and not any(map(path.match, NOT_COPIED)):
            (folder / inner).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / inner)


def summary(state: Any, phase: Phase, run: dict[str, Any], warnings: Sequence[str]) -> dict[str, Any]:
    """The wire form of TrainingStatus, without the checkpoint. `state` is the last phase's. `warnings` come before what
    changed between attempts."""
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    validation = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    result = {"steps": phase.first + state.global_step, "seconds": run["seconds"], "exact": run["exact"]}
    if state.global_step < phase.steps:
        result["stoppedEarly"] = True
    if losses:
        result["loss"] = sum(losses[-LAST:]) / len(losses[-LAST:])
    if told := [*warnings, *(f"not as before: {change}" for change in run["changes"])]:
        result["warnings"] = told[:MAX_WARNINGS]
    return result | ({"validationLoss": validation[-1]} if validation else {})


def write_record(
    folder: Path,
    plan: Plan,
    steps: int,
    log_history: list[dict[str, Any]],
    run: dict[str, Any],
    facts: dict[str, Any],
    **further: Sequence[Any],
) -> None:
    """training.json: hyper-parameters, loss curve, time, throughput, memory, resumptions, environment. `further` holds
    the attempts and the samples."""
    record = {
        "hyperparameters": plan.training.wire(),
        "steps": steps,
        "examples": plan.examples,
        "history": _history(log_history),
        "seconds": run["seconds"],
        "tokens": run["tokens"],
        "tokensPerSecond": round(run["tokens"] / run["seconds"], 1) if run["seconds"] else None,
        "peakMemoryBytes": _peak_memory(),
        "checkpoints": run["checkpoints"],
        "resumptions": run["resumptions"],
        "exact": run["exact"],
        "changes": run["changes"],
        **{name: run[name] for name in ("newRowsMoved",) if name in run},
        "environment": facts,
        **further,
    }
    write_training_record(folder, record)


def _history(log: list[dict[str, Any]]) -> list[dict[str, float]]:
    """One entry for each step that was logged or evaluated, thinned to `RECORDED`."""
    names = {
        "loss": "loss",
        "learning_rate": "learningRate",
        "grad_norm": "gradientNorm",
        "eval_loss": "validationLoss",
        "eval_accuracy": "validationAccuracy",
    }
    entries: dict[int, dict[str, float]] = {}
    for item in log:
        found = {name: item[key] for key, name in names.items() if key in item}
        if found:
            entries.setdefault(item["step"], {"step": item["step"]}).update(found)
    stride = -(-len(entries) // RECORDED) or 1
    steps = sorted(entries)
    return [
        entries[step] for index, step in enumerate(steps) if index % stride == 0 or "validationLoss" in entries[step]
    ]


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
