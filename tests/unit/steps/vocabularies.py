"""Tiny tokenizers of every kind that can be continued; each was trained on a few English sentences."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.models import CORPUS, smollm2
from tests.poems import made as poems

ENGLISH = CORPUS.splitlines()

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""The Split of Qwen2, which differs from GPT-2's in how it takes punctuation, digits and new lines."""


def byte_level(*, split: str = "", ignore_merges: bool = False, vocabulary: int = 384) -> Tokenizer:
    """Like GPT-2, or with another Split like Qwen2; with `ignore_merges` like Llama 3: special tokens lie behind the
    model's vocabulary."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split:
        tokenizer.normalizer = normalizers.NFC()
        parts = [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(ENGLISH, trainer)
    tokenizer.add_special_tokens([AddedToken("<|begin|>", special=True), AddedToken("<|end|>", special=True)])
    return tokenizer


def byte_fallback(vocabulary: int = 420) -> Tokenizer:
    """Like Llama 2: no pre-tokenizer, spaces written as a marker, bytes for what the vocabulary does not hold."""
    cut = Tokenizer(models.BPE())
    cut.normalizer = normalizers.Replace(" ", "▁")
    cut.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[^▁]+"), "isolated")
    cut.train_from_iterator(ENGLISH, trainers.BpeTrainer(vocab_size=vocabulary - 259, show_progress=False))
    trained = json.loads(cut.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [name for name in sorted(trained["vocab"], key=trained["vocab"].get) if name not in names]
    names += ["▁"] * ("▁" not in names)
    tokenizer = Tokenizer(
        models.BPE(
            {name: id_ for id_, name in enumerate(names)},
            [tuple(merge) for merge in trained["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names[:3]])
    return tokenizer


def unigram(*, behind: Sequence[str] = ("<extra_0>", "<extra_1>")) -> Tokenizer:
    """Like T5's: pieces with scores, special tokens behind the model's vocabulary."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    alphabet = sorted(set("".join(poems(5))) - {"\n", " "})
    trainer = trainers.UnigramTrainer(
        vocab_size=220, unk_token="<unk>", special_tokens=["<unk>"], initial_alphabet=alphabet[:60], show_progress=False
    )
    tokenizer.train_from_iterator(ENGLISH, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in behind])
    return tokenizer


def real() -> Tokenizer:
    """SmolLM2's."""
    return Tokenizer.from_file(str(smollm2() / "tokenizer.json"))


KINDS = {
    "GPT-2 like": byte_level,
    "Llama 3 like": lambda: byte_level(ignore_merges=True),
    "Qwen like": lambda: byte_level(split=QWEN),
    "Llama 2 like": byte_fallback,
    "Unigram": unigram,
    "SmolLM2": real,
}
