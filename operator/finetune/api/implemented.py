"""Which values of the API have no behaviour yet.

The API is written whole from the start so that it grows without breaking; a value that nothing acts on yet is refused
with its field's name, never silently ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from finetune.api.spec import (
    FineTuneJobSpec,
    Layout,
    Method,
    Optimizer,
    Parallelism,
    Training,
)

ROWS = "hf://datasets/, pvc:// and s3://"
"""Where rows can be read from."""


class Missing(NamedTuple):
    """A field whose value is not implemented, and what to write instead."""

    field: str
    value: str
    remedy: str

    def sentence(self) -> str:
        return f"spec.{self.field}: {self.value} is not implemented yet; {self.remedy}"


def not_implemented(spec: FineTuneJobSpec) -> tuple[Missing, ...]:
    """Every field of the spec whose value has no behaviour yet; empty for a job that can run."""
    return tuple(_missing(spec))


def _missing(spec: FineTuneJobSpec) -> Iterator[Missing]:
    training = spec.training
    if spec.layout != Layout.STAGED:
        yield Missing("layout", spec.layout, "use Staged")
    yield from _store("model.uri", spec.model.uri, "hf:// and pvc://")
    if spec.tokens and spec.tokens.learn:
        for field, corpus in (("source", spec.tokens.learn.source), ("protect", spec.tokens.learn.protect)):
            if corpus:
                yield from _store(f"tokens.learn.{field}.uri", corpus.uri, ROWS)
    for field, source in spec.dataset.places():
        yield from _store(f"dataset.{field}.uri", source.uri, ROWS)
    if training.parallelism == Parallelism.DEEPSPEED_ZERO:
        yield Missing("training.parallelism", training.parallelism, "use FSDP, which splits the model likewise")
    if training.parallelism == Parallelism.FSDP and (what := _beside_full(training)):
        yield Missing("training.parallelism", f"FSDP with {what}", "use DDP")
    if spec.output:
        yield from _store("output.uri", spec.output.uri, "pvc://")


def _beside_full(training: Training) -> str | None:
    """What makes the training more than all weights learning with plain AdamW."""
    if training.method != Method.FULL:
        return f"method {training.method}"
    if training.optimizer != Optimizer.ADAMW:
        return f"optimizer {training.optimizer}"
    return "embeddingWarmup" if training.embedding_warmup else None


def _store(field: str, uri: str, supported: str) -> Iterator[Missing]:
    scheme = uri.partition("://")[0] + "://"
    if scheme not in supported:
        yield Missing(field, scheme, f"use {supported}")
