"""What a row of a dataset says, whatever its columns are called: a conversation, a prompt with its completion, or text.

The format is recognised from the columns; the spec's template takes precedence. A row that does not have the shape
that its columns promise is an error with its number, never skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.api.contract import ExitCode
from finetune.steps.failure import StepFailure

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


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    content: str

    def wire(self) -> dict[str, str]:
        """As chat templates want it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Conversation:
    """Turns; those of the assistant from `learned_from` on carry the loss."""

    messages: tuple[Message, ...]
    learned_from: int = 0


@dataclass(frozen=True)
class Completion:
    """A text that continues another; only the continuation carries the loss."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class PlainText:
    """A text that carries the loss as a whole."""

    text: str


Example = Conversation | Completion | PlainText


class MalformedRow(Exception):
    """A row has not the shape that its columns promise; the message names the column.

    `index` is its place among the rows that were handled together.
    """

    index: int = 0


@dataclass(frozen=True)
class Format:
    """A way to read rows."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], Example]


def recognised(columns: Sequence[str], field: str) -> Format:
    """The format that the columns stand for. `field` is the source's place in the spec, for the error."""
    for candidate in _FORMATS:
        if set(candidate.columns) <= set(columns):
            return candidate
    known = "; ".join(" and ".join(candidate.columns) for candidate in _FORMATS)
    raise StepFailure(
        ExitCode.BAD_CONFIGURATION,
        "UnknownFormat",
        f"{field}: no known format has the columns {', '.join(columns)}",
        f"Write {field}.template over these columns, or rename them to one of: {known}.",
    )


def _text(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise MalformedRow(f"column {column} holds {_kind(value)} instead of a text")
    return value


def _messages(value: Any, column: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise MalformedRow(f"column {column} holds {_kind(value)} instead of a list of messages")
    return tuple(_message(item, f"{column}[{index}]") for index, item in enumerate(value))


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, Mapping):
        raise MalformedRow(f"{place} is {_kind(value)} instead of a message")
    role = value.get("role") or value.get("from")
    content = value.get("content") if value.get("content") is not None else value.get("value")
    if role not in ROLES:
        raise MalformedRow(f"{place} has the role {role!r}; known are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise MalformedRow(f"{place} has {_kind(content)} as content instead of a text")
    return Message(ROLES[role], content)


def _kind(value: Any) -> str:
    return "nothing" if value is None else "an empty list" if value == [] else f"a {type(value).__name__}"


def _read_messages(column: str) -> Callable[[Row], Example]:
    return lambda row: Conversation(_messages(row[column], column))


def _read_completion(row: Row) -> Example:
    if isinstance(row["prompt"], str):
        return Completion(row["prompt"], _text(row, "completion"))
    prompt = _messages(row["prompt"], "prompt")
    return Conversation(prompt + _messages(row["completion"], "completion"), learned_from=len(prompt))


def _read_instruction(row: Row) -> Example:
    question, further = _text(row, "instruction"), row.get("input") or ""
    system = row.get("system") or ""
    if not isinstance(further, str) or not isinstance(system, str):
        raise MalformedRow("columns input and system must hold text")
    messages = [Message("system", system)] if system else []
    messages += [Message("user", f"{question}\n\n{further}" if further else question)]
    return Conversation((*messages, Message("assistant", _text(row, "output"))))


_FORMATS = (
    Format("messages", ("messages",), _read_messages("messages")),
    Format("conversations", ("conversations",), _read_messages("conversations")),
    Format("conversation", ("conversation",), _read_messages("conversation")),
    Format("prompt and completion", ("prompt", "completion"), _read_completion),
    Format("instruction", ("instruction", "output"), _read_instruction),
    Format("text", ("text",), lambda row: PlainText(_text(row, "text"))),
)
