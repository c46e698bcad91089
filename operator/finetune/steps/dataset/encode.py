"""Examples to token ids, and which of them carry the loss.

Rendering is Python's work and tokenising is Rust's, which lets go of the interpreter's lock: while one batch is
tokenised, the next is rendered.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from typing import Any

from finetune.api.spec import Mask, Objective
from finetune.steps.dataset.chat import ChatRenderer, Told
from finetune.steps.dataset.colossal import Colossal
from finetune.steps.dataset.span import Span
from finetune.steps.dataset.tokenised import Tokenised, Tokeniser
from finetune.steps.rows.formats import Completion, Conversation, Example
from finetune.steps.rows.messages import MalformedRow
from finetune.steps.workspace.training_data import IGNORED


class Dropped(StrEnum):
    """Why a row gives no example."""

    TOO_LONG = "TooLong"
    NOTHING_TO_LEARN = "NothingToLearn"


class Truncated(StrEnum):
    """How a row was made to fit."""

    LOST_TURNS = "LostTurns"
    CUT_INTO_PIECES = "CutIntoPieces"


@dataclass
class Counts:
    """What became of rows that could not be taken as they are."""

    truncated: Counter[Truncated] = field(default_factory=Counter)
    dropped: Counter[Dropped] = field(default_factory=Counter)
    turns: Counter[Told] = field(default_factory=Counter)
    """Of the assistant, in the rows that were taken."""

    shortest: int | None = None
    """Tokens of the shortest row that was too long."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example: its ids, and the spans of them that carry the loss (in order, never with the first token, which
    nothing predicts). `row` is the place, among the rows encoded together, that it comes from."""

    row: int
    ids: list[int]
    learned: tuple[Span, ...]

    @property
    def labels(self) -> list[int]:
        """The id itself where a token carries the loss, and `IGNORED` elsewhere."""
        labels = [IGNORED] * len(self.ids)
        for start, end in self.learned:
            labels[start:end] = self.ids[start:end]
        return labels


@dataclass(frozen=True, slots=True)
class _Draft:
    """A rendered example: its text, the spans of it that carry the loss, ids that stand before the text's own, and a
    beginning of the text that is tokenised by itself as well, to mask as many tokens as it has."""

    text: str
    learned: Sequence[Span]
    opening: tuple[int, ...] = ()
    masked: str = ""
    turns: Counter[Told] = field(default_factory=Counter)


Drafts = tuple[Sequence[Example], list[_Draft]]


@dataclass
class Encoder:
    """Turns examples into ids and learned spans of at most `max_length` tokens, counting what had to go."""

    tokenizer: Any
    created: datetime
    objective: Objective
    max_length: int
    mask: Mask = Mask.ASSISTANT
    counts: Counts = field(default_factory=Counts)
    unused: set[str] = field(default_factory=set)

    @cached_property
    def chat(self) -> ChatRenderer:
        """Made when a conversation comes: plain text needs no chat template."""
        return ChatRenderer(self.tokenizer, self.created)

    @property
    def unused_fields(self) -> set[str]:
        """Fields of messages, so far, of which nothing was made."""
        return self.unused | (self.chat.unused if "chat" in self.__dict__ else set())

    @cached_property
    def colossal(self) -> Colossal | None:
        return Colossal(self.tokenizer) if self.mask == Mask.COLOSSAL else None

    def encode(self, batches: Iterable[Sequence[Example]]) -> Iterator[list[Encoded]]:
        """Each batch of examples, encoded. A row gives none, one, or (long plain text) several."""
        with ThreadPoolExecutor(1, thread_name_prefix="tokenise") as thread:
            pending: tuple[Drafts, Future[list[Tokenised]]] | None = None
            for examples in batches:
                drafts = self._drafts(examples)
                future = thread.submit(self._tokenised, drafts)
                if pending:
                    yield self._encoded(pending[0], pending[1].result())
                pending = (examples, drafts), future
            if pending:
                yield self._encoded(pending[0], pending[1].result())

    def _drafts(self, examples: Sequence[Example]) -> list[_Draft]:
        drafts = []
        for index, example in enumerate(examples):
            try:
                drafts.append(self._draft(example))
            except MalformedRow as error:
                error.index = index
                raise
        return drafts

    def _draft(self, example: Example) -> _Draft:
        if self.colossal:
            return self._colossal_draft(self.colossal, example)
        if isinstance(example, Conversation):
            rendered = self.chat.render(example, all_learned=self.objective == Objective.PRETRAINING)
            return _Draft(rendered.text, rendered.learned, turns=rendered.turns)
        prompt, answer = _texts(example)
        text, start = self._framed(prompt, answer)
        return self._whole(_Draft(text, [(start, len(text))]))

    def _colossal_draft(self, colossal: Colossal, example: Example) -> _Draft:
        if isinstance(example, Conversation):
            if example.tools or example.variables:
                raise MalformedRow("the row has tools or chat_template_kwargs; mask Colossal has no place for them")
            text, spans = colossal.conversation(example.messages, example.learned_from)
            self.unused.update(f"messages[].{name}" for message in example.messages for name in message.more)
            return _Draft(text, spans, opening=colossal.opening)
        text, masked = colossal.pair(*_texts(example))
        return _Draft(text, [(0, len(text))], masked=masked)

    def _whole(self, draft: _Draft) -> _Draft:
        """Continued pre-training masks nothing."""
        return _Draft(draft.text, [(0, len(draft.text))]) if self.objective == Objective.PRETRAINING else draft

    def _framed(self, prompt: str, answer: str) -> tuple[str, int]:
        """A plain text as a document: begun as this tokenizer begins texts, ended by its end token, each of them once.
        Also where in it the answer starts."""
        bos, eos = self._beginning, self.tokenizer.eos_token or ""
        if bos and (prompt + answer).startswith(bos):
            bos = ""
        if eos and answer.rstrip().endswith(eos):
            eos = ""
        return bos + prompt + answer + eos, len(bos) + len(prompt)

    @cached_property
    def _beginning(self) -> str:
        first = self.tokenizer("", add_special_tokens=True)["input_ids"][:1]
        return str(self.tokenizer.bos_token) if first and first[0] == self.tokenizer.bos_token_id else ""

    @cached_property
    def _tokeniser(self) -> Tokeniser:
        return Tokeniser(self.tokenizer.backend_tokenizer)

    def _tokenised(self, drafts: Sequence[_Draft]) -> list[Tokenised]:
        """The drafts' texts, then those of their masked beginnings that there are."""
        masked = [draft.masked for draft in drafts if draft.masked]
        texts = [draft.text for draft in drafts] + masked
        return self._tokeniser(texts, [draft.learned for draft in drafts] + [()] * len(masked))

    def _encoded(self, batch: Drafts, tokenised: Sequence[Tokenised]) -> list[Encoded]:
        examples, drafts = batch
        masked = iter(tokenised[len(drafts) :])
        encoded: list[Encoded] = []
        for row, (example, draft) in enumerate(zip(examples, drafts, strict=True)):
            whole = self._example(row, draft, tokenised[row], len(next(masked).ids) if draft.masked else 0)
            fitted = self._fitted(example, whole)
            if draft.turns and whole in fitted:
                self.counts.turns += draft.turns
            encoded += fitted
        return encoded

    def _example(self, row: int, draft: _Draft, tokenised: Tokenised, masked: int) -> Encoded:
        before = len(draft.opening)
        ids = [*draft.opening, *tokenised.ids] if before else tokenised.ids
        spans: list[Span] = []
        for start, end in tokenised.spans:
            start = max(start + before, masked, spans[-1][1] if spans else 1)
            if start < end + before:
                spans.append((start, end + before))
        return Encoded(row, ids, tuple(spans))

    def _fitted(self, example: Example, whole: Encoded) -> Sequence[Encoded]:
        """What is left of an example: whole turns of a conversation that is too long, pieces of such a plain text under
        Pretraining, nothing of what cannot be cut without leaving half an answer."""
        unpaired = self.colossal and isinstance(example, Conversation) and len(example.messages) % 2
        if len(whole.ids) <= self.max_length and not unpaired:
            return self._useful([whole])
        if not whole.learned:
            return self._useful([])
        pieces: Sequence[Encoded] = []
        if isinstance(example, Conversation):
            pieces, how = self._whole_turns(whole.row, example), Truncated.LOST_TURNS
        elif self.objective == Objective.PRETRAINING:
            pieces, how = self._pieces(whole), Truncated.CUT_INTO_PIECES
        if pieces:
            self.counts.truncated[how] += 1
            return self._useful(pieces)
        self.counts.dropped[Dropped.TOO_LONG] += 1
        self.counts.shortest = min(len(whole.ids), self.counts.shortest or len(whole.ids))
        return []

    def _useful(self, pieces: Sequence[Encoded]) -> Sequence[Encoded]:
        useful = [piece for piece in pieces if piece.learned]
        if not useful:
            self.counts.dropped[Dropped.NOTHING_TO_LEARN] += 1
        return useful

    def _pieces(self, whole: Encoded) -> list[Encoded]:
        pieces = []
        for cut in range(0, len(whole.ids), self.max_length):
            ids = whole.ids[cut : cut + self.max_length]
            spans = ((max(start - cut, 1), min(end - cut, len(ids))) for start, end in whole.learned)
            pieces.append(Encoded(whole.row, ids, tuple(span for span in spans if span[0] < span[1])))
        return pieces

    def _whole_turns(self, row: int, example: Conversation) -> list[Encoded]:
        """The longest beginning of the conversation that fits and ends with an answer; a whole number of pairs of turns
        by Colossal's rule."""
        if self.colossal:
            ends = list(range(2, len(example.messages) + 1, 2))
        else:
            messages = example.messages[:-1]
            ends = [
                index + 1
                for index, message in enumerate(messages)
                if message.role == "assistant" and index >= example.learned_from
            ]

        def beginning(end: int) -> tuple[Encoded, _Draft] | None:
            """None where the chat template does not take so much of it."""
            try:
                draft = self._draft(replace(example, messages=example.messages[:end]))
            except MalformedRow:
                return None
            return self._example(row, draft, self._tokenised([draft])[0], 0), draft

        def length(end: int) -> int:
            found = beginning(end)
            return len(found[0].ids) if found else 0

        for end in reversed(ends[: bisect_right(ends, self.max_length, key=length)]):
            if (found := beginning(end)) and len(found[0].ids) <= self.max_length:
                self.counts.turns += found[1].turns
                return [found[0]]
        return []


def _texts(example: Example) -> tuple[str, str]:
    """What comes before the learned text, and that."""
    assert not isinstance(example, Conversation)
    return (example.prompt, example.completion) if isinstance(example, Completion) else ("", example.text)
