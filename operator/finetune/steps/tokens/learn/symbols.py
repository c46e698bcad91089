"""Words written as ids: the tokenizer's own encoding, in one flat array that numpy can search.

Ids below `Symbols.length` are the tokenizer's. Characters that it does not know get numbers from there on: candidates,
which count for nothing until they are taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from finetune.steps.tokens.learn.families import Continued, Family
from finetune.steps.tokens.learn.grown import Growth, lowest_score, model_alone
from finetune.steps.tokens.learn.words import Words

GAP = -1
"""Stands behind each word, and for ids that are never joined: bytes of a character, the unknown token."""

AT_ONCE = 20_000
"""Words that are encoded together; an encoding takes some hundred bytes for each id."""

Ids = npt.NDArray[np.int32]
Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Written:
    """Words as ids with a gap behind each; the weight of an id is how often its word occurs.

    `tokens` counts the ids of all words, those that cannot save a token and are left out included.
    """

    ids: Ids
    weights: Ids
    tokens: int


def pair_keys(left: Ids | int, right: Ids | int) -> npt.NDArray[np.int64]:
    """Pairs of ids as one number each, ordered by the left id, then by the right."""
    return (np.asarray(left, np.int64) << 32) | np.asarray(right, np.int64)


class Symbols:
    """Encodes words by the tokenizer's model alone: they are normalised and cut already."""

    def __init__(self, continued: Continued) -> None:
        ids = continued.tokenizer.get_vocab(with_added_tokens=True)
        self.length = max(ids.values(), default=-1) + 1
        self.names = [""] * self.length
        for name, id_ in ids.items():
            self.names[id_] = name
        self._known = set(self.names)
        self._continued = continued
        self._joinable = np.ones(self.length, bool)
        self._joinable[[ids[name] for name in _never_joined(continued) if name in ids]] = False
        self._model = model_alone(continued)

    def parts_of(self, character: str) -> tuple[int, ...]:
        """The ids that stand for an unknown character so far; none where it is simply lost."""
        ids = (self._continued.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in character.encode())
        falls_back = self._continued.document["model"].get("byte_fallback")
        return tuple(int(id_) for id_ in ids if id_ is not None) if falls_back else ()

    def write(self, words: Words) -> Written:
        """The words that can save a token: those of several ids, or with an unknown character."""
        if self._continued.family.by_characters:
            self._meet(words)
        ids, weights, tokens = [], [], 0
        for flat, lengths, counts in encoded_words(self._model, words):
            tokens += int(lengths @ counts)
            unknown = np.zeros(lengths.size, bool)
            unknown[np.repeat(np.arange(lengths.size), lengths)[flat >= self.length]] = True
            part = _with_gaps(flat, lengths, counts, (lengths > 1) | unknown)
            ids.append(part[0])
            weights.append(part[1])
        joined = np.concatenate([np.zeros(0, np.int32), *ids])
        old = (joined >= 0) & (joined < self.length)
        joined[old] = np.where(self._joinable[joined[old]], joined[old], GAP)
        return Written(joined, np.concatenate([np.zeros(0, np.int32), *weights]), tokens)

    def _meet(self, words: Words) -> None:
        if met := set().union(*words.texts) - self._known:
            self.names.extend(sorted(met))
            self._known |= met
            characters = self.names[self.length :]
            unigram = self._continued.family == Family.UNIGRAM
            scores = [lowest_score(self._continued)] * len(characters) if unigram else []
            self._model = model_alone(self._continued, Growth(characters, scores=scores))


def encoded_words(model: Tokenizer, words: Words) -> Iterator[tuple[Ids, Lengths, Ids]]:
    """The ids of words one after the other, how many each word has, and how often it occurs; some words at a time."""
    for first in range(0, len(words.texts), AT_ONCE):
        texts = words.texts[first : first + AT_ONCE]
        encoded = [encoding.ids for encoding in model.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        flat = np.fromiter(itertools.chain.from_iterable(encoded), np.int32, int(lengths.sum()))
        yield flat, lengths, np.asarray(words.counts[first : first + AT_ONCE], np.int32)


def _never_joined(continued: Continued) -> set[str]:
    model = continued.document["model"]
    names = {f"<0x{byte:02X}>" for byte in range(256)} if model.get("byte_fallback") else set()
    return names | set(continued.added) | ({continued.unknown} if continued.unknown else set())


def _with_gaps(flat: Ids, lengths: Lengths, counts: Ids, keep: npt.NDArray[np.bool_]) -> tuple[Ids, Ids]:
    """The kept words' ids and weights, each word followed by a gap of weight 0."""
    ids, lengths = flat[np.repeat(keep, lengths)], lengths[keep]
    places = np.arange(ids.size) + np.repeat(np.arange(lengths.size), lengths)
    spaced = np.full(ids.size + lengths.size, GAP, np.int32)
    weights = np.zeros(spaced.size, np.int32)
    spaced[places] = ids
    weights[places] = np.repeat(counts[keep], lengths)
    return spaced, weights
