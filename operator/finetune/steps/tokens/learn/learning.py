"""From a corpus to a grown tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from finetune.steps.tokens.byte_level import text_of_bytes
from finetune.steps.tokens.learn.families import MARKER, Continued, Family, NotLearnable
from finetune.steps.tokens.learn.greedy import JoinedText, Piece, find_pieces, framed
from finetune.steps.tokens.learn.grown import Growth, grown
from finetune.steps.tokens.learn.held_out import Measured, changed, measured
from finetune.steps.tokens.learn.parts import blocks, held_out_parts, training_parts
from finetune.steps.tokens.learn.protect import NOTHING, forbidden_by
from finetune.steps.tokens.learn.symbols import Symbols
from finetune.steps.tokens.learn.unigram import scored, without_effect_on
from finetune.steps.tokens.learn.watch import Watch
from finetune.steps.tokens.learn.words import WordCounter, Words

BLOCK = 4_000_000
"""Characters whose words are counted together. Words that occur in several blocks are kept several times."""

log = logging.getLogger(__name__)


class NothingHeldOut(ValueError):
    """The corpus is too small to keep a tenth of it for the measurement."""


@dataclass(frozen=True)
class Learned:
    """The grown tokenizer, its new pieces in the order of their ids from `first_id` on, and what they do to held-out
    text; `protected` counts the characters that were proven to be encoded as before."""

    tokenizer: Tokenizer
    family: Family
    first_id: int
    pieces: Sequence[Piece]
    held_out: Measured
    protected: int | None

    def content(self, piece: Piece) -> str:
        """The text of a piece; its name where it is a part of a character's bytes."""
        if self.family == Family.BYTE_LEVEL:
            return text_of_bytes(piece.name) or piece.name
        return piece.name.replace(MARKER, " ")


def learn(
    tokenizer: Tokenizer,
    corpus: Iterable[str],
    protected: Iterable[str] | None,
    size: int,
    minimum: int,
    watch: Watch = lambda done, total: None,
) -> Learned:
    """Continue the tokenizer on a corpus (read several times) by at most `size` pieces that save at least `minimum`
    tokens each, without touching protected text. `watch` is told how many pieces are found.

    Raises NotLearnable for a tokenizer that cannot be continued, NothingHeldOut for a corpus of less than ten parts.
    """
    continued = Continued.of(tokenizer)
    if next(held_out_parts(corpus), None) is None:
        raise NothingHeldOut("a tenth of the corpus is held out to measure on, and it has less than ten texts")
    forbidden = NOTHING
    if protected is not None and continued.family != Family.UNIGRAM:
        forbidden = forbidden_by(blocks(protected, BLOCK), continued)
    symbols, counter = Symbols(continued), WordCounter(continued, continued.cut_pattern())

    def words() -> Iterator[Words]:
        return map(counter.count, blocks(training_parts(corpus), BLOCK))

    ids, weights, tokens = [], [], 0
    for block in words():
        written = symbols.write(block)
        ids.append(written.ids)
        weights.append(written.weights)
        tokens += written.tokens
    log.info("learning from %d tokens, %d of them in words that can save some", tokens, sum(map(len, ids)))
    text = JoinedText(framed(ids), framed(weights), len(symbols.names))
    found = find_pieces(text, symbols, forbidden, size, minimum, watch)
    del text
    pieces: Sequence[Piece] = found.pieces
    growth = Growth([piece.name for piece in pieces], found.merges)
    if continued.family == Family.UNIGRAM:
        pieces, growth = scored(continued, found, words, symbols.length, tokens - found.saved, minimum)
        if protected is not None:
            pieces, growth = without_effect_on(protected, continued, pieces, growth, symbols.length)
    after = grown(continued, growth)
    log.info("%d pieces learned", len(pieces))
    return Learned(
        after,
        continued.family,
        symbols.length,
        pieces,
        measured(held_out_parts(corpus), continued, after),
        None if protected is None else _proven(protected, tokenizer, after),
    )


def _proven(protected: Iterable[str], before: Tokenizer, after: Tokenizer) -> int:
    for text, _ in changed(protected, before, after):
        raise NotLearnable(f"the protected text {text[:80]!r} would be encoded differently")
    return sum(map(len, protected))
