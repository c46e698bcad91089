"""Scores for the pieces of a Unigram tokenizer, learned on the corpus that the pieces come from.

A score is the logarithm of a piece's share of all tokens, counted in the segmentation that the former scores lead to
(hard expectation maximisation; T. Kudo, "Subword Regularization", 2018). Old scores stay, so old text is cut as before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer

from finetune.steps.tokens.learn.families import Continued
from finetune.steps.tokens.learn.greedy import Found, Piece
from finetune.steps.tokens.learn.grown import Growth, grown, lowest_score, model_alone
from finetune.steps.tokens.learn.held_out import changed
from finetune.steps.tokens.learn.symbols import encoded_words
from finetune.steps.tokens.learn.words import Words

ROUNDS = 2


def scored(
    continued: Continued, found: Found, words: Callable[[], Iterable[Words]], length: int, tokens: int, minimum: int
) -> tuple[list[Piece], Growth]:
    """The pieces that are used where they compete with the old ones, with their scores.

    `words` gives the corpus, which has so many `tokens` with all pieces in use; ids of pieces start at `length`.
    """
    lowest = lowest_score(continued)
    pieces, counts = list(found.pieces), np.asarray(found.counts, np.int64)
    for _ in range(ROUNDS):
        growth = _growth(pieces, counts, tokens, lowest)
        counts, tokens = _used(model_alone(continued, growth), words(), length, len(pieces))
        useful = np.array(
            [count * max(len(piece.parts) - 1, 1) >= minimum for piece, count in zip(pieces, counts, strict=True)], bool
        )
        pieces, counts = [piece for piece, keep in zip(pieces, useful, strict=True) if keep], counts[useful]
    return pieces, _growth(pieces, counts, tokens, lowest)


def without_effect_on(
    texts: Iterable[str], continued: Continued, pieces: Sequence[Piece], growth: Growth, length: int
) -> tuple[list[Piece], Growth]:
    """The pieces that no protected text uses. Without some, others may come up; so it is looked again until none is."""
    pieces, scores = list(pieces), list(growth.scores)
    while True:
        growth = Growth([piece.name for piece in pieces], scores=scores)
        used = {id_ for _, ids in changed(texts, continued.tokenizer, grown(continued, growth)) for id_ in ids}
        keep = [length + index not in used for index in range(len(pieces))]
        if all(keep):
            return pieces, growth
        pieces = [piece for piece, kept in zip(pieces, keep, strict=True) if kept]
        scores = [score for score, kept in zip(scores, keep, strict=True) if kept]


def _growth(pieces: Sequence[Piece], counts: Iterable[int], tokens: int, lowest: float) -> Growth:
    scores = [max(math.log(max(int(count), 1) / max(tokens, 1)), lowest) for count in counts]
    return Growth([piece.name for piece in pieces], scores=scores)


def _used(model: Tokenizer, blocks: Iterable[Words], length: int, pieces: int) -> tuple[np.ndarray, int]:
    """How often each new piece occurs in the corpus, and how many tokens that has."""
    counts, tokens = np.zeros(length + pieces, np.int64), 0
    for words in blocks:
        for flat, lengths, occurrences in encoded_words(model, words):
            weights = np.repeat(occurrences.astype(np.int64), lengths)
            tokens += int(weights.sum())
            np.add.at(counts, flat, weights)
    return counts[length:], tokens
