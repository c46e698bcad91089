"""Pairs of answers to one prompt, of which one is preferred.

A pair is two examples that follow one another: chosen, rejected. It is kept whole or not at all.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os.path import commonprefix
from typing import Any, NamedTuple

import pyarrow as pa

from finetune.api.contract import ExitCode
from finetune.api.spec import DatasetSource
from finetune.api.spec import Format as Kind
from finetune.steps.dataset.encode import Encoded
from finetune.steps.rows.formats import CONTEXT, MATTER, Completion, Conversation, Example, Format, Row, in_context
from finetune.steps.rows.messages import MalformedRow, Message, kind_of, messages_of
from finetune.steps.runtime.failure import StepFailure

PROMPTS = ("prompt", "question", "instruction")
"""Columns that hold what is answered; the first one that there is."""


def pairs_in(columns: Sequence[str], field: str, source: DatasetSource) -> Format:
    """The format of rows that hold pairs. `field` is the source's place in the spec, for the error."""
    if source.template or source.format not in (None, Kind.PREFERENCE):
        name = "template" if source.template else "format"
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "NotForPairs",
            f"{field}.{name}: objective Preference reads the columns chosen and rejected themselves, without a {name}",
            f"Remove {name}, and name the columns prompt (or question, or instruction), chosen and rejected.",
        )
    if missing := [name for name in ("chosen", "rejected") if name not in columns]:
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "MissingColumn",
            f"{field}: objective Preference needs the columns chosen and rejected; the rows lack "
            f"{' and '.join(missing)} and have {', '.join(columns)}",
            "Rename the columns; prompt, chosen and rejected are texts or lists of messages.",
        )
    asked: tuple[str, ...] = next(((name,) for name in PROMPTS if name in columns), ())
    optional = (*asked, *(("input",) if asked == ("instruction",) else ()), *CONTEXT)
    refused = tuple(name for name in MATTER if name not in optional)
    return _PairFormat(Kind.PREFERENCE, ("chosen", "rejected"), _answer(0), optional=optional, refused=refused)


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
    """The pair in the columns chosen and rejected, and its prompt if there is one.

    Both are texts that continue the prompt, or lists of messages that do, also as JSON. A prompt by the name question
    or instruction (with input), or with a system message, is a user's turn, and texts are answers to it. Without a
    prompt (or with one that the lists repeat, as many datasets have it) it is what both begin with: whole turns, or
    whole words of a text.
    """
    chosen, rejected = (_messages_or_text(row[column], column) for column in ("chosen", "rejected"))
    name = next((name for name in PROMPTS if row.get(name) is not None), "prompt")
    prompt = _messages_or_text(row.get(name), name)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise MalformedRow("one of the columns chosen and rejected holds a text, the other does not")
    if name == "instruction" and isinstance(prompt, str) and (further := _text(row.get("input"), "input")):
        prompt = f"{prompt}\n\n{further}"
    if isinstance(chosen, str) and isinstance(rejected, str):
        in_context_of = [column for column in CONTEXT if row.get(column)]
        if isinstance(prompt, str) and (name != "prompt" or in_context_of):
            first, second = ((Message("assistant", text),) for text in (chosen, rejected))
            return _conversations((Message("user", prompt),), first, second, row)
        if in_context_of:
            raise MalformedRow(f"column {in_context_of[0]} holds something, and there is no prompt that it goes with")
        if prompt is not None and not isinstance(prompt, str):
            raise MalformedRow(f"column {name} holds messages, columns chosen and rejected hold texts")
        return _texts(prompt, chosen, rejected)
    before = (Message("user", prompt),) if isinstance(prompt, str) and prompt else prompt or ()
    return _conversations(before, chosen, rejected, row)  # type: ignore[arg-type]


def _messages_or_text(value: Any, column: str) -> str | tuple[Message, ...] | None:
    """Messages also where they are JSON in a text, as CSV files have them."""
    if isinstance(value, str):
        if not value.lstrip().startswith(("[", "{")):
            return value
        try:
            found = json.loads(value)
        except ValueError:
            return value
        turns = found if isinstance(found, list) else [found]
        if not turns or not all(isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in turns):
            return value
        value = turns
    if value is None:
        return None
    return messages_of([value] if isinstance(value, Mapping) else value, column)


def _text(value: Any, column: str) -> str:
    if value is not None and not isinstance(value, str):
        raise MalformedRow(f"column {column} holds {kind_of(value)} instead of a text")
    return value or ""


def _texts(prompt: str | None, chosen: str, rejected: str) -> Pair:
    if prompt is None:
        common = commonprefix([chosen, rejected])  # noqa: RUF071 - of characters, not of paths
        prompt = common[: common.rfind(" ")] if " " in common else ""
        chosen, rejected = chosen.removeprefix(prompt), rejected.removeprefix(prompt)
    if chosen == rejected:
        raise MalformedRow("columns chosen and rejected are equal")
    return Pair(Completion(prompt, chosen), Completion(prompt, rejected))


def _conversations(
    before: tuple[Message, ...], chosen: tuple[Message, ...], rejected: tuple[Message, ...], row: Row
) -> Pair:
    chosen, rejected = (each if each[: len(before)] == before else before + each for each in (chosen, rejected))
    if chosen == rejected:
        raise MalformedRow("columns chosen and rejected are equal")
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not any(message.role == "assistant" and message.learned for message in messages[common:]):
            raise MalformedRow(f"column {name} has no answer of its own")
    first, second = (in_context(Conversation(messages, common), row) for messages in (chosen, rejected))
    return Pair(first, second)


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
