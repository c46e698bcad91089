"""Texts to ids, and spans of their characters to spans of their tokens.

`tokenizers` tells where in a text each token lies, and that is a quarter of its work. A byte-level tokenizer need not
be asked: each of its tokens stands for as many bytes as its name has characters. Where the tokens of a text stand for
as many bytes as the text has, nothing was lost, since such a tokenizer adds nothing; the places are sums then. All
other texts, and those of all other tokenizers, are tokenised with places.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from finetune.steps.dataset.span import Span, token_span


class Tokenised(NamedTuple):
    """A text's ids, and for each span of its characters the tokens of which a part lies in it."""

    ids: list[int]
    spans: list[Span]


class Tokeniser:
    """Tokenises texts as they are: without special tokens of its own, whole, unpadded."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Changes `tokenizer`: its padding and truncation are taken away."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._sizes = _sizes(tokenizer)
        self._composes = tokenizer.normalizer is not None
        after = tokenizer.post_processor
        self._trims = getattr(after, "trim_offsets", not isinstance(after, (processors.TemplateProcessing, type(None))))

    def __call__(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[Tokenised]:
        """Each text with its spans."""
        found: dict[int, Tokenised] = {}
        if self._sizes is not None:
            summed = [place for place, text in enumerate(texts) if self._sums_up(text, spans[place])]
            found = self._by_sums(self._sizes, summed, texts, spans)
        others = [place for place in range(len(texts)) if place not in found]
        encodings = self._tokenizer.encode_batch([texts[place] for place in others], add_special_tokens=False)
        for place, encoding in zip(others, encodings, strict=True):
            whole = len(texts[place])
            found[place] = Tokenised(encoding.ids, [token_span(encoding, span, whole) for span in spans[place]])
        return [found[place] for place in range(len(texts))]

    def _sums_up(self, text: str, spans: Sequence[Span]) -> bool:
        """Whether places in the text are sums. Some tokenizers take spaces at the edges of a token for none of its
        own; at the edge of a span that matters."""
        if self._composes and not unicodedata.is_normalized("NFC", text):
            return False
        whole = len(text)
        return not self._trims or not any(
            text.startswith(" ", start) or (end < whole and text.endswith(" ", start, end))
            for start, end in spans
            if (start, end) != (0, whole)
        )

    def _by_sums(
        self, sizes: npt.NDArray[np.int64], places: Sequence[int], texts: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> dict[int, Tokenised]:
        """Those of the texts at these places whose tokens add up."""
        encodings = self._tokenizer.encode_batch_fast([texts[place] for place in places], add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        counts = np.fromiter(map(len, ids), np.int64, len(ids))
        edges = np.concatenate(([0], np.cumsum(sizes[np.fromiter(chain.from_iterable(ids), np.int64, counts.sum())])))
        firsts = np.cumsum(counts) - counts
        begins = edges[firsts]
        lost = edges[firsts + counts] - begins != [_bytes(texts[place]) for place in places]
        wanted = [
            (number, _bytes(texts[place], start), _bytes(texts[place], end))
            for number, place in enumerate(places)
            for start, end in spans[place]
        ]
        numbers, starts, ends = np.array(wanted, np.int64).reshape(-1, 3).T
        first = np.searchsorted(edges, begins[numbers] + starts, "right") - 1 - firsts[numbers]
        last = np.searchsorted(edges, begins[numbers] + ends, "left") - firsts[numbers]
        found = iter(zip(first.tolist(), np.where(starts < ends, last, first).tolist(), strict=True))
        by_text = [[next(found) for _ in spans[place]] for place in places]
        return {
            place: Tokenised(ids[number], by_text[number]) for number, place in enumerate(places) if not lost[number]
        }


def _bytes(text: str, end: int | None = None) -> int:
    """How many bytes the text has, up to that character."""
    if text.isascii():
        return len(text) if end is None else end
    return len(text[:end].encode())


def _sizes(tokenizer: Tokenizer) -> npt.NDArray[np.int64] | None:
    """How many bytes each id stands for; None where that cannot be told, or where the tokenizer may add to a text."""
    model, normalizer = tokenizer.model, tokenizer.normalizer
    added = tokenizer.get_added_tokens_decoder()
    if (
        not isinstance(model, models.BPE)
        or not isinstance(tokenizer.decoder, decoders.ByteLevel)
        or (normalizer is not None and not isinstance(normalizer, normalizers.NFC))
        or any(token.lstrip or token.rstrip or token.content != token.content.strip() for token in added.values())
        or "".join(tokenizer.encode("a é", add_special_tokens=False).tokens) != "aĠÃ©"
    ):
        return None
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    replaces = model.unk_token is not None or model.byte_fallback  # what it has no token for, which else is lost
    if replaces and not vocabulary.keys() >= set(pre_tokenizers.ByteLevel.alphabet()):
        return None
    sizes = np.zeros(max(vocabulary.values()) + 1, np.int64)
    sizes[list(vocabulary.values())] = list(map(len, vocabulary))
    for number, token in added.items():
        sizes[number] = len(token.content.encode())
    return sizes
