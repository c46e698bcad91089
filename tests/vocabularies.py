"""Small tokenizers of every kind, trained on the spot; as the text of tokenizer.json, or as a sentencepiece model."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.models import CORPUS, tiny


@cache
def byte_level() -> str:
    """As in GPT-2 and its descendants."""
    with TemporaryDirectory() as folder:
        return (tiny(Path(folder)) / "tokenizer.json").read_text()


@cache
def byte_fallback() -> str:
    """As in Llama 2: a space marker, and bytes for what the vocabulary lacks."""
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *alphabet], show_progress=False
    )
    tokenizer.train_from_iterator([line.replace(" ", "▁") for line in CORPUS.splitlines()], trainer)
    return str(tokenizer.to_str())


@cache
def unigram() -> str:
    """As in T5 and XLNet."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    return str(tokenizer.to_str())


@cache
def word_piece() -> str:
    """As in BERT: lower case, and a decoder that puts a space before every word."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    return str(tokenizer.to_str())


KINDS = {"byte-level": byte_level, "byte-fallback": byte_fallback, "unigram": unigram, "word-piece": word_piece}


@cache
def sentencepiece(model_type: str = "bpe", *, prefix: bool = True, byte_fallback: bool = True) -> bytes:
    """A sentencepiece model as Llama 2 (`prefix`: a space before the text) or Gemma have it."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines() * 3),
        model_writer=model,
        vocab_size=400,
        model_type=model_type,
        hard_vocab_limit=False,
        byte_fallback=byte_fallback,
        add_dummy_prefix=prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()
