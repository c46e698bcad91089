"""Text whose encoding must not change.

The first new merge that could touch a text joins two old ids that stand side by side in one of its words. So no merge
of two such ids is allowed; then none ever applies there, and merges of newer pieces find nothing to join.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from finetune.steps.tokens.learn.families import Continued
from finetune.steps.tokens.learn.symbols import Symbols, pair_keys
from finetune.steps.tokens.learn.words import WordCounter


@dataclass(frozen=True)
class Forbidden:
    """What protected text forbids: pairs of old ids (sorted keys), pieces that are a whole word of it (where a word in
    the vocabulary is one token, whatever the merges say), and characters."""

    keys: npt.NDArray[np.int64]
    words: frozenset[str] = frozenset()
    characters: frozenset[str] = frozenset()

    def pair(self, left: int, right: int) -> bool:
        """Whether these ids stand side by side in protected text."""
        key = (left << 32) | right
        place = int(np.searchsorted(self.keys, key))
        return place < self.keys.size and int(self.keys[place]) == key


NOTHING = Forbidden(np.zeros(0, np.int64))
"""When no text is protected."""


def forbidden_by(blocks: Iterable[Sequence[str]], continued: Continued) -> Forbidden:
    """What some texts forbid. Words are the tokenizer's own: where it cuts none, a whole text is one."""
    counter, symbols = WordCounter(continued, cut=""), Symbols(continued)
    keys = np.zeros(0, np.int64)
    words: set[str] = set()
    characters: set[str] = set()
    for block in blocks:
        counted = counter.count(block)
        ids = symbols.write(counted).ids
        old = (ids >= 0) & (ids < symbols.length)
        real = old[:-1] & old[1:]
        keys = np.union1d(keys, pair_keys(ids[:-1][real], ids[1:][real]))
        if continued.ignores_merges:
            words.update(counted.texts)
        if continued.family.by_characters:
            characters.update(*counted.texts)
    return Forbidden(keys, frozenset(words), frozenset(characters))
