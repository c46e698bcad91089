"""Pairs of answers to one prompt, of which one is preferred.

A pair is two examples that follow one another: chosen, rejected. It is kept whole or not at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os.path import commonprefix
from typing import Any, NamedTuple

import pyarrow as pa

from finetune.api.contract import ExitCode
from finetune.api.spec import Format as Kind
from finetune.steps.dataset.encode import Encoded
from finetune.steps.rows.formats import (
    Completion,
    Conversation,
    Example,
    Format,
    MalformedRow,
    Message,
    Row,
    messages_of,
)
from finetune.steps.runtime.failure import StepFailure


def pairs_in(columns: Sequence[str], field: str) -> Format:
    """The format of rows that hold pairs. `field` is the source's place in the spec, for the error."""
    if missing := [name for name in ("chosen", "rejected") if name not in columns]:
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "MissingColumn",
            f"{field}: objective Preference needs the columns chosen and rejected; the rows lack "
            f"{' and '.join(missing)} and have {', '.join(columns)}",
            "Rename the columns; prompt, chosen and rejected are texts or lists of messages.",
        )
    return _PairFormat(Kind.PREFERENCE, ("chosen", "rejected"), _answer(0), optional=("prompt",))


class Pair(NamedTuple):
    """Two answers to one prompt."""

    chosen: Example
    rejected: Example


class _PairFormat(Format):
    """A row is two examples that follow one another."""

    def examples(self, rows: pa.Table | Mapping[str, list[Any]]) -> list[Example]:
        chosen, rejected = (Format.examples(replace(self, read=_answer(which)), rows) for which in (0, 1))
        return [answer for pair in zip(chosen, rejected, strict=True) for answer in pair]


def _answer(which: int) -> Callable[[Row], Example]:
    return lambda row: read_pair(row)[which]


def read_pair(row: Row) -> Pair:
    """The pair in the columns chosen and rejected, and prompt if there is one.

    Both are texts that continue the prompt, or lists of messages that do. Without a prompt (or with one that the lists
    repeat, as many datasets have it) it is what both begin with: whole turns, or whole words of a text.
    """
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is not None and not isinstance(prompt, str):
            raise MalformedRow("column prompt holds messages, columns chosen and rejected hold texts")
        return _texts(prompt, chosen, rejected)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise MalformedRow("one of the columns chosen and rejected holds a text, the other does not")
    before = messages_of(prompt, "prompt") if prompt is not None and not isinstance(prompt, str) else ()
    return _conversations(before, messages_of(chosen, "chosen"), messages_of(rejected, "rejected"))


def _texts(prompt: str | None, chosen: str, rejected: str) -> Pair:
    if prompt is None:
        common = commonprefix([chosen, rejected])  # noqa: RUF071 - of characters, not of paths
        prompt = common[: common.rfind(" ")] if " " in common else ""
        chosen, rejected = chosen.removeprefix(prompt), rejected.removeprefix(prompt)
    if chosen == rejected:
        raise MalformedRow("columns chosen and rejected are equal")
    return Pair(Completion(prompt, chosen), Completion(prompt, rejected))


def _conversations(before: tuple[Message, ...], chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> Pair:
    chosen, rejected = (each if each[: len(before)] == before else before + each for each in (chosen, rejected))
    if chosen == rejected:
        raise MalformedRow("columns chosen and rejected are equal")
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not any(message.role == "assistant" for message in messages[common:]):
            raise MalformedRow(f"column {name} has no answer of its own")
    return Pair(Conversation(chosen, learned_from=common), Conversation(rejected, learned_from=common))


def complete(encoded: Sequence[Encoded]) -> list[Encoded]:
    """The pairs of which both examples are there, numbered as rows."""
    by_place = {each.row: each for each in encoded}
    whole = [place for place in by_place if place % 2 == 0 and place + 1 in by_place]
    return [
        Encoded(place // 2, example.ids, example.learned)
        for place in whole
        for example in (by_place[place], by_place[place + 1])
    ]


def in_pairs(dropped: Counter[Any], pairs: int) -> Counter[Any]:
    """The reasons why examples were dropped, as reasons of so many pairs: where both were, one of them counts."""
    excess, counted = dropped.total() - pairs, Counter(dropped)
    for reason, count in dropped.most_common():
        taken = min(excess, count)
        counted[reason] -= taken
        excess -= taken
    return +counted
