"""What a training run comes to, worked out before torch is imported."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.api.contract import DEVICES, NODES, ExitCode, Layout, StepJob
from finetune.api.spec import DatasetSource, Method, OutputFormat, Schedule, Training
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.train.phase import Phase, PhaseName
from finetune.steps.workspace.base_model import base_model
from finetune.steps.workspace.data_parts import Parts, read_parts
from finetune.steps.workspace.end_tokens import read_end_tokens
from finetune.steps.workspace.staging import digest, inputs_of, published
from finetune.steps.workspace.token_record import read_record

DECISIVE = (
    "objective",
    "method",
    "lora",
    "preference",
    "epochs",
    "max_steps",
    "batch_size",
    "learning_rate",
    "schedule",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "optimizer",
    "seed",
    "ema",
    "early_stopping",
    "embedding_warmup",
)
"""The settings that define the run: a checkpoint made with others belongs to another run."""


@dataclass(frozen=True)
class Plan:
    """Sizes and identity of the run."""

    training: Training
    model: Path
    devices: int
    """Training processes, over all pods."""

    examples: int
    """Rows to train on: where examples are packed, a row holds several."""

    validation_examples: int
    ordered: bool
    """Whether the rows are trained on in their order, instead of one that is drawn anew for every epoch."""

    inputs: dict[str, Any]
    """What the trained model depends on: model, data, training. Not on how many devices share the work."""

    new_rows: tuple[int, ...] = ()
    """The ids of the job's new tokens."""

    merges: bool = True
    """Whether an adapter is to be merged into the model in the end."""

    nodes: int = 1
    """Pods that share the work."""

    ends: tuple[int, ...] = ()
    """Tokens that end what is learned."""

    parts: Parts = field(default_factory=dict)
    """What the data are made of."""

    sources: tuple[DatasetSource, ...] = ()
    """Where rows come from, for what has to be said about one."""

    @classmethod
    def of(cls, job: StepJob, layout: Layout) -> Plan:
        """The plan for the workspace as it is; a StepFailure when an earlier step is missing."""
        training = job.spec.training
        data = published(layout.dataset)
        model = base_model(layout)
        for found, step, folder in ((data, "load-dataset", layout.dataset), (model.is_dir(), "download", model)):
            if not found:
                raise StepFailure(
                    ExitCode.NO_INPUT, "StepMissing", f"{folder} is not there", f"Run `finetune-step {step}` first."
                )
        assert data is not None
        nodes = int(os.environ.get(NODES) or 1)
        devices = nodes * int(os.environ.get(DEVICES) or training.devices)
        if training.batch_size % (training.micro_batch_size * devices):
            raise StepFailure(
                ExitCode.BAD_CONFIGURATION,
                "BatchSizeDoesNotDivide",
                f"spec.training.batchSize: {training.batch_size} is not divisible by microBatchSize "
                f"{training.micro_batch_size} x {devices} devices",
                "Choose a multiple, so that gradient accumulation keeps the batch that you asked for.",
            )
        new_rows = tuple(record.id for record in read_record(model))
        if training.embedding_warmup and not new_rows:
            raise StepFailure(
                ExitCode.BAD_CONFIGURATION,
                "NoNewRows",
                "spec.training.embeddingWarmup: the model had all tokens of spec.tokens already, so no row is new",
                "Remove spec.training.embeddingWarmup.",
            )
        decisive = {*DECISIVE, *(["evaluate_every_steps"] if training.early_stopping else [])}
        return cls(
            training=training,
            model=model,
            devices=devices,
            examples=data.get("packedRows", data["examples"]),
            validation_examples=data["validationExamples"],
            ordered=job.spec.dataset.buckets is not None,
            inputs={
                "model": model_identity(model),
                "data": data["digest"],
                **({"ordered": True} if job.spec.dataset.buckets else {}),
                "training": training.model_dump(mode="json", by_alias=True, include=decisive, exclude_none=True),
            },
            new_rows=new_rows,
            merges=job.spec.output is None or job.spec.output.format == OutputFormat.MERGED,
            nodes=nodes,
            ends=tuple(token.id for token in read_end_tokens(layout.dataset)),
            parts=read_parts(layout.dataset),
            sources=tuple(source for _, source in job.spec.dataset.places()),
        )

    @property
    def devices_here(self) -> int:
        """Training processes of this pod."""
        return self.devices // self.nodes

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step and device."""
        return self.training.batch_size // (self.training.micro_batch_size * self.devices)

    @property
    def adapts(self) -> bool:
        """Whether any phase trains an adapter."""
        return self.training.method != Method.FULL or self.training.embedding_warmup is not None

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What is trained one after the other."""
        training, warmup = self.training, self.training.embedding_warmup
        first, steps = warmup.steps if warmup else 0, self._main_steps
        main = Phase(
            PhaseName.TRAINING,
            first,
            steps,
            training.learning_rate,
            training.weight_decay,
            training.schedule,
            rising=int(training.warmup_ratio * steps + 0.5),
        )
        if not warmup:
            return (main,)
        rate = warmup.learning_rate or training.learning_rate
        # Decay would pull the new rows towards zero, and a falling rate would end before they have arrived.
        return (Phase(PhaseName.EMBEDDING_WARMUP, 0, first, rate, 0.0, Schedule.CONSTANT, rising=0), main)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run, all phases together."""
        return self.phases[-1].last

    @property
    def _main_steps(self) -> int:
        if self.training.max_steps is not None:
            return self.training.max_steps
        batches = math.ceil(math.ceil(self.examples / self.training.micro_batch_size) / self.devices)
        assert self.training.epochs is not None
        return max(1, math.ceil(self.training.epochs * math.ceil(batches / self.accumulation)))


def model_identity(folder: Path) -> str:
    """A digest of what the model was made from, or of its files' names and sizes where no step of ours made it."""
    files = ((path.name, path.stat().st_size) for path in folder.iterdir() if path.is_file())
    return inputs_of(folder) or digest(sorted(files))
