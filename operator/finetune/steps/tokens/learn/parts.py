"""The parts of a corpus: pieces of its texts, most of them to learn from, every tenth to measure on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

PART = 4_000
"""Characters of a text after which it is cut at the next end of a line."""

TENTH = 10


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
