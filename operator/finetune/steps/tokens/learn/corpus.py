"""The texts of a corpus, streamed: rows come from where datasets come from, in the same formats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.api.contract import ExitCode, Layout
from finetune.api.spec import DatasetSource, TokenSource
from finetune.steps.dataset.rows import Completion, Conversation, Example, MalformedRow, PlainText, recognised
from finetune.steps.dataset.sources import opened, prepare_environment
from finetune.steps.failure import StepFailure

ROWS = 1_000
"""Rows that are read together."""

PART = 4_000
"""Characters of a text after which it is cut at the next end of a line."""

TENTH = 10

Watch = Callable[[int, int], None]
"""Called with how much is done, and of how much."""


class Corpus:
    """Rows of a source as plain texts. Can be read again and again; what is in memory is bounded."""

    def __init__(
        self, source: TokenSource, layout: Layout, cache: Path, field: str, watch: Watch = lambda done, total: None
    ) -> None:
        """`watch` is told how many rows of all have been read, whenever it is read.

        Raises StepFailure, naming `field`, for a source that is absent, unreadable or of an unknown format."""
        prepare_environment(cache)
        self._rows: Any = opened(dataset_source(source), layout, cache, field)
        self._format = recognised(self._rows.column_names, field)
        self._source, self._field, self._watch = source, field, watch

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self._rows), ROWS):
            columns = self._rows[first : first + ROWS]
            for index, values in enumerate(zip(*columns.values(), strict=True)):
                try:
                    text = text_of(self._format.read(dict(zip(columns, values, strict=True))))
                except MalformedRow as error:
                    raise StepFailure(
                        ExitCode.BAD_DATA,
                        "MalformedRow",
                        f"{self._field}: row {first + index + 1} of {self._source.uri}: {error}",
                        "Mend the row.",
                    ) from error
                if text:
                    yield text
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
            return "\n".join(message.content for message in messages)


def parts(texts: Iterable[str]) -> Iterator[str]:
    """Texts, the long ones in parts that end with a line."""
    for text in texts:
        first = 0
        while first < len(text):
            end = text.find("\n", first + PART)
            last = len(text) if end < 0 else end + 1
            yield text[first:last]
            first = last


def training_parts(texts: Iterable[str]) -> Iterator[str]:
    """The parts to learn from."""
    return (part for number, part in enumerate(parts(texts), start=1) if number % TENTH)


def held_out_parts(texts: Iterable[str]) -> Iterator[str]:
    """Every tenth part: those to measure on."""
    return (part for number, part in enumerate(parts(texts), start=1) if not number % TENTH)


def blocks(texts: Iterable[str], characters: int) -> Iterator[Sequence[str]]:
    """Texts in lists of about so many characters."""
    block: list[str] = []
    size = 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size >= characters:
            yield block
            block, size = [], 0
    if block:
        yield block
