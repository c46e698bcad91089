"""The tokenizer of a base model, as its files say it is, whatever transformers makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.steps.tokenizer_files import tekken
from finetune.steps.tokenizer_files.agreement import TOKENIZER, by_transformers, disagreement, settle, write_settings
from finetune.steps.tokenizer_files.conversion import NotConvertible, converted


def as_written(folder: Path) -> Any:
    """The tokenizer in transformers' form, with the ids of tokenizer.json or, where there is none, of what the
    sentencepiece model was converted to. Raises NotConvertible."""
    loaded = by_transformers(folder)
    if not (folder / TOKENIZER).is_file():
        loaded._tokenizer = converted(folder)
        return loaded
    if disagreement(folder) is None:
        return loaded
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def complete(folder: Path, texts: Sequence[str] = ()) -> str | None:
    """Make the files in `folder` such that everybody reads the same tokenizer from them: tokenizer.json is written
    where only a sentencepiece model or tekken.json says what it is, and settings name the class that takes it as it is.
    `texts` are compared besides those that always are.

    Imports transformers unless it is proven that nothing has to be asked: `apart` does it in a process of its own.
    Returns what changed, None when nothing had to. Raises NotConvertible or Disagreement where that cannot be done.
    """
    if (folder / TOKENIZER).is_file():
        return settle(folder, texts)
    try:
        tokenizer = converted(folder)
    except NotConvertible:
        return None  # no step before the first that needs tokenizer.json has to refuse it
    tokenizer.save(str(folder / TOKENIZER))
    source = "the sentencepiece model"
    if (folder / tekken.NAME).is_file():
        source = tekken.NAME
        write_settings(folder, tekken.settings(tokenizer))
    mended = settle(folder, texts)
    return "; ".join([f"tokenizer.json was made from {source}, with its ids", *([mended] if mended else [])])
