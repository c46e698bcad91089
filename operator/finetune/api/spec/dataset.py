"""The dataset: where rows come from and how a row becomes an example."""

from __future__ import annotations

from enum import StrEnum

from pydantic import ConfigDict, Field

from finetune.api.schema import NO_PARENT, DatasetUri, Model, Revision, Split, Switch, rules


class Template(Model):
    """Jinja templates over a row's columns, rendered in a sandbox inside the pod."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "has(self.text) != (has(self.user) && has(self.assistant))",
                "a template has either text, or user and assistant (and optionally system)",
            ),
            ("!(has(self.text) && has(self.system))", "template.system goes with user and assistant, not with text"),
        )
    )

    system: str | None = Field(None, description="The system message.", min_length=1, max_length=16_384)
    user: str | None = Field(None, description="The user's message.", min_length=1, max_length=16_384)
    assistant: str | None = Field(
        None, description="The assistant's answer, which carries the loss.", min_length=1, max_length=16_384
    )
    text: str | None = Field(
        None, description="One plain text; all of it carries the loss.", min_length=1, max_length=16_384
    )


class DatasetSource(Model):
    """Rows from one place."""

    uri: DatasetUri = Field(
        description="hf://datasets/ORGANISATION/NAME, pvc://CLAIM/PATH (a file or folder), s3://, gs:// or az://. "
        "JSONL, JSON, CSV or Parquet.",
        json_schema_extra=rules(NO_PARENT),
    )
    revision: Revision = Field("main", description="Branch, tag or commit of an hf:// dataset.")
    subset: str | None = Field(
        None, description="The configuration of an hf:// dataset that has several.", min_length=1, max_length=128
    )
    split: Split = Field(
        "train", description="Which rows, in the slicing syntax of datasets: train, train[:10000], train[10%:20%]."
    )
    weight: float = Field(1.0, description="Share of this source in the mixture, relative to the others.", gt=0, le=1e6)
    template: Template | None = Field(
        None, description="How a row becomes a conversation or text; absent: the row's own format is recognised."
    )


class Validation(Model):
    """Which rows are held out."""

    fraction: float = Field(
        0.0, description="Share of the rows held out for validation; 0 holds out none.", ge=0, le=0.5
    )


class Mask(StrEnum):
    ASSISTANT = "Assistant"
    COLOSSAL = "Colossal"


class Dataset(Model):
    """What the model learns from."""

    sources: list[DatasetSource] = Field(description="Where rows come from.", min_length=1, max_length=32)
    validation: Validation = Field(
        default_factory=Validation,
        description="Rows held out to measure the loss on.",
        json_schema_extra={"default": {}},
    )
    max_length: int = Field(
        1024, description="Longest example in tokens; longer conversations lose whole turns.", ge=8, le=1_048_576
    )
    packing: Switch = Field(
        Switch.DISABLED, description="Put several short examples into one row, isolated from one another."
    )
    mask: Mask = Field(
        Mask.ASSISTANT, description="Which tokens carry the loss: the assistant's turns, or ColossalAI's own rule."
    )
