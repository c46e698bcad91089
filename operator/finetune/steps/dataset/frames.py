"""What a chat template writes round plain questions and answers, read off a conversation of single characters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.steps.dataset.chat_template import ChatTemplate
from finetune.steps.dataset.span import Span
from finetune.steps.rows.messages import MalformedRow, Message

_SAID = ("\ue0e0", "\ue0e1", "\ue0e2", "\ue0e3")


@dataclass(frozen=True)
class Frames:
    """The parts of a text between the contents of messages."""

    between: tuple[str, str]
    """From a question to its answer: of an earlier answer, and of the last one."""

    written_by_template: tuple[int, int]
    """How much of that is not learned: what the generation prompt has too."""

    after: str
    """From an answer to the next question."""

    tail: str
    """Behind the last answer."""

    end: tuple[int, int]
    """How much of these two is the end of the answer's turn."""

    appended: str
    """The marker that ends the last turn, where the template writes none."""

    prompt: str
    """The generation prompt by itself: the header, and a thought that is opened."""

    headers: tuple[str, ...]
    """What of that stands before answers, longest first."""

    ends_by_next: bool
    """Whether a turn ends with the marker that opens the next one."""

    @classmethod
    def of(cls, template: ChatTemplate, special: re.Pattern[str], eos: str) -> Frames | None:
        """None where the template refuses such a conversation, or does not show it."""
        asked, answered = _SAID[:2]
        turns = [Message(role, text) for role, text in zip(("user", "assistant") * 2, _SAID, strict=True)]
        try:
            text, prompted = template.render(turns), template.render(turns[:1], prompt=True)
            single, question = template.render(turns[:2]), template.render(turns[:1])
        except MalformedRow:
            return None
        places = [text.find(each) for each in _SAID]
        if -1 in places or places != sorted(places) or asked not in prompted or answered not in single:
            return None
        between = text[places[0] + 1 : places[1]], text[places[2] + 1 : places[3]]
        prompt, closing = prompted.partition(asked)[2], question.partition(asked)[2]
        after, tail = text[places[1] + 1 : places[2]], text[places[3] + 1 :]
        header = prompt[common_length(prompt, closing) :]
        begun = tuple(common_length(each, prompt) for each in between)
        lengths = {*begun, common_length(_before_thought(template, asked), prompt)}
        shorter = {prompt[common_length(prompt, closing) : length] for length in lengths}
        own = common_length(after, single.partition(answered)[2])
        ends_by_next = not tail.strip() and special.match(after.lstrip()) is not None
        return cls(
            between,
            (begun[0], begun[1]),
            after,
            tail,
            (_end(after, len(after) if ends_by_next else own, special), _end(tail, len(tail), special)),
            _opening(after, special) if ends_by_next else "" if tail else eos,
            header,
            tuple(sorted({each for each in (header, *shorter) if each}, key=len, reverse=True)),
            ends_by_next,
        )

    @property
    def ends(self) -> tuple[str, ...]:
        """What ends a turn."""
        if self.ends_by_next:
            return ()
        return tuple(dict.fromkeys((self.after[: self.end[0]], self.tail[: self.end[1]])))

    @property
    def as_prompted(self) -> bool:
        """Whether the last answer stands behind the whole generation prompt."""
        return self.between[1][: self.written_by_template[1]].endswith(self.prompt)

    def written(self, contents: Sequence[str]) -> tuple[str, list[Span]]:
        """Questions and answers in turn, as the template writes them from the first question on; what is learned."""
        parts: list[str] = []
        spans: list[Span] = []
        length = 0
        for place in range(0, len(contents), 2):
            last = place + 2 == len(contents)
            question, answer = contents[place], contents[place + 1]
            after = self.tail + self.appended if last else self.after
            parts += (question, self.between[last], answer, after)
            start = length + len(question)
            end = start + len(self.between[last]) + len(answer)
            stop = len(after) if last and self.appended else self.end[last]
            spans.append((start + self.written_by_template[last], end + stop))
            length = end + len(after)
        return "".join(parts), spans


def _end(text: str, own: int, special: re.Pattern[str]) -> int:
    """How much of what follows an answer, of which so much belongs to its turn, ends it: up to the first special token,
    or else what is no white space."""
    if marker := special.search(text, 0, own) or special.match(text):
        return marker.end()
    return len(text[:own].rstrip()) or own


def _before_thought(template: ChatTemplate, asked: str) -> str:
    """What stands between a question and a thought."""
    turn = Message("assistant", _SAID[1], {"reasoning_content": _SAID[2]})
    try:
        return template.render([Message("user", asked), turn]).partition(asked)[2].partition(_SAID[2])[0]
    except MalformedRow:
        return ""


def _opening(after: str, special: re.Pattern[str]) -> str:
    marker = special.match(after.lstrip())
    return marker.group() if marker else ""


def common_length(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    low, high = 0, length
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
