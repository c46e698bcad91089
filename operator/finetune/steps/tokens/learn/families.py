"""Which tokenizers can be continued, and what differs between them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from typing import Any

from tokenizers import Tokenizer

from finetune.steps.tokens.byte_level import any_of

LONGEST_PIECE = 16
"""Characters of a word between two cuts, where we cut ourselves: longer ones are sentences learned by heart."""

SCRIPTS = (
    *("Latin", "Greek", "Cyrillic", "Armenian", "Georgian", "Hebrew", "Arabic", "Syriac", "Ethiopic", "Devanagari"),
    *("Bengali", "Gurmukhi", "Gujarati", "Oriya", "Tamil", "Telugu", "Kannada", "Malayalam", "Sinhala", "Thai", "Lao"),
    *("Tibetan", "Myanmar", "Khmer", "Mongolian", "Hangul", "Han", "Hiragana", "Katakana", "Bopomofo", "Yi"),
)
"""Writing systems; a piece never mixes two."""

MARKER = "▁"
"""What SentencePiece writes for a space."""


class NotLearnable(ValueError):
    """The tokenizer cannot be continued; the message says why."""


class Family(Enum):
    """How a tokenizer treats text that its vocabulary does not hold."""

    BYTE_LEVEL = "byte-level BPE"
    """GPT-2 and its descendants: everything is bytes, each written as a character; words are its own."""

    BYTE_FALLBACK = "BPE with byte fallback"
    """Llama 2, Mistral, Gemma: unknown characters become `<0xE6>` tokens, which merges would turn into text that does
    not decode. Whole characters come first, merges are of characters. The tokenizer does not cut words, so we do."""

    UNIGRAM = "Unigram"
    """No merges, but pieces with scores."""

    @property
    def by_characters(self) -> bool:
        """Whether unknown characters can become pieces (else all text is known, as bytes)."""
        return self != Family.BYTE_LEVEL


@dataclass(frozen=True)
class Continued:
    """A tokenizer that is to be continued: the library's object, its document, its family."""

    tokenizer: Tokenizer
    document: dict[str, Any]
    family: Family

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Continued:
        """Raises NotLearnable when its kind has no continuation, or none that can be exact."""
        document = json.loads(tokenizer.to_str())
        model = document["model"]
        kind = model["type"]
        if kind == "Unigram":
            return cls(tokenizer, document, Family.UNIGRAM)
        if kind != "BPE":
            raise NotLearnable(
                f"its model is {kind}; byte-level BPE, BPE with byte fallback and Unigram can be continued"
            )
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(option):
                raise NotLearnable(f"its BPE has {option} {model[option]!r}, which cannot be continued exactly")
        if "ByteLevel" in _types(document.get("decoder")) and "ByteLevel" in _types(document.get("pre_tokenizer")):
            return cls(tokenizer, document, Family.BYTE_LEVEL)
        if model.get("byte_fallback") and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256)):
            return cls(tokenizer, document, Family.BYTE_FALLBACK)
        raise NotLearnable("its BPE knows neither bytes nor a fallback to them, so text would be lost")

    @property
    def ignores_merges(self) -> bool:
        """Whether a word that is in the vocabulary is one token, whatever the merges say (Llama 3)."""
        return bool(self.document["model"].get("ignore_merges"))

    @property
    def unknown(self) -> str | None:
        """The token that stands for text which is lost."""
        model = self.document["model"]
        if self.family != Family.UNIGRAM:
            return model.get("unk_token") or None
        return None if model.get("unk_id") is None else str(model["vocab"][model["unk_id"]][0])

    @property
    def added(self) -> dict[str, int]:
        """Added tokens and their ids."""
        return {token["content"]: token["id"] for token in self.document["added_tokens"]}

    def added_pattern(self) -> str:
        """A regular expression for the added tokens, which are no text; empty when there are none."""
        contents = set(self.added) - {""}
        if self.family.by_characters:
            contents |= {content.replace(" ", MARKER) for content in contents}
        return any_of(sorted(contents)) if contents else ""

    def cut_pattern(self) -> str:
        """A regular expression for the words that we cut ourselves; empty where the tokenizer's own are kept.

        A word is a run of one script, at most `LONGEST_PIECE` characters, with the space marker before it. Digits,
        punctuation and white space stand alone and are never joined.
        """
        if not self.family.by_characters:
            return ""
        longest = f"{{1,{LONGEST_PIECE}}}"
        runs = "|".join(rf"[\p{{{script}}}\p{{M}}ー]{longest}" for script in SCRIPTS)
        return rf"{MARKER}?(?:{runs}|\p{{L}})|[\s\S]"


def _types(part: Any) -> set[str]:
    """The types of a pre-tokenizer's or decoder's parts."""
    if isinstance(part, dict):
        found = {part["type"]} if isinstance(part.get("type"), str) else set()
        return found.union(*(_types(value) for value in part.values()))
    if isinstance(part, list):
        return set().union(*(_types(value) for value in part))
    return set()
