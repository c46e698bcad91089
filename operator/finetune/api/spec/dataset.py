"""The dataset: where rows come from and how a row becomes an example."""

from __future__ import annotations

from collections.abc import Iterator
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


class Format(StrEnum):
    """What the columns of a row mean."""

    TEXT = "Text"
    PROMPT_COMPLETION = "PromptCompletion"
    SOURCE_TARGET = "SourceTarget"
    MESSAGES = "Messages"
    INSTRUCTION = "Instruction"
    PREFERENCE = "Preference"


class FileFormat(StrEnum):
    """How rows are written in a file."""

    JSONL = "JSONL"
    JSON = "JSON"
    CSV = "CSV"
    TSV = "TSV"
    PARQUET = "Parquet"
    PLAIN_TEXT = "PlainText"


class DatasetSource(Model):
    """Rows from one place."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("!(has(self.template) && has(self.format))", "a source takes either a template or a format"),
            ("self.maxRepeats == 1 || has(self.weight)", "maxRepeats limits what a weight asks for: give a weight too"),
            (
                "!has(self.fileFormat) || !self.uri.startsWith('hf://')",
                "fileFormat goes with pvc:// and s3://; a dataset on the hub says itself how it is written",
            ),
        )
    )

    uri: DatasetUri = Field(
        description="hf://datasets/ORGANISATION/NAME, pvc://CLAIM/PATH (a file or folder), s3://BUCKET/PATH, gs:// or "
        "az://. JSONL, JSON, CSV, Parquet, or plain text, in which every paragraph is a row.",
        json_schema_extra=rules(NO_PARENT),
    )
    file_format: FileFormat | None = Field(
        None, description="How the files are written; absent: told by the end of their names."
    )
    format: Format | None = Field(
        None,
        description="What a row is: Text (text), PromptCompletion (prompt, completion), SourceTarget (source, target), "
        "Messages (messages or conversations) or Instruction (instruction, input, output); absent: the columns tell.",
    )
    revision: Revision = Field("main", description="Branch, tag or commit of an hf:// dataset.")
    subset: str | None = Field(
        None, description="The configuration of an hf:// dataset that has several.", min_length=1, max_length=128
    )
    split: Split = Field(
        "train", description="Which rows, in the slicing syntax of datasets: train, train[:10000], train[10%:20%]."
    )
    weight: float | None = Field(
        None,
        description="Share of this source's examples in the mixture, relative to the others; either every source has a "
        "weight or none. Without weights every row is used once.",
        gt=0,
        le=1e6,
    )
    max_repeats: int = Field(
        1,
        description="How often a row may be used in one epoch, at most, to reach the weight. The mixture is as large "
        "as these limits allow.",
        ge=1,
        le=1000,
    )
    template: Template | None = Field(
        None, description="How a row becomes a conversation or text; absent: the row's own format is recognised."
    )


class Duplicates(StrEnum):
    """What becomes of rows that occur in training and in validation."""

    HELD_OUT_TOGETHER = "HeldOutTogether"
    KEPT = "Kept"


class Validation(Model):
    """Which rows are held out."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.source) || self.fraction == 0.0",
                "validation takes either a fraction of the sources or a source of its own",
            ),
            (
                "!has(self.source) || !has(self.source.weight)",
                "validation.source takes no weight: all of its rows are used",
            ),
        )
    )

    fraction: float = Field(
        0.0, description="Share of every source's rows held out for validation; 0 holds out none.", ge=0, le=0.5
    )
    source: DatasetSource | None = Field(None, description="Rows to validate on that are not among the sources.")
    duplicates: Duplicates = Field(
        Duplicates.HELD_OUT_TOGETHER,
        description="What becomes of rows that occur in training and in validation. HeldOutTogether: equal rows are "
        "either all trained on or all held out, and what occurs in validation.source is not trained on. Kept: they "
        "stay where they are, and the validation loss measures memory too.",
    )


class Mask(StrEnum):
    """Which tokens carry the loss."""

    ASSISTANT = "Assistant"
    COLOSSAL = "Colossal"


class Dataset(Model):
    """What the model learns from."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "self.sources.all(s, has(s.weight)) || !self.sources.exists(s, has(s.weight))",
                "either every source has a weight or none",
            ),
        )
    )

    sources: list[DatasetSource] = Field(description="Where rows come from.", min_length=1, max_length=32)
    validation: Validation = Field(
        default_factory=Validation,
        description="Rows held out to measure the loss on.",
        json_schema_extra={"default": {}},
    )
    max_length: int = Field(
        1024, description="Longest example in tokens; longer conversations lose whole turns.", ge=8, le=1_048_576
    )
    buckets: int | None = Field(
        None,
        description="Cut every source (each category of it, where rows have a category) into so many bins, and train "
        "on so many buckets one after the other, each of one bin of every source; absent: shuffled anew every epoch.",
        ge=1,
        le=10_000,
    )
    packing: Switch = Field(
        Switch.DISABLED,
        description="Put several short examples into one row of up to maxLength tokens, isolated from one another; "
        "batchSize then counts such rows.",
    )
    mask: Mask = Field(
        Mask.ASSISTANT,
        description="Which tokens carry the loss. Assistant: the assistant's turns with their end markers, or what "
        "follows a prompt; everything under Pretraining. Colossal: by ColossalAI's own rule and in its own layout of "
        "conversations, whatever the objective.",
    )

    @property
    def validates(self) -> bool:
        """Whether rows are held out."""
        return self.validation.fraction > 0 or self.validation.source is not None

    def places(self) -> Iterator[tuple[str, DatasetSource]]:
        """Every source that rows are read from, with its field below `dataset`; the one to validate on is last."""
        for index, source in enumerate(self.sources):
            yield f"sources[{index}]", source
        if self.validation.source:
            yield "validation.source", self.validation.source

    @property
    def uris(self) -> list[str]:
        """Where rows are read from."""
        return [source.uri for _, source in self.places()]
