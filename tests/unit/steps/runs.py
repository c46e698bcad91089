"""Whole training runs of tiny models in this process, and their resumption after any step."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from finetune.api.contract import StepJob
from finetune.steps.dataset.step import run as load_dataset
from finetune.steps.runtime.progress import Progress
from finetune.steps.tokens.step import run as add_tokens
from finetune.steps.train.checkpoints.checkpoint import Checkpoints
from finetune.steps.train.loop import Loop
from finetune.steps.train.plan import Plan
from tests.unit.steps.flow import Workshop

TOKENS = [{"content": "<think>"}, {"content": "</think>"}]
ROWS = [
    {"prompt": f"{number} plus one is", "completion": f"<think>{number} and 1</think> {number + 1}." * (number % 3 + 1)}
    for number in range(12)
]


class NeverStop:
    """Nobody asks to stop. (The real one takes over this process's signals.)"""

    requested = False

    def defer(self) -> None:
        pass


@dataclass
class Run:
    """A workspace up to training, and its job."""

    workshop: Workshop
    job: StepJob

    @classmethod
    def at(
        cls,
        folder: Path,
        training: dict[str, Any],
        *,
        rows: Any = ROWS,
        fraction: float = 0.0,
        tokens: Any = TOKENS,
        model: dict[str, Any] | Path | None = None,
        dataset: dict[str, Any] | None = None,
        **spec: Any,
    ) -> Run:
        """Everything before training, with the steps' own code, on a tiny model or on a copy of one in a folder. Every
        step leaves a checkpoint."""
        folder.mkdir(exist_ok=True)
        workshop = Workshop.at(folder, **(model if isinstance(model, dict) else {}))
        if isinstance(model, Path):
            shutil.rmtree(workshop.layout.model)
            shutil.copytree(model, workshop.layout.model)
        workshop.write("rows.jsonl", rows)
        every = {"maxSteps": 4, "batchSize": 4, "microBatchSize": 2, "checkpoint": {"everySteps": 1, "keep": 100}}
        job = workshop.job(
            dataset={"validation": {"fraction": fraction}} | (dataset or {}),
            training=every | {"learningRate": 1e-3, "seed": 3} | training,
            **({"tokens": {"add": tokens}} if tokens else {}),
            **spec,
        )
        add_tokens(job, workshop.layout)
        load_dataset(job, workshop.layout)
        return cls(workshop, job)

    @property
    def trained(self) -> Path:
        return self.workshop.layout.trained

    @property
    def base(self) -> Path:
        return self.plan.model

    @property
    def plan(self) -> Plan:
        return Plan.of(self.job, self.workshop.layout)

    def go(self, progress: Progress | None = None) -> dict[str, Any]:
        """Train from the newest checkpoint, if there is one, and return the step's result."""
        plan, layout = self.plan, self.workshop.layout
        checkpoints = Checkpoints(layout.checkpoints, self.job.spec.training.checkpoint.keep, plan.inputs)
        result = Loop(plan, layout, checkpoints, checkpoints.newest(), NeverStop(), progress).run()  # type: ignore[arg-type]
        assert result is not None
        return result

    def interrupted_after(self, step: int, folder: Path) -> Run:
        """The same run as it was when it had just left the checkpoint after `step`."""
        shutil.copytree(self.workshop.folder, folder, symlinks=True)
        other = Run(Workshop(folder), self.job)
        shutil.rmtree(other.trained)
        for checkpoint in other.workshop.layout.checkpoints.glob("step-*"):
            if int(checkpoint.name.removeprefix("step-")) > step:
                shutil.rmtree(checkpoint)
        return other

    def checkpoint(self, step: int) -> Path:
        return self.workshop.layout.checkpoints / f"step-{step}"

    def record(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.trained / "training.json").read_text())
        return document

    def weights(self) -> dict[str, torch.Tensor]:
        """What the run published: a model's tensors, or an adapter's."""
        (path,) = self.trained.glob("*.safetensors")
        return dict(load_file(path))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
