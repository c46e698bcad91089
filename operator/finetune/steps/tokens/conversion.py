"""Tokenizers in other forms than tokenizer.json: converted where that is proven, refused where it would be a guess.

A sentencepiece model says everything about itself, so a conversion can be held against sentencepiece's own ids. A
tiktoken vocabulary says only which bytes are merged: how text is cut before that is a regular expression in somebody's
code, and another one would give other ids for the same text.
"""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from finetune.steps.tokenizer_files.agreement import PROBES

SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
TIKTOKEN = ("tiktoken.model", "*.tiktoken", "tekken.json")

REMEDY = (
    "convert it once where it is known to be right: AutoTokenizer.from_pretrained(...).save_pretrained(...) with "
    "transformers, and check the ids"
)


class NotConvertible(ValueError):
    """There is no tokenizer.json, and none can be made that is known to be right; the message says why."""


def converted(folder: Path) -> Tokenizer:
    """The tokenizer of a folder that has no tokenizer.json, as one; raises NotConvertible.

    transformers converts, sentencepiece judges: every text of PROBES must get the same ids.
    """
    for path in sorted(folder.iterdir()):
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in TIKTOKEN):
            raise _tiktoken(path)
    models = [folder / name for name in SENTENCEPIECE if (folder / name).is_file()]
    if not models:
        raise NotConvertible(f"the model has neither tokenizer.json nor a sentencepiece model; {REMEDY}")
    model = models[0]
    original = _sentencepiece(model)
    tokenizer = _by_transformers(folder, model)
    for probe in PROBES:
        expected, ids = original.encode(probe), tokenizer.encode(probe, add_special_tokens=False).ids
        if ids != expected:
            raise NotConvertible(
                f"the model has no tokenizer.json, and transformers' conversion of {model.name} is not exact: "
                f"{probe!r} becomes {ids[:8]}, sentencepiece says {expected[:8]}; {REMEDY}"
            )
    return tokenizer


def _sentencepiece(path: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError as error:
        # Llama 3 calls its tiktoken vocabulary tokenizer.model too: lines of a base64 word and a rank
        if len(path.open("rb").readline(1024).split()) == 2:
            raise _tiktoken(path) from error
        raise NotConvertible(f"{path.name} cannot be read: {error}") from error


def _by_transformers(folder: Path, path: Path) -> Tokenizer:
    from transformers import AutoTokenizer  # slow to import, and seldom needed

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    except Exception as error:
        raise NotConvertible(
            f"the model has no tokenizer.json, and transformers cannot convert {path.name}: {error}"
        ) from error
    return Tokenizer.from_str(tokenizer.to_str())


def _tiktoken(path: Path) -> NotConvertible:
    return NotConvertible(
        f"the model has no tokenizer.json but {path.name}, a tiktoken vocabulary: it lacks the rule by which text is "
        f"cut, and a guess would change old text; take a revision of the model that has tokenizer.json, or {REMEDY}"
    )
