"""What a message of a conversation says: role, content, and whatever else chat templates know of it.

Tool calls, thoughts, names and ids go on to the chat template under their own names. What differs between datasets and
not between models is made one here: the names of roles, calls that are written as JSON, parts of a content.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any, NamedTuple

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
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
"""The roles of transformers, and the names that datasets use for them."""

CALLS = ("function_call", "tool_call")
"""Roles whose content is a call, or a list of calls, as JSON."""

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message that hold what the assistant thought before it spoke."""

MARKS = ("weight", "train", "loss")
"""Fields that say whether a turn is learned: 0 and false say no."""

NOTHING_MORE: Mapping[str, Any] = MappingProxyType({})


class MalformedRow(Exception):
    """A row has not the shape that its columns promise; the message names the column.

    `index` is its place among the rows that were handled together.
    """

    index: int = 0
    hint: str = "Mend the row, or write a template that can do with it."


class Message(NamedTuple):
    """One turn. The content is several texts where it came as a list of parts, and None beside a call."""

    role: str
    content: str | tuple[str, ...] | None
    more: Mapping[str, Any] = NOTHING_MORE
    """Its other fields, for the chat template."""

    learned: bool = True
    """Whether it carries the loss, if it is the assistant's."""

    @property
    def text(self) -> str:
        """The content as one text."""
        return "\n".join(self.content) if isinstance(self.content, tuple) else self.content or ""


def messages_of(value: Any, column: str) -> tuple[Message, ...]:
    """The messages that a column holds."""
    if not isinstance(value, list) or not value:
        raise MalformedRow(f"column {column} holds {kind_of(value)} instead of a list of messages")
    return tuple(_message(item, f"{column}[{index}]") for index, item in enumerate(value))


def tools_of(value: Any, column: str) -> tuple[Any, ...]:
    """The functions that a column describes, each as {"type": "function", "function": {name, parameters}}."""
    tools = parsed(value, column) or []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise MalformedRow(f"column {column} holds {kind_of(tools)} instead of a list of functions")
    return tuple(_as_function(without_nulls(tool)) for tool in tools)


def variables_of(value: Any) -> dict[str, Any]:
    """What the column chat_template_kwargs gives to the template."""
    variables = parsed(value, "chat_template_kwargs") or {}
    if not isinstance(variables, Mapping):
        raise MalformedRow(f"column chat_template_kwargs holds {kind_of(variables)} instead of an object")
    if taken := variables.keys() & {"messages", "tools", "add_generation_prompt"}:
        raise MalformedRow(f"column chat_template_kwargs must not hold {', '.join(sorted(taken))}")
    return dict(without_nulls(variables))


def parsed(value: Any, place: str) -> Any:
    """The value, read as JSON where it is a text: columns of one type hold what varies in shape so."""
    if not isinstance(value, str) or not value.strip():
        return None if isinstance(value, str) else value
    try:
        return json.loads(value)
    except ValueError as error:
        raise MalformedRow(f"column {place} holds a text that is no JSON: {error}") from error


def without_nulls(value: Any) -> Any:
    """The value without the fields that are null: Arrow gives every object the fields of all."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def kind_of(value: Any) -> str:
    """What a value is, for an error."""
    return "nothing" if value is None else "an empty list" if value == [] else f"a {type(value).__name__}"


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, Mapping):
        raise MalformedRow(f"{place} is {kind_of(value)} instead of a message")
    role = value.get("role") if value.get("role") is not None else value.get("from")
    said = value.get("content") if value.get("content") is not None else value.get("value")
    if role not in ROLES:
        raise MalformedRow(f"{place} has the role {role!r}; known are {', '.join(ROLES)}")
    more = {
        name: without_nulls(field)
        for name, field in value.items()
        if name not in ("role", "from", "content", "value", *MARKS) and field not in (None, [], {})
    }
    for name in THOUGHTS:
        if not isinstance(more.get(name, ""), str):
            raise MalformedRow(f"{place}.{name} is {kind_of(more[name])} instead of a text")
        if more.get(name) == "":
            del more[name]
    if role in CALLS:
        if not isinstance(said, str):
            raise MalformedRow(f"{place} has {kind_of(said)} as content instead of a call as JSON")
        more["tool_calls"], said = parsed(said, f"{place}.content"), None
    if called := more.pop("function_call", None):
        more["tool_calls"] = called
    if "tool_calls" in more:
        more["tool_calls"] = _calls(more["tool_calls"], f"{place}.tool_calls")
    speaks = ROLES[role] == "assistant" and any(name in more for name in ("tool_calls", *THOUGHTS))
    content = None if said is None and speaks else _content(said, place)
    return Message(ROLES[role], content, more or NOTHING_MORE, _learned(value, place))


def _content(value: Any, place: str) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise MalformedRow(f"{place} has {kind_of(value)} as content instead of a text")
    texts = []
    for index, part in enumerate(value):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else kind_of(part)
            raise MalformedRow(f"{place}.content[{index}] is of type {kind}; only parts of type text can be learned")
        texts.append(text)
    return texts[0] if len(texts) == 1 else tuple(texts)


def _calls(value: Any, place: str) -> list[Any]:
    calls = parsed(value, place)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise MalformedRow(f"{place} holds {kind_of(calls)} instead of a list of calls")
    return [_call(_as_function(without_nulls(call)), f"{place}[{index}]") for index, call in enumerate(calls)]


def _call(call: dict[str, Any], place: str) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise MalformedRow(f"{place} has no function with a name")
    arguments = function.get("arguments")
    if arguments is None:
        arguments = {}
    elif isinstance(arguments, str):
        with suppress(ValueError):  # a call that the model is to learn need not be JSON
            arguments = json.loads(arguments or "{}")
    return call | {"function": dict(function) | {"arguments": arguments}}


def _as_function(value: Mapping[str, Any]) -> dict[str, Any]:
    """A function by itself, in the frame that chat templates want around it."""
    bare = "function" not in value and isinstance(value.get("name"), str)
    return {"type": "function", "function": dict(value)} if bare else dict(value)


def _learned(value: Mapping[str, Any], place: str) -> bool:
    marks = {name: value[name] for name in MARKS if value.get(name) is not None}
    for name, mark in marks.items():
        if not isinstance(mark, (bool, int, float)) or mark not in (0, 1):
            raise MalformedRow(f"{place}.{name} is {mark!r}; a turn is learned (1, true) or not (0, false)")
    return all(marks.values())
