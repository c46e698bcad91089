"""Examples to token ids and labels.

A label is the id itself where the token is learned and -100 elsewhere; the first label of an example is always -100,
since nothing predicts a first token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from finetune.api.spec import Objective
from finetune.steps.dataset.chat import ChatRenderer, Span
from finetune.steps.dataset.rows import Completion, Conversation, Example, MalformedRow

IGNORED = -100
"""The label of a token that carries no loss, as in torch and transformers."""


@dataclass
class Counts:
    """What became of the rows."""

    truncated: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Encoded:
    """One example: ids and labels of equal length."""

    ids: list[int]
    labels: list[int]

    @property
    def learned(self) -> int:
        """How many tokens carry the loss."""
        return sum(label != IGNORED for label in self.labels)


@dataclass
class Encoder:
    """Turns examples into ids and labels of at most `max_length` tokens, counting what had to go."""

    tokenizer: Any
    created: datetime
    objective: Objective
    max_length: int
    counts: Counts = field(default_factory=Counts)

    @cached_property
    def chat(self) -> ChatRenderer:
        """Made when a conversation comes: plain text needs no chat template."""
        return ChatRenderer(self.tokenizer, self.created)

    def encode(self, examples: Sequence[Example]) -> Iterator[Encoded]:
        """The examples in order, tokenised together. One example gives none, one, or (long plain text) several."""
        drafts = []
        for index, example in enumerate(examples):
            try:
                drafts.append(self._draft(example))
            except MalformedRow as error:
                error.index = index
                raise
        for example, draft, ids, offsets in zip(examples, drafts, *self._tokenise(drafts), strict=True):
            pieces = [self._labelled(ids, offsets, draft.learned)]
            if len(ids) > self.max_length:
                pieces = self._shortened(example, draft, ids, offsets)
                self.counts.truncated += bool(pieces)
            useful = [piece for piece in pieces if piece.learned]
            self.counts.dropped += not useful
            yield from useful

    def _draft(self, example: Example) -> _Draft:
        if isinstance(example, Conversation):
            text, spans = self.chat.render(example.messages, example.learned_from)
            return self._whole(_Draft(text, spans))
        prompt, answer = (example.prompt, example.completion) if isinstance(example, Completion) else ("", example.text)
        text, start = self._framed(prompt, answer)
        return self._whole(_Draft(text, [(start, len(text))]))

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

    def _tokenise(self, drafts: Sequence[_Draft]) -> tuple[list[list[int]], list[list[Span]]]:
        if not drafts:
            return [], []
        encoded = self.tokenizer(
            [draft.text for draft in drafts],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            truncation=False,
            verbose=False,
        )
        return encoded["input_ids"], encoded["offset_mapping"]

    def _labelled(self, ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span]) -> Encoded:
        """A token is learned when a part of it lies in a span, as transformers' own assistant mask has it: where the
        header ends in a space, the answer's first letter is in the token of that space."""
        labels = [IGNORED] * len(ids)
        remaining = iter(spans)
        span = next(remaining, None)
        for index, (start, end) in enumerate(offsets):
            while span and start >= span[1]:
                span = next(remaining, None)
            if span is None:
                break
            if end > span[0]:
                labels[index] = ids[index]
        labels[:1] = [IGNORED]
        return Encoded(list(ids), labels)

    def _shortened(self, example: Example, draft: _Draft, ids: list[int], offsets: list[Span]) -> list[Encoded]:
        """What is left of an example that is too long: whole turns of a conversation, pieces of a plain text under
        Pretraining, nothing of what cannot be cut without leaving half an answer."""
        if isinstance(example, Conversation):
            return self._whole_turns(example)
        if self.objective == Objective.PRETRAINING:
            whole = self._labelled(ids, offsets, draft.learned)
            cuts = range(0, len(ids), self.max_length)
            return [
                Encoded(ids[cut : cut + self.max_length], [IGNORED, *whole.labels[cut + 1 : cut + self.max_length]])
                for cut in cuts
            ]
        return []

    def _whole_turns(self, example: Conversation) -> list[Encoded]:
        """The longest beginning of the conversation that ends with an answer and fits."""
        answers = [
            index + 1
            for index, message in enumerate(example.messages[:-1])
            if message.role == "assistant" and index >= example.learned_from
        ]
        for length in reversed(answers):
            shorter = Conversation(example.messages[:length], example.learned_from)
            draft = self._draft(shorter)
            (ids,), (offsets,) = self._tokenise([draft])
            if len(ids) <= self.max_length:
                return [self._labelled(ids, offsets, draft.learned)]
        return []


@dataclass(frozen=True)
class _Draft:
    """A rendered example and the spans of it that are learned."""

    text: str
    learned: list[Span]
