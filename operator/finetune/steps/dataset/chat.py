"""Where in a rendered conversation the assistant speaks.

The ids come from the chat template's whole text, exactly as inference would make them. Which of them are learned is
decided on characters: the assistant's content and the marker that ends its turn, not the header that begins it.
Templates with `{% generation %}` say so themselves. From the others the places are derived by rendering the
conversation up to each answer, and every derivation is verified: where the text up to an answer is not the beginning of
the whole text, there is an error instead of a guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from finetune.api.contract import ExitCode
from finetune.steps.dataset.span import Span
from finetune.steps.rows.formats import MalformedRow, Message
from finetune.steps.runtime.failure import StepFailure

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatRenderer:
    """Renders conversations with the tokenizer's chat template and finds what the assistant says in them."""

    def __init__(self, tokenizer: Any, created: datetime) -> None:
        """`created` is the date that templates print: the job's, so that a second run gives the same ids."""
        if not tokenizer.chat_template:
            raise StepFailure(
                ExitCode.BAD_CONFIGURATION,
                "NoChatTemplate",
                "spec.model: its tokenizer has no chat template, and the dataset holds conversations",
                "Use an instruction-tuned model, or spec.dataset.sources[].template.text for plain text.",
            )
        self._tokenizer = tokenizer
        self._template = tokenizer.get_chat_template()
        self._marked = bool(_GENERATION.search(self._template))
        self._ends = _alternatives(
            [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
            + [str(tokenizer.eos_token or "")]
        )
        self._compiled = _compiled(self._template, created)
        self._constants = {**tokenizer.special_tokens_map, "tools": None, "documents": None}

    @property
    def prints_date(self) -> bool:
        """Whether the ids depend on the date."""
        return "strftime_now" in self._template

    def render(self, messages: Sequence[Message], learned_from: int = 0) -> tuple[str, list[Span]]:
        """The whole text, and the spans in it that the assistant has to learn, in order."""
        turns = [message.wire() for message in messages]
        if self._marked:
            text, spans = self._render_marked(turns)
            answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
            if len(spans) == len(answers):
                spans = [span for span, index in zip(spans, answers, strict=True) if index >= learned_from]
            elif learned_from:
                raise StepFailure(
                    ExitCode.BAD_CONFIGURATION,
                    "UnsupportedChatTemplate",
                    f"the chat template marks {len(spans)} answers in a conversation that has {len(answers)}",
                    "Put the whole conversation into one column (messages) instead of prompt and completion.",
                )
            return text, [self._with_end_marker(text, span) for span in spans]
        text = self._text(turns)
        return text, list(self._derived(turns, text, learned_from))

    def _text(self, turns: Sequence[dict[str, str]], *, prompt: bool = False) -> str:
        """What `apply_chat_template` gives, without what it does for messages that are more than plain texts."""
        with _refusals():
            return str(self._compiled.render(messages=turns, add_generation_prompt=prompt, **self._constants))

    def _render_marked(self, turns: Sequence[dict[str, str]]) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import _render_with_assistant_indices

        with _refusals():
            text, spans = _render_with_assistant_indices(  # type: ignore[no-untyped-call]
                compiled_template=self._compiled, messages=turns, add_generation_prompt=False, **self._constants
            )
        return str(text), [(start, end) for start, end in spans]

    def _with_end_marker(self, text: str, span: Span) -> Span:
        """The span, and the marker right after it where the template left that outside."""
        start, end = span
        marker = self._ends.match(text, end)
        return start, marker.end() if marker else end

    def _derived(self, turns: Sequence[dict[str, str]], text: str, learned_from: int) -> Iterator[Span]:
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant" or index < learned_from:
                continue
            before = self._text(turns[:index], prompt=True) if index else ""
            if not text.startswith(before):
                raise StepFailure(
                    ExitCode.BAD_CONFIGURATION,
                    "UnsupportedChatTemplate",
                    f"the chat template changes earlier turns when later ones follow (turn {index + 1}), so what the "
                    "assistant says cannot be told from the rest",
                    "Give the model a chat template with {% generation %} markers, or use "
                    "spec.dataset.sources[].template with one user and one assistant text.",
                )
            yield len(before), self._end(turns, index, text, len(before))

    def _end(self, turns: Sequence[dict[str, str]], index: int, text: str, start: int) -> int:
        """Where the turn ends: after the marker that follows the content, or else before trailing white space."""
        content = turns[index]["content"].strip()
        if text.startswith(content, start) and (marker := self._ends.match(text, start + len(content))):
            return marker.end()
        limit = len(text)
        if index + 1 < len(turns):
            limit = _common_length(text, self._text(turns[: index + 1]))
        said = text.find(content, start, limit)
        if said >= 0:
            after = said + len(content)
            marker = self._ends.search(text, after, limit)
        else:
            after = start
            *_, marker = (None, *self._ends.finditer(text, start, limit))
        if marker:
            return marker.end()
        end = start + len(text[start:limit].rstrip())
        return end if end > after else limit


@contextmanager
def _refusals() -> Iterator[None]:
    """Templates raise what they like: jinja2's errors, TypeError, ..."""
    try:
        yield
    except Exception as error:
        raise MalformedRow(f"the chat template refuses it: {error}") from error


def _alternatives(markers: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted({marker for marker in markers if marker}, key=lambda marker: (-len(marker), marker))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _common_length(one: str, other: str) -> int:
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return next(index for index in range(length) if one[index] != other[index])


def _compiled(template: str, created: datetime) -> Any:
    """The template as transformers compiles it (once), with `strftime_now` meaning the job's creation time: there is no
    argument for that."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    compiled = _compile_jinja_template(template)
    compiled.globals["strftime_now"] = created.strftime
    return compiled
