"""The texts of a corpus, streamed: rows come from where datasets come from, in the same formats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from finetune.api.contract import ExitCode, Layout
from finetune.api.spec import DatasetSource, TokenSource
from finetune.steps.rows.formats import Completion, Conversation, Example, PlainText, recognised
from finetune.steps.rows.messages import MalformedRow
from finetune.steps.rows.sources import opened, prepare_environment
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.tokens.learn.watch import Watch

ROWS = 1_000
"""Rows that are read together."""


class Corpus:
    """Rows of a source as plain texts. Can be read again and again; what is in memory is bounded."""

    def __init__(
        self, source: TokenSource, layout: Layout, cache: Path, field: str, watch: Watch = lambda done, total: None
    ) -> None:
        """`watch` is told how many rows of all have been read, whenever it is read.

        Raises StepFailure, naming `field`, for a source that is absent, unreadable or of an unknown format."""
        prepare_environment(cache)
        rows = opened(dataset_source(source), layout, cache, field)
        self._format = recognised(rows.column_names, field)
        self._rows = rows.columns((*self._format.columns, *self._format.optional))
        self._source, self._field, self._watch = source, field, watch

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self._rows), ROWS):
            try:
                examples = self._format.examples(self._rows[first : first + ROWS])
            except MalformedRow as error:
                raise StepFailure(
                    ExitCode.BAD_DATA,
                    "MalformedRow",
                    f"{self._field}: row {first + error.index + 1} of {self._source.uri}: {error}",
                    "Mend the row.",
                ) from error
            yield from filter(None, map(text_of, examples))
            self._watch(min(first + ROWS, len(self._rows)), len(self._rows))


def dataset_source(source: TokenSource) -> DatasetSource:
    """A corpus is read as a dataset is."""
    return DatasetSource.model_validate(source.wire())


def text_of(example: Example) -> str:
    """All that a row says."""
    match example:
        case PlainText(text):
            return text
        case Completion(prompt, completion):
            return prompt + completion
        case Conversation(messages):
            return "\n".join(message.text for message in messages)
