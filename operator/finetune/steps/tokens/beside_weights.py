"""The files beside the weights: configuration and tokenizer, consistent with the new vocabulary."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from finetune.steps.model_files.config import read_object
from finetune.steps.tokens.conversion import SENTENCEPIECE, TIKTOKEN
from finetune.steps.tokens.vocabulary import TOKENIZER, Added

STALE = (*SENTENCEPIECE, *TIKTOKEN, "tokenizer_object.json")
"""Vocabularies in other forms. They do not know the new tokens, and some loaders prefer them to tokenizer.json."""

WEIGHTS = (".safetensors", ".safetensors.index.json")


def write_beside_weights(
    source: Path, target: Path, tokenizer: Tokenizer, added: Sequence[Added], rows: int, *, generic_class: bool
) -> list[str]:
    """Write everything but the weights and return the names of stale files that were left out.

    `generic_class` names the tokenizer class that takes tokenizer.json as it is: some classes build a decoder of
    their own.
    """
    left_out = sorted(path.name for pattern in STALE for path in source.glob(pattern) if path.is_file())
    for path in _others(source, left_out):
        shutil.copyfile(path, target / path.name)
    for folder in source.iterdir():
        if folder.is_dir() and folder.name == "additional_chat_templates":
            shutil.copytree(folder, target / folder.name, dirs_exist_ok=True)
    config = read_object(source / "config.json")
    nested = config.get("text_config")
    parts = [config, nested] if isinstance(nested, dict) else [config]
    for part in [part for part in parts if "vocab_size" in part] or parts[-1:]:
        part["vocab_size"] = rows
    _write(target / "config.json", config)
    tokenizer.save(str(target / TOKENIZER))
    _write_tokenizer_config(source, target, added, generic_class)
    if (source / "added_tokens.json").is_file():
        ids = {**read_object(source / "added_tokens.json"), **{item.token.content: item.id for item in added}}
        _write(target / "added_tokens.json", ids)
    return left_out


def _write_tokenizer_config(source: Path, target: Path, added: Sequence[Added], generic_class: bool) -> None:
    path = source / "tokenizer_config.json"
    if not path.is_file() and not generic_class:
        return
    settings = read_object(path) if path.is_file() else {}
    declared = settings.get("added_tokens_decoder")
    if isinstance(declared, dict):
        declared |= {
            str(item.id): {
                "content": item.token.content,
                "lstrip": item.token.lstrip,
                "normalized": item.token.normalized,
                "rstrip": item.token.rstrip,
                "single_word": item.token.single_word,
                "special": item.token.special,
            }
            for item in added
        }
    if generic_class:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write(target / "tokenizer_config.json", settings)


def _others(source: Path, left_out: Iterable[str]) -> Iterable[Path]:
    rewritten = {"config.json", TOKENIZER, "tokenizer_config.json", "added_tokens.json", *left_out}
    for path in sorted(source.iterdir()):
        hidden = path.name.startswith((".", "finetune-"))
        if path.is_file() and not hidden and path.name not in rewritten and not path.name.endswith(WEIGHTS):
            yield path


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
