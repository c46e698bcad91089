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
    Parallelism,
)


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
                yield from _store(f"tokens.learn.{field}.uri", corpus.uri, "hf://datasets/ and pvc://")
    for field, source in spec.dataset.places():
        yield from _store(f"dataset.{field}.uri", source.uri, "hf://datasets/, pvc:// and s3://")
    if training.parallelism not in (Parallelism.AUTO, Parallelism.DDP):
        yield Missing("training.parallelism", training.parallelism, "use Auto or DDP")
    if training.nodes > 1:
        yield Missing("training.nodes", str(training.nodes), "use 1; several GPUs of one pod work")
    if training.container:
        yield Missing("training.container", "your own trainer image", "remove it")
    if spec.output:
        yield from _store("output.uri", spec.output.uri, "pvc://")


def _store(field: str, uri: str, supported: str) -> Iterator[Missing]:
    scheme = uri.partition("://")[0] + "://"
    if scheme not in supported:
        yield Missing(field, scheme, f"use {supported}")
