"""Words with their counts, as a tokenizer sees them: normalised, cut, without added tokens.

The library's own trainers count words in compiled code, on all processors, and show them in their pickled state. So a
trainer of the simplest model is fed with the text and read instead of used.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from finetune.steps.tokens.learn.families import Continued


@dataclass(frozen=True)
class Words:
    """Distinct words in sorted order, and how often each occurs."""

    texts: Sequence[str]
    counts: Sequence[int]


class WordCounter:
    """Counts the words of texts. `cut` is a pattern for words within the tokenizer's own ones; empty keeps those."""

    def __init__(self, continued: Continued, cut: str) -> None:
        added = continued.added_pattern()
        steps: list[Any] = [
            *([pre_tokenizers.Split(Regex(added), "removed")] if added else []),
            *([own] if (own := continued.tokenizer.pre_tokenizer) is not None else []),
            *([pre_tokenizers.Split(Regex(cut), "isolated")] if cut else []),
        ]
        self._reader = Tokenizer(models.WordLevel())
        if continued.tokenizer.normalizer is not None:
            self._reader.normalizer = continued.tokenizer.normalizer
        if steps:
            self._reader.pre_tokenizer = pre_tokenizers.Sequence(steps)

    def count(self, texts: Sequence[str]) -> Words:
        """The words of a block of texts."""
        trainer = trainers.WordLevelTrainer(vocab_size=1, show_progress=False)
        self._reader.train_from_iterator(texts, trainer)
        counted: dict[str, int] = json.loads(trainer.__getstate__())["WordLevelTrainer"]["words"]
        words = sorted(counted)
        return Words(words, [counted[word] for word in words])
