"""What a grown tokenizer makes of text that it did not learn from, and of text that it must leave alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from finetune.steps.tokens.learn.families import Continued, NotLearnable
from finetune.steps.tokens.learn.parts import blocks

AT_ONCE = 200_000
"""Characters that are encoded together."""


@dataclass(frozen=True)
class Measured:
    """Characters of some text, and its tokens before and after."""

    characters: int
    before: int
    after: int


def measured(texts: Iterable[str], continued: Continued, after: Tokenizer) -> Measured:
    """Encode with both tokenizers. Raises NotLearnable when a text comes back otherwise than it did before.

    Some tokenizers drop, normalise or do not know characters: they may go on doing so, or lose less than they did.
    """
    before = continued.tokenizer
    unknown = None if continued.unknown is None else before.token_to_id(continued.unknown)
    characters = old_tokens = new_tokens = 0
    for block in blocks(texts, AT_ONCE):
        old, new = encoded(before, block), encoded(after, block)
        for text, old_ids, back, new_ids in zip(
            block, old, after.decode_batch(new, skip_special_tokens=False), new, strict=True
        ):
            characters += len(text)
            old_tokens += len(old_ids)
            new_tokens += len(new_ids)
            if back != text and unknown not in old_ids and back != before.decode(old_ids, skip_special_tokens=False):
                raise NotLearnable(f"with the learned pieces {text[:80]!r} would come back as {back[:80]!r}")
    return Measured(characters, old_tokens, new_tokens)


def changed(texts: Iterable[str], before: Tokenizer, after: Tokenizer) -> Iterator[tuple[str, list[int]]]:
    """Texts that the two encode differently, with their new ids."""
    for block in blocks(texts, AT_ONCE):
        for text, old, new in zip(block, encoded(before, block), encoded(after, block), strict=True):
            if old != new:
                yield text, new


def encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids without the tokens that a template adds."""
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
