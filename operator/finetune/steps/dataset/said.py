"""What a message says, piece by piece, and whether a rendered text shows it.

Chat templates strip, escape and rearrange, and some leave out what they do not know. So every piece of text that a row
holds is looked for in what the template made of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from finetune.steps.rows.messages import THOUGHTS, Message

SIGNS = tuple(map(chr, (0xE0F0, 0xE0F1, 0xF8D0, 0xF0F00, 0x10F0F0, 0x10FFFD)))
"""Characters for private use: texts put between two of one change where the template writes them, and nowhere else."""

SAID = ("tool_calls", *THOUGHTS)
"""Fields beside the content that the assistant has to have said."""

_BLOCK = re.compile(r"(</?think>)")


def thoughts_of(message: Message) -> list[str]:
    """What the assistant thought, in a field of its own or in a block at the beginning of the content."""
    fields = [message.more[name] for name in THOUGHTS if name in message.more]
    before, closed, _ = message.text.rpartition("</think>")
    return fields[:1] + ([before.replace("<think>", "").replace("</think>", "")] if closed else [])


def answers_of(message: Message) -> list[str]:
    """What a message says aloud: its content, and the names and arguments of the functions it calls."""
    if message.role != "assistant":
        return [message.content] if isinstance(message.content, str) else list(message.content or ())
    parts = [message.content] if isinstance(message.content, str) else list(message.content or ())
    if any("</think>" in part for part in parts):
        parts = [message.text.rpartition("</think>")[2]]
    for call in message.more.get("tool_calls", ()):
        parts += [call["function"]["name"], *_leaves(call["function"]["arguments"])]
    return parts


def shows(region: str, text: str) -> bool:
    """Whether the text is there: as it is, as a JSON string has it, with other white space, or as other JSON."""
    wanted = text.strip()
    if wanted in region or json.dumps(wanted, ensure_ascii=False)[1:-1] in region:
        return True
    there = _squeezed(region)
    if _squeezed(wanted) in there or _squeezed(json.dumps(wanted)[1:-1]) in there:
        return True
    if wanted[:1] in "{[":
        try:
            value = json.loads(wanted)
        except ValueError:
            return False
        return all(shows(region, leaf) for leaf in _leaves(value))
    return False


def marked(message: Message, sign: str, *, names: bool = False) -> Message:
    """The message with the sign before and behind every text of its own; round the names of functions only with
    `names`, because some templates repeat these where the function answers."""
    content = message.content
    if isinstance(content, tuple):
        content = tuple(_wrapped(part, sign) for part in content)
    elif content or (content is not None and not any(name in message.more for name in SAID)):
        content = _wrapped(content, sign)
    more = dict(message.more)
    for name in THOUGHTS:
        if name in more:
            more[name] = _wrapped(more[name], sign)
    if "tool_calls" in more:
        more["tool_calls"] = [
            call | {"function": _wrapped_call(call["function"], sign, names=names)} for call in more["tool_calls"]
        ]
    return message._replace(content=content, more=more)


def _wrapped(text: str, sign: str) -> str:
    pieces = _BLOCK.split(text)
    if len(pieces) == 1:
        return f"{sign}{text}{sign}"
    return "".join(f"{sign}{piece}{sign}" if piece.strip() and not _BLOCK.match(piece) else piece for piece in pieces)


def _wrapped_call(function: dict[str, Any], sign: str, *, names: bool) -> dict[str, Any]:
    name = _wrapped(function["name"], sign) if names else function["name"]
    return function | {"name": name, "arguments": _wrapped_leaves(function["arguments"], sign)}


def _wrapped_leaves(value: Any, sign: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _wrapped_leaves(item, sign) for key, item in value.items()} or {sign: sign}
    if isinstance(value, list) and value:
        return [_wrapped_leaves(item, sign) for item in value]
    return f"{sign}{value}{sign}"


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value


def _squeezed(text: str) -> str:
    return "".join(text.split())
