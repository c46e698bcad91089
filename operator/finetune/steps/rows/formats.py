"""What a row of a dataset says, whatever its columns are called: a conversation, a prompt with its completion, or text.

The format is recognised from the columns; the spec's template takes precedence. A row that does not have the shape
that its columns promise is an error with its number, never skipped; so is a row in which a column that matters says
something that its format has no place for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from finetune.api.contract import ExitCode
from finetune.api.spec import Format as Kind
from finetune.steps.rows.messages import (
    CALLS,
    MARKS,
    ROLES,
    MalformedRow,
    Message,
    kind_of,
    messages_of,
    parsed,
    tools_of,
    variables_of,
)
from finetune.steps.runtime.failure import StepFailure

Row = Mapping[str, Any]

MATTER = ("system", "history", "tools", "functions", "tool_calls", "reasoning_content", "thinking", *MARKS)
"""Columns that say what the model is to see or to say, or how much of it is learned: a format that has no place for one
refuses rows that fill it."""

CONTEXT = ("system", "tools", "chat_template_kwargs")
"""Columns beside a conversation that belong to it."""

_NOT_CONTEXT = tuple(name for name in MATTER if name not in CONTEXT)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns; those of the assistant from `learned_from` on carry the loss, unless they are marked otherwise."""

    messages: tuple[Message, ...]
    learned_from: int = 0
    tools: tuple[Any, ...] = ()
    """The functions that may be called, as chat templates want them."""

    variables: Mapping[str, Any] = field(default_factory=dict)
    """What else the row gives to the chat template (`chat_template_kwargs`)."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A text that continues another; only the continuation carries the loss."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class PlainText:
    """A text that carries the loss as a whole."""

    text: str


Example = Conversation | Completion | PlainText


class UndecodableRow(MalformedRow):
    """A row whose bytes are not UTF-8: Arrow lets them pass and Python does not."""


@dataclass(frozen=True)
class Format:
    """A way to read rows. `columns` must be there, `optional` ones may be; `refused` ones must say nothing. No others
    are read."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], Example]
    optional: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    read_column: Callable[[pa.ChunkedArray], list[Example] | None] | None = None
    """Reads the only column all at once, or declines: then rows are read one by one, and errors have their place."""

    def examples(self, rows: pa.Table | Mapping[str, list[Any]]) -> list[Example]:
        """Some rows, given column by column, as examples; a MalformedRow knows its place among them."""
        if isinstance(rows, pa.Table):
            alone = not any(
                name in rows.column_names and rows[name].null_count < len(rows)
                for name in (*self.optional, *self.refused)
            )
            if alone and self.read_column and (at_once := self.read_column(rows[self.columns[0]])) is not None:
                return at_once
            rows = {name: rows[name].to_pylist() for name in rows.column_names}
        names = [name for name in self.wanted if name in rows]
        columns = [rows[name] for name in names]
        examples: list[Example] = []
        for index, values in enumerate(zip(*columns, strict=True)):
            row = dict(zip(names, values, strict=True))
            try:
                self._refuse(row)
                examples.append(self.read(row))
            except MalformedRow as error:
                error.index = index
                raise
        return examples

    @property
    def wanted(self) -> tuple[str, ...]:
        """The columns that have to be read, where there are such."""
        return (*self.columns, *self.optional, *self.refused)

    def unused(self, columns: Sequence[str]) -> list[str]:
        """The columns that nothing is made of."""
        return [column for column in columns if column not in (*self.columns, *self.optional)]

    def _refuse(self, row: Row) -> None:
        for name in self.refused:
            if name in MARKS and _marks(name, row.get(name)):
                error = MalformedRow(f"column {name} holds {row[name]}, and rows are learned whole")
                error.hint = (
                    f"Drop rows that are not to be learned and repeat those that count more (or weigh whole sources by "
                    f"spec.dataset.sources[].weight), then remove the column; turns may be marked: messages[].{name}."
                )
                raise error
            if name not in MARKS and row.get(name) not in (None, "", [], {}, "[]"):
                error = MalformedRow(f"column {name} holds something, and {self.name} has no place for it")
                error.hint = (
                    f"Write a template (user, assistant, system or text) that uses {name}, or remove the column if it "
                    "is not to be learned from."
                )
                raise error


def _marks(name: str, value: Any) -> bool:
    """Whether a value beside the row says that it counts more or less than others. Datasets have columns of these names
    for other things too: a loss that somebody measured, the name of a split."""
    if name == "weight":
        return isinstance(value, int | float) and value != 1
    return isinstance(value, int | float) and value == 0


def recognised(columns: Sequence[str], field: str) -> Format:
    """The format that the columns stand for. `field` is the source's place in the spec, for the error."""
    for candidate in _FORMATS:
        if set(candidate.columns) <= set(columns):
            return candidate
    raise StepFailure(
        ExitCode.BAD_CONFIGURATION,
        "UnknownFormat",
        f"{field}: no known format has the columns {', '.join(columns)}",
        f"Write {field}.template over these columns, or rename them to one of: {_known(_FORMATS)}.",
    )


def said(kind: Kind, columns: Sequence[str], field: str) -> Format:
    """The format that the spec names, over these columns."""
    candidates = [candidate for candidate in _FORMATS if candidate.name == kind]
    for candidate in candidates:
        if set(candidate.columns) <= set(columns):
            return candidate
    raise StepFailure(
        ExitCode.BAD_CONFIGURATION,
        "MissingColumn",
        f"{field}.format: {kind} needs the columns {_known(candidates)}; the rows have {', '.join(columns)}",
        f"Rename the columns, or write {field}.template over those that there are.",
    )


def other_format(row: Row, format: Format) -> str | None:
    """The name of another format that a row has, which lacks what its own format wants: the file mixes formats."""
    present = {column for column, value in row.items() if value is not None}
    others = (other for other in _FORMATS if other.columns != format.columns and set(other.columns) <= present)
    return next((f"{other.name} ({', '.join(other.columns)})" for other in others), None)


def is_row(columns: Sequence[str]) -> bool:
    """Whether an object with these keys is a row of a known format, whatever else it may be."""
    return {"chosen", "rejected"} <= set(columns) or any(set(each.columns) <= set(columns) for each in _FORMATS)


def _known(formats: Sequence[Format]) -> str:
    return "; ".join(" and ".join(candidate.columns) for candidate in formats)


def _text(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise MalformedRow(f"column {column} holds {kind_of(value)} instead of a text")
    return value


def _conversations(column: pa.ChunkedArray) -> list[Example] | None:
    """A column of lists of {role or from, content or value}, read without a Python object for every value of it. None
    when anything is unusual."""
    lists = column.combine_chunks()
    if isinstance(lists, pa.ChunkedArray):
        lists = pa.concat_arrays(lists.chunks)
    kind = lists.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(kind.value_type):
        return None
    turns = lists.flatten()
    if lists.null_count or turns.null_count or not len(lists):
        return None
    further = (field.name for field in turns.type if field.name not in ("role", "from", "content", "value"))
    if any(turns.field(name).null_count < len(turns) for name in further):
        return None
    roles, contents = _field(turns, "role", "from"), _field(turns, "content", "value")
    if roles is None or contents is None or roles.null_count or contents.null_count:
        return None
    roles = roles.dictionary_encode()
    names = [None if name in CALLS else ROLES.get(name) for name in roles.dictionary.to_pylist()]
    lengths = lists.value_lengths().to_pylist()
    if None in names or not all(lengths):
        return None
    spoken = [names[index] for index in roles.indices.to_pylist()]
    messages = list(map(Message, spoken, contents.to_pylist()))
    bounds = pairwise(accumulate(lengths, initial=0))
    return [Conversation(tuple(messages[start:end])) for start, end in bounds]


def _field(turns: pa.StructArray, *names: str) -> pa.Array | None:
    """The first of the fields that says something, in each turn."""
    found = [turns.field(name) for name in names if turns.type.get_field_index(name) >= 0]
    if not found or not all(pa.types.is_string(each.type) or pa.types.is_large_string(each.type) for each in found):
        return None
    return pc.coalesce(*found) if len(found) > 1 else found[0]


def _messages_in(column: str) -> Format:
    def read(row: Row) -> Example:
        return in_context(Conversation(messages_of(row[column], column)), row)

    return Format(Kind.MESSAGES, (column,), read, optional=CONTEXT, refused=_NOT_CONTEXT, read_column=_conversations)


def in_context(conversation: Conversation, row: Row) -> Conversation:
    """The conversation with what the columns beside it say: a system message, tools, variables of the template."""
    system, messages = row.get("system") or "", conversation.messages
    learned_from = conversation.learned_from
    if not isinstance(system, str):
        raise MalformedRow(f"column system holds {kind_of(system)} instead of a text")
    if system and messages[0].role == "system" and messages[0].content != system:
        raise MalformedRow("column system holds a text, and the messages begin with a different system message")
    if system and messages[0].role != "system":
        messages, learned_from = (Message("system", system), *messages), learned_from + bool(learned_from)
    tools = tools_of(row.get("tools"), "tools")
    return Conversation(messages, learned_from, tools, variables_of(row.get("chat_template_kwargs")))


def _read_completion(row: Row) -> Example:
    if isinstance(row["prompt"], str):
        if filled := [name for name in CONTEXT if row.get(name)]:
            raise MalformedRow(f"column {filled[0]} goes with lists of messages, and column prompt holds a text")
        return Completion(row["prompt"], _text(row, "completion"))
    prompt = messages_of(row["prompt"], "prompt")
    messages = prompt + messages_of(row["completion"], "completion")
    return in_context(Conversation(messages, learned_from=len(prompt)), row)


def _read_instruction(row: Row) -> Example:
    question, further = _text(row, "instruction"), row.get("input") or ""
    if not isinstance(further, str):
        raise MalformedRow("column input must hold a text")
    messages = [turn for pair in _history(row.get("history")) for turn in pair]
    messages += [Message("user", f"{question}\n\n{further}" if further else question)]
    return in_context(Conversation((*messages, Message("assistant", _text(row, "output")))), row)


def _history(value: Any) -> list[tuple[Message, Message]]:
    """Alpaca's earlier turns: pairs of a question and an answer, which is learned like the last one."""
    pairs = parsed(value, "history") or []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
    ):
        raise MalformedRow("column history holds something other than pairs of question and answer")
    return [(Message("user", question), Message("assistant", answer)) for question, answer in pairs]


_FORMATS = (
    *map(_messages_in, ("messages", "conversations", "conversation")),
    Format(
        Kind.PROMPT_COMPLETION,
        ("prompt", "completion"),
        _read_completion,
        optional=CONTEXT,
        refused=_NOT_CONTEXT,
    ),
    Format(
        Kind.SOURCE_TARGET,
        ("source", "target"),
        lambda row: Completion("" if row["source"] is None else _text(row, "source"), _text(row, "target")),
        refused=MATTER,
    ),
    Format(
        Kind.INSTRUCTION,
        ("instruction", "output"),
        _read_instruction,
        optional=("input", "history", *CONTEXT),
        refused=tuple(name for name in _NOT_CONTEXT if name != "history"),
    ),
    Format(Kind.TEXT, ("text",), lambda row: PlainText(_text(row, "text")), refused=MARKS),
)
