"""Where in a rendered conversation the assistant speaks.

The ids come from the chat template's whole text, exactly as inference would make them. Which of them are learned is
decided on characters: all that the model would have to write itself, from the end of the generation prompt to the
marker that ends its turn.

How a template frames a plain answer is learned from a conversation of single characters. A conversation of plain
questions and answers then needs one rendering: its end must be, character for character, what the frames say. Others
are compared with renderings in which one turn's own texts are put between characters that occur nowhere else: what
differs is the turn's own, whatever the template does with other turns. In the end every turn's text is looked for in
the part that is learned; a turn that the template leaves something out of is refused, or counted where it is an earlier
thought, which templates leave out by design.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from itertools import cycle
from typing import Any

from finetune.api.contract import ExitCode
from finetune.steps.dataset.chat_template import ChatTemplate
from finetune.steps.dataset.frames import Frames, common_length
from finetune.steps.dataset.said import SAID, SIGNS, answers_of, marked, shows, thoughts_of
from finetune.steps.dataset.span import Span
from finetune.steps.rows.formats import Conversation
from finetune.steps.rows.messages import MalformedRow, Message
from finetune.steps.runtime.failure import StepFailure

REMEDY = "Give spec.model.chatTemplate a template that shows it, or take it out of the rows."


class Told(StrEnum):
    """What became of a turn of the assistant that is not simply learned as it stands."""

    NOT_TO_LEARN = "MarkedNotToLearn"
    THOUGHT_LEFT_OUT = "ThoughtLeftOut"
    NOT_AS_PROMPTED = "NotAsPrompted"
    OTHER_END = "OtherEndMarker"
    NO_END = "NoEndMarker"


class NotShown(MalformedRow):
    """The chat template leaves out something that a row says, or nobody can tell where it is."""

    hint = REMEDY


@dataclass
class Rendered:
    """A conversation's text, the spans of it that are learned, in order, and what is to be told of its turns."""

    text: str
    learned: list[Span] = field(default_factory=list)
    turns: Counter[Told] = field(default_factory=Counter)


class ChatRenderer:
    """Renders conversations with the tokenizer's chat template and finds what the assistant says in them."""

    def __init__(self, tokenizer: Any, created: datetime) -> None:
        """`created` is the date that templates print: the job's, so that a second run gives the same ids."""
        if not tokenizer.chat_template:
            raise StepFailure(
                ExitCode.BAD_CONFIGURATION,
                "NoChatTemplate",
                "spec.model: its tokenizer has no chat template, and the dataset holds conversations",
                "Use an instruction-tuned model, give spec.model.chatTemplate, or "
                "spec.dataset.sources[].template.text for plain text.",
            )
        self._tokenizer, self._created = tokenizer, created
        self.unused: set[str] = set()
        """What rows gave to the template and the template does not read."""

    def render(self, conversation: Conversation, *, all_learned: bool = False) -> Rendered:
        """The conversation as the template writes it. With `all_learned` nobody asks who speaks.

        Raises NotShown when something of it is missing in the text.
        """
        located = self._with_tools if conversation.tools else self._plain
        read = located.template.names
        for message in conversation.messages:
            if message.more:
                self.unused.update(f"messages[].{name}" for name in message.more if not read(name))
        if conversation.tools and not read("tools"):
            self.unused.add("tools")
        if conversation.variables:
            self.unused.update(f"chat_template_kwargs.{name}" for name in conversation.variables if not read(name))
        return located.whole(conversation) if all_learned else located.rendered(conversation)

    @cached_property
    def _plain(self) -> _Locator:
        return self._locator(self._tokenizer.get_chat_template())

    @cached_property
    def _with_tools(self) -> _Locator:
        """Some models have a template of its own for conversations with tools."""
        template = self._tokenizer.get_chat_template(tools=[{}])
        return self._plain if template == self._plain.template.source else self._locator(template)

    def _locator(self, source: str) -> _Locator:
        tokenizer = self._tokenizer
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        template = ChatTemplate(source, tokenizer.special_tokens_map, self._created)
        return _Locator(template, _alternatives([*special, str(tokenizer.eos_token or "")]), tokenizer.eos_token or "")


@dataclass
class _Locator:
    """Finds turns in what one template writes; `special` matches special tokens."""

    template: ChatTemplate
    special: re.Pattern[str]
    eos: str

    @cached_property
    def frames(self) -> Frames | None:
        """None where the template refuses plain conversations."""
        return Frames.of(self.template, self.special, self.eos)

    def whole(self, conversation: Conversation) -> Rendered:
        """The text; whatever a row says must be in it."""
        if marks := [index for index, message in enumerate(conversation.messages) if not message.learned]:
            error = MalformedRow(
                f"turn {marks[0] + 1} is marked as not to be learned, and Pretraining learns everything"
            )
            error.hint = "Use objective Supervised, or remove weight, train and loss from the rows."
            raise error
        text = self._text(conversation)
        return Rendered(text, [(0, len(text))], self._checked(conversation, text, {}))

    def rendered(self, conversation: Conversation) -> Rendered:
        """The text, and the turns in it."""
        messages, tools, variables = conversation.messages, conversation.tools, conversation.variables
        text, marks = self.template.generated(messages, tools, variables)
        framed = self._as_framed(conversation, text)
        found = framed or self._compared(conversation, text)
        if self.template.marks_generation:
            self._narrow(found, marks)
        if framed is None:
            found.told += self._checked(conversation, found.text, found.learned)
        elif self.template.marks_generation:
            for index, spans in framed.learned.items():
                self._shown(conversation, index, text, spans)
        return found.rendered

    def _compared(self, conversation: Conversation, text: str) -> _Found:
        """Every turn by itself, found by comparing renderings."""
        found = _Found(text)
        for index in _learned_turns(conversation, found.told):
            turn = _Turn(self, conversation, index, found.text)
            found.learned[index], found.text = [turn.span], turn.text
            found.told.update(turn.told)
        return found

    def _text(self, conversation: Conversation) -> str:
        return self.template.render(conversation.messages, conversation.tools, conversation.variables)

    def _without_tools(self, conversation: Conversation) -> str:
        """Nothing where the template insists on them."""
        try:
            return self._text(replace(conversation, tools=()))
        except MalformedRow:
            return ""

    # ---- plain conversations: one rendering

    def _as_framed(self, conversation: Conversation, text: str) -> _Found | None:
        """What the frames say, if the text ends exactly so."""
        messages = conversation.messages
        first = 1 if messages[0].role == "system" else 0
        turns = messages[first:]
        plain = (
            not conversation.tools
            and not conversation.variables
            and len(turns) % 2 == 0
            and all(
                message.role == role
                and isinstance(message.content, str)
                and "think>" not in message.content
                and not (message.more and any(name in SAID or self.template.names(name) for name in message.more))
                for role, message in zip(cycle(("user", "assistant")), turns)
            )
        )
        if not plain or self.frames is None or (self.template.marks_generation and self.frames.appended):
            return None
        if first and not (isinstance(messages[0].content, str) and shows(text, messages[0].content)):
            return None
        for stripped in (False, True):
            contents = [message.text.strip() if stripped else message.text for message in turns]
            expected, spans = self.frames.written(contents)
            if text.endswith(expected.removesuffix(self.frames.appended)):
                found = _Found(text + self.frames.appended)
                begin = len(found.text) - len(expected)
                for index in _learned_turns(conversation, found.told):
                    start, end = spans[(index - first) // 2]
                    found.learned[index] = [(begin + start, begin + end)]
                if len(messages) - 1 in found.learned and not self.frames.as_prompted:
                    found.told[Told.NOT_AS_PROMPTED] += 1
                return found
        return None

    # ---- templates that mark what is generated

    def _narrow(self, found: _Found, marks: Sequence[Span]) -> None:
        """To what the template marks of each turn, and the turn's end where it is left outside."""
        for index, ((start, end),) in found.learned.items():
            spans = [(max(start, first), min(end, last)) for first, last in marks if first < end and last > start]
            if spans and spans[-1][1] < end and not self.special.sub("", found.text[spans[-1][1] : end]).strip():
                spans[-1] = spans[-1][0], end
            found.learned[index] = spans

    # ---- the check

    def _checked(self, conversation: Conversation, text: str, learned: dict[int, list[Span]]) -> Counter[Told]:
        told = Counter[Told]()
        messages = conversation.messages
        if conversation.tools and self.template.names("tools") and self._without_tools(conversation) == text:
            raise NotShown("the chat template does not show the functions of column tools")
        for index, message in enumerate(messages):
            spans = learned.get(index)
            region = self._shown(conversation, index, text, spans)
            if message.role != "assistant" or all(shows(region, thought) for thought in thoughts_of(message)):
                continue
            if spans is not None and all(later.role != "user" for later in messages[index:]):
                raise NotShown(
                    f"turn {index + 1}: the chat template leaves out what the assistant thinks: "
                    f"{_short(thoughts_of(message)[0])}"
                )
            told[Told.THOUGHT_LEFT_OUT] += 1
        return told

    def _shown(self, conversation: Conversation, index: int, text: str, spans: Sequence[Span] | None) -> str:
        """The part of the text that is the turn's, all of it where it is not learned; the turn's answer is in it."""
        message = conversation.messages[index]
        region = text if spans is None else "".join([text[start:end] for start, end in spans])
        for said in answers_of(message):
            if not shows(region, said):
                how = "does not mark as generated" if shows(text, said) else "leaves out"
                raise NotShown(
                    f"turn {index + 1}: the chat template {how} what the {message.role} says: {_short(said)}"
                )
        return region


@dataclass
class _Found:
    """A text, the spans of it that are each turn's, and what is to be told."""

    text: str
    learned: dict[int, list[Span]] = field(default_factory=dict)
    told: Counter[Told] = field(default_factory=Counter)

    @property
    def rendered(self) -> Rendered:
        return Rendered(self.text, [span for spans in self.learned.values() for span in spans], self.told)


def _learned_turns(conversation: Conversation, told: Counter[Told]) -> Iterator[int]:
    """The assistant's turns that are to be learned. Of those that are marked not to be, it is told."""
    for index, message in enumerate(conversation.messages):
        if message.role == "assistant" and index >= conversation.learned_from:
            if message.learned:
                yield index
            else:
                told[Told.NOT_TO_LEARN] += 1


class _Turn:
    """One turn of the assistant, found by comparing renderings."""

    def __init__(self, locator: _Locator, conversation: Conversation, index: int, text: str) -> None:
        self._locator, self._conversation, self._index = locator, conversation, index
        self._messages = conversation.messages
        self.text = text
        self.told: list[Told] = []
        unused = [sign for sign in SIGNS if sign not in text]
        if not unused:
            raise NotShown("the text holds too many characters for private use to find the turns by one")
        self._sign = unused[0]
        first, last = self._own(index, self._messages, text)
        start = self._start(first)
        self.span = (start, self._end(last, start))

    def _render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        tools, variables = self._conversation.tools, self._conversation.variables
        return self._locator.template.render(messages, tools, variables, prompt=prompt)

    def _own(self, index: int, messages: Sequence[Message], text: str) -> Span:
        """Where the first of a turn's own texts begins, and where the last one ends."""
        for names in (False, True):
            turn = marked(messages[index], self._sign, names=names)
            other = self._render([*messages[:index], turn, *messages[index + 1 :]])
            if other != text:
                break
        else:
            raise NotShown(f"turn {index + 1}: the chat template leaves out what the {messages[index].role} says")
        first = common_length(text, other)
        last = len(text) - common_length(text[::-1], other[::-1])
        return first, max(first, last)

    def _start(self, first: int) -> int:
        index, text, frames = self._index, self.text, self._locator.frames
        before = ""
        headers = list(frames.headers) if frames else []
        floor = 0
        if index:
            try:
                before = self._render(self._messages[:index], prompt=True)
                if text.startswith(before, 0, first):
                    return self._behind_header(headers, len(before), first)
                unasked = self._render(self._messages[:index])
            except MalformedRow:
                before = unasked = ""
            headers = [header for header in (before[common_length(before, unasked) :], *headers) if header]
            floor = self._own(index - 1, self._messages, text)[1] if self._messages[index - 1].text else 0
        for header in headers:
            at = text.rfind(header, floor, first)
            if at >= 0:
                if header != headers[0] and self._is_last:
                    self.told.append(Told.NOT_AS_PROMPTED)
                return at + len(header)
        if not self._messages[index].more and (not index or not headers):
            return first
        raise NotShown(
            f"turn {index + 1}: the chat template writes no beginning of it that could be told from the rest"
        )

    def _behind_header(self, headers: Sequence[str], start: int, first: int) -> int:
        """Some templates ask for a further answer without a header, and write one."""
        return max([start, *(at + len(each) for each in headers if (at := self.text.rfind(each, start, first)) >= 0)])

    def _other_end(self, marker: str) -> None:
        frames = self._locator.frames
        if frames and not frames.ends_by_next and marker not in frames.ends:
            self.told.append(Told.OTHER_END)

    @property
    def _is_last(self) -> bool:
        return all(message.role != "user" for message in self._messages[self._index :])

    def _end(self, last: int, start: int) -> int:
        """After the marker that ends the turn: of what follows its own texts and belongs to it, the known end, else the
        last special token; else the next turn's opening, where that is what stops the model."""
        index, text, special, frames = self._index, self.text, self._locator.special, self._locator.frames
        ends = frames.ends if frames else ()
        if at_once := [end for end in ends if end and text.startswith(end, last)]:
            return last + len(at_once[0])
        messages = self._messages[: index + 1]
        alone = text if len(messages) == len(self._messages) else self._render(messages)
        tail = alone[last if alone is text else self._own(index, messages, alone)[1] :]
        limit = last + common_length(text[last:], tail)
        if known := [at + len(end) for end in ends if end and (at := text.find(end, last, limit)) >= 0]:
            return min(known)
        by_next = frames is not None and frames.ends_by_next
        if not by_next and (found := list(special.finditer(text, last, limit))):
            self._other_end(found[-1].group())
            return found[-1].end()
        following = special.match(text, _skip_space(text, limit if by_next else last))
        if following and not (frames and any(header.startswith(following.group()) for header in frames.headers)):
            self._other_end(following.group())
            return following.end()
        if limit == len(text) and (marker := self._opening_of_next()):
            self.text += marker
            return len(self.text)
        if frames or limit == last:
            self.told.append(Told.NO_END)
        return max(len(text[:limit].rstrip()), last, start)

    def _opening_of_next(self) -> str:
        """What stops the model after the last turn, where the template writes no end there."""
        frames, message = self._locator.frames, self._messages[self._index]
        if frames is None:
            return self._locator.eos
        if frames.ends_by_next and "tool_calls" in message.more:
            try:
                more = self._render([*self._messages, Message("tool", "0")])
            except MalformedRow:
                return frames.appended
            following = self._locator.special.match(more, _skip_space(more, len(self.text)))
            if more.startswith(self.text) and following:
                return following.group()
        return frames.appended


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _alternatives(markers: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted({marker for marker in markers if marker}, key=lambda marker: (-len(marker), marker))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
