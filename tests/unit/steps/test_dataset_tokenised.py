"""Places of tokens that are sums of their lengths are those that `tokenizers` itself tells."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from finetune.steps.dataset.span import Span, token_span
from finetune.steps.dataset.tokenised import Tokeniser
from tests.models import CORPUS

TRIMS = processors.ByteLevel(trim_offsets=True)
PARTS = [
    " ",
    "  ",
    "\n",
    "a",
    "the",
    " quick",
    "é",
    "e\u0301",
    "水",
    "🙂",
    "<|s|>",
    "<|e|>",
    " New York",
    "\u00a0",
    "ﬁ",
]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=10).map("".join)


def byte_level(alphabet: list[str] | None = None, prefix: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet is None else alphabet,
        special_tokens=["<u>", "<|s|>", "<|e|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    return tokenizer


@cache
def made(kind: str) -> Tokenizer:
    tokenizer = byte_level(
        alphabet=list("ĠÃ©") if kind in ("lossy", "unknown", "lossy, prefixed") else None,
        prefix=kind in ("prefixed", "lossy, prefixed"),
    )
    match kind:
        case "trimming":
            tokenizer.post_processor = processors.Sequence([TRIMS])
        case "composing":
            tokenizer.normalizer = normalizers.NFC()
        case "lowering":
            tokenizer.normalizer = normalizers.Lowercase()
        case "swallowing":
            tokenizer.add_tokens([AddedToken("New York", lstrip=True)])
        case "widened":
            tokenizer.add_tokens([AddedToken("New York"), AddedToken("é水")])
        case "unknown":
            tokenizer.model.unk_token = "<u>"
    return tokenizer


BY_SUMS = ("plain", "trimming", "composing", "widened", "lossy")
KINDS = (*BY_SUMS, "prefixed", "lowering", "swallowing", "unknown")


@given(kind=st.sampled_from(KINDS), texts=st.lists(TEXTS, max_size=4), data=st.data())
@settings(max_examples=300, deadline=None)
def test_ids_and_spans_are_those_of_the_tokenizers_own_places(kind: str, texts: list[str], data: st.DataObject) -> None:
    tokenizer = made(kind)
    spans = [
        data.draw(st.lists(st.tuples(place, place).map(lambda pair: (min(pair), max(pair))), max_size=3))
        for place in (st.integers(0, len(text)) for text in texts)
    ]
    for text, wanted, found in zip(texts, spans, Tokeniser(tokenizer)(texts, spans), strict=True):
        encoding = tokenizer.encode(text, add_special_tokens=False)
        assert found.ids == encoding.ids
        own = [token_span(encoding, span, len(text)) for span in wanted]
        assert list(map(tokens, found.spans)) == list(map(tokens, own)), (text, wanted)


def tokens(span: Span) -> range:
    """All empty ranges are equal."""
    return range(*span)


@pytest.mark.parametrize(
    ("kind", "text"), [("composing", "z\u0344ze\u0301e\u0301z"), ("lossy, prefixed", "zxz\u00ff"), ("unknown", "zé水z")]
)
def test_what_a_tokenizer_adds_does_not_make_up_for_what_it_loses(kind: str, text: str) -> None:
    tokenizer = made(kind)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    spans = [(place, place + 1) for place in range(len(text))]
    (found,) = Tokeniser(tokenizer)([text], [spans])
    assert found.spans == [token_span(encoding, span, len(text)) for span in spans]


class Watched:
    """A tokenizer that remembers which texts it was asked to tell places of."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> Any:
        self.asked += texts
        return self._tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_a_byte_level_tokenizer_that_adds_nothing_is_not_asked_for_places(kind: str) -> None:
    tokenizer = Watched(made(kind))
    texts = ["the quick brown fox", "<|s|>a<|e|>"]
    Tokeniser(tokenizer)(texts, [[(4, 9)], [(5, 6)]])  # type: ignore[arg-type]
    assert tokenizer.asked == ([] if kind in BY_SUMS else texts)
