"""A model's chat template, and the form in which it wants what messages say.

Templates differ in what they can take: contents as text or as lists of parts, arguments of calls as objects or as JSON,
and a call without content as a field that is absent, null or empty. Each is tried once, and the first that shows what
it was given is used: in the order in which transformers itself gives it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from itertools import product
from typing import Any

from finetune.steps.dataset.span import Span
from finetune.steps.rows.messages import NOTHING_MORE, THOUGHTS, MalformedRow, Message

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_FIRST, _SECOND = "\ue0f2", "\ue0f3"


class ChatTemplate:
    """One template, compiled as transformers compiles it."""

    def __init__(self, source: str, constants: Mapping[str, Any], created: datetime) -> None:
        """`constants` are the special tokens; `created` is what the template prints as today."""
        self.source = source
        self.marks_generation = bool(_GENERATION.search(source))
        self._named: dict[str, bool] = {}
        self._compiled = _compiled(source, created)
        self._constants = {**constants, "tools": None, "documents": None}

    def names(self, field: str) -> bool:
        """Whether the template reads a field of that name."""
        if field not in self._named:
            names = THOUGHTS if field in THOUGHTS else (field,)
            self._named[field] = any(re.search(rf"\b{re.escape(name)}\b", self.source) for name in names)
        return self._named[field]

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] = (),
        variables: Mapping[str, Any] = NOTHING_MORE,
        *,
        prompt: bool = False,
    ) -> str:
        """What `apply_chat_template` gives; with `prompt`, what the model is asked to go on from."""
        with _refusals():
            given = self._given(messages, tools, variables)
            return str(self._compiled.render(add_generation_prompt=prompt, **given))

    def generated(
        self, messages: Sequence[Message], tools: Sequence[Any], variables: Mapping[str, Any]
    ) -> tuple[str, list[Span]]:
        """The same text, and its places that the template marks as the assistant's."""
        if not self.marks_generation:
            return self.render(messages, tools, variables), []
        from transformers.utils.chat_template_utils import _render_with_assistant_indices

        with _refusals():
            text, spans = _render_with_assistant_indices(  # type: ignore[no-untyped-call]
                compiled_template=self._compiled,
                add_generation_prompt=False,
                **self._given(messages, tools, variables),
            )
        return str(text), spans

    def _given(self, messages: Sequence[Message], tools: Sequence[Any], variables: Mapping[str, Any]) -> dict[str, Any]:
        given = {**self._constants, **variables, "messages": [self._turn(message) for message in messages]}
        return given | {"tools": list(tools)} if tools else given

    def _turn(self, message: Message) -> dict[str, Any]:
        role, content, more, _ = message
        if not more:
            return {"role": role, "content": self._content(content)}
        turn = {"role": role, **more}
        thought = next((more[name] for name in ("reasoning_content", "thinking", "reasoning") if name in more), None)
        if thought is not None:
            turn = {"thinking": thought, **turn, "reasoning_content": thought}  # as transformers does
        silence: Mapping[str, Any] = {"content": self._content("")}
        if calls := more.get("tool_calls"):
            as_text, silence = self._calls
            if as_text:
                turn["tool_calls"] = [
                    call | {"function": call["function"] | {"arguments": _as_text(call["function"]["arguments"])}}
                    for call in calls
                ]
        return {**turn, **(silence if content is None else {"content": self._content(content)})}

    def _content(self, content: str | tuple[str, ...] | None) -> Any:
        if isinstance(content, tuple):
            if not self._lists:
                return "\n".join(content)
            return [{"type": "text", "text": part} for part in content]
        return [{"type": "text", "text": content}] if self._only_parts else content

    @cached_property
    def _only_parts(self) -> bool:
        """Whether a content that is a text would not be shown, and a list of parts is."""
        return not self._shows(_FIRST) and self._shows([{"type": "text", "text": _FIRST}])

    @cached_property
    def _lists(self) -> bool:
        """Whether lists of parts are shown as such."""
        return self._shows([{"type": "text", "text": _FIRST}, {"type": "text", "text": _SECOND}])

    def _shows(self, content: Any) -> bool:
        text = self._tried([{"role": "user", "content": content}])
        wanted = (_FIRST,) if isinstance(content, str) else tuple(part["text"] for part in content)
        as_json = re.search(r"""["']text["']""", text)  # a list that was printed is not understood
        return all(part in text for part in wanted) and not as_json

    def _tried(self, turns: list[dict[str, Any]]) -> str:
        """Nothing where the template refuses it, with whatever it raises."""
        try:
            return str(self._compiled.render(add_generation_prompt=False, **self._constants, messages=turns))
        except Exception:
            return ""

    @cached_property
    def _calls(self) -> tuple[bool, dict[str, Any]]:
        """Whether arguments are wanted as text, and what is said of a content that is not there."""
        question = {"role": "user", "content": self._content("Q")}
        silences: tuple[dict[str, Any], ...] = ({}, {"content": None}, {"content": self._content("")})
        for silence, as_text in product(silences, (False, True)):
            arguments = {"x": _SECOND}
            function = {"name": _FIRST, "arguments": _as_text(arguments) if as_text else arguments}
            calls = [{"type": "function", "id": "abcdefghi", "function": function}]
            turn = {"role": "assistant", "tool_calls": calls, **silence}
            text = self._tried([question, turn])
            escaped = f'\\"{_SECOND}' in text
            if _FIRST in text and _SECOND in text and not escaped and not re.search(r"\b(None|null)\b", text):
                return as_text, silence
        return False, {"content": self._content("")}


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


@contextmanager
def _refusals() -> Iterator[None]:
    """Templates raise what they like: jinja2's errors, TypeError, ..."""
    try:
        yield
    except Exception as error:
        raise MalformedRow(f"the chat template refuses it: {error}") from error


def _compiled(template: str, created: datetime) -> Any:
    """The template as transformers compiles it (once), with `strftime_now` meaning the job's creation time: there is no
    argument for that. jinja2 copies the globals for every rendering, and its own ChainMap is slow to copy."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    compiled = _compile_jinja_template(template)
    compiled.globals = {**compiled.globals, "strftime_now": created.strftime}
    return compiled
