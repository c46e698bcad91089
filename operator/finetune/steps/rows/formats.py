"""What a row of a dataset says, whatever its columns are called: a conversation, a prompt with its completion, or text.

The format is recognised from the columns; the spec's template takes precedence. A row that does not have the shape
that its columns promise is an error with its number, never skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from finetune.api.contract import ExitCode
from finetune.api.spec import Format as Kind
from finetune.steps.runtime.failure import StepFailure

Row = Mapping[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "tool": "tool",
    "observation": "tool",
}
"""The roles of transformers, and the names that {from, value} datasets use for them."""


class Message(NamedTuple):
    """One turn."""

    role: str
    content: str

    def wire(self) -> dict[str, str]:
        """As chat templates want it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns; those of the assistant from `learned_from` on carry the loss."""

    messages: tuple[Message, ...]
    learned_from: int = 0


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


class MalformedRow(Exception):
    """A row has not the shape that its columns promise; the message names the column.

    `index` is its place among the rows that were handled together.
    """

    index: int = 0


class UndecodableRow(MalformedRow):
    """A row whose bytes are not UTF-8: Arrow lets them pass and Python does not."""


@dataclass(frozen=True)
class Format:
    """A way to read rows. `columns` must be there, `optional` ones may be; no others are read."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], Example]
    optional: tuple[str, ...] = ()
    read_column: Callable[[pa.ChunkedArray], list[Example] | None] | None = None
    """Reads the only column all at once, or declines: then rows are read one by one, and errors have their place."""

    def examples(self, rows: pa.Table | Mapping[str, list[Any]]) -> list[Example]:
        """Some rows, given column by column, as examples; a MalformedRow knows its place among them."""
        if isinstance(rows, pa.Table):
            if self.read_column and (at_once := self.read_column(rows[self.columns[0]])) is not None:
                return at_once
            rows = {name: rows[name].to_pylist() for name in rows.column_names}
        names = [name for name in (*self.columns, *self.optional) if name in rows]
        columns = [rows[name] for name in names]
        examples: list[Example] = []
        for index, values in enumerate(zip(*columns, strict=True)):
            try:
                examples.append(self.read(dict(zip(names, values, strict=True))))
            except MalformedRow as error:
                error.index = index
                raise
        return examples


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
        raise MalformedRow(f"column {column} holds {_kind(value)} instead of a text")
    return value


def messages_of(value: Any, column: str) -> tuple[Message, ...]:
    """The messages that a column holds."""
    if not isinstance(value, list) or not value:
        raise MalformedRow(f"column {column} holds {_kind(value)} instead of a list of messages")
    return tuple(_message(item, f"{column}[{index}]") for index, item in enumerate(value))


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, Mapping):
        raise MalformedRow(f"{place} is {_kind(value)} instead of a message")
    role = value.get("role") if value.get("role") is not None else value.get("from")
    content = value.get("content") if value.get("content") is not None else value.get("value")
    if role not in ROLES:
        raise MalformedRow(f"{place} has the role {role!r}; known are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise MalformedRow(f"{place} has {_kind(content)} as content instead of a text")
    return Message(ROLES[role], content)


def _kind(value: Any) -> str:
    return "nothing" if value is None else "an empty list" if value == [] else f"a {type(value).__name__}"


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
    roles, contents = _field(turns, "role", "from"), _field(turns, "content", "value")
    if roles is None or contents is None or roles.null_count or contents.null_count:
        return None
    roles = roles.dictionary_encode()
    names = [ROLES.get(name) for name in roles.dictionary.to_pylist()]
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
        return Conversation(messages_of(row[column], column))

    return Format(Kind.MESSAGES, (column,), read, read_column=_conversations)


def _read_completion(row: Row) -> Example:
    if isinstance(row["prompt"], str):
        return Completion(row["prompt"], _text(row, "completion"))
    prompt = messages_of(row["prompt"], "prompt")
    return Conversation(prompt + messages_of(row["completion"], "completion"), learned_from=len(prompt))


def _read_instruction(row: Row) -> Example:
    question, further = _text(row, "instruction"), row.get("input") or ""
    system = row.get("system") or ""
    if not isinstance(further, str) or not isinstance(system, str):
        raise MalformedRow("columns input and system must hold text")
    messages = [Message("system", system)] if system else []
    messages += [Message("user", f"{question}\n\n{further}" if further else question)]
    return Conversation((*messages, Message("assistant", _text(row, "output"))))


_FORMATS = (
    *map(_messages_in, ("messages", "conversations", "conversation")),
    Format(Kind.PROMPT_COMPLETION, ("prompt", "completion"), _read_completion),
    Format(
        Kind.SOURCE_TARGET,
        ("source", "target"),
        lambda row: Completion("" if row["source"] is None else _text(row, "source"), _text(row, "target")),
    ),
    Format(Kind.INSTRUCTION, ("instruction", "output"), _read_instruction, optional=("input", "system")),
    Format(Kind.TEXT, ("text",), lambda row: PlainText(_text(row, "text"))),
)
