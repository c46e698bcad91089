"""The files beside the weights: configuration and tokenizer, consistent with the new vocabulary."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from finetune.steps.tokens.conversion import SENTENCEPIECE, TIKTOKEN
from finetune.steps.tokens.vocabulary import TOKENIZER, Added

STALE = (*SENTENCEPIECE, *TIKTOKEN, "tokenizer_object.json")
"""Vocabularies in other forms. They do not know the new tokens, and some loaders prefer them to tokenizer.json."""

WEIGHTS = (".safetensors", ".safetensors.index.json")

VOCAB_SIZE = {"gemma3_text": 262_208}
"""What transformers takes when config.json does not say: that of published Gemma 3 models does not."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json; for a model of several parts, with the text part's fields at the top.

    Whether embedding and head are tied is for the whole model to say. Raises ValueError when it is not a JSON object,
    FileNotFoundError when it is absent.
    """
    config = _read(folder / "config.json")
    nested = config.get("text_config")
    if isinstance(nested, dict):
        config = {**config, **nested, **{key: config[key] for key in ("tie_word_embeddings",) if key in config}}
    model_type = config.get("model_type")
    if "vocab_size" not in config and model_type in VOCAB_SIZE:
        config["vocab_size"] = VOCAB_SIZE[model_type]
    return config


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
    config = _read(source / "config.json")
    nested = config.get("text_config")
    parts = [config, nested] if isinstance(nested, dict) else [config]
    for part in [part for part in parts if "vocab_size" in part] or parts[-1:]:
        part["vocab_size"] = rows
    _write(target / "config.json", config)
    tokenizer.save(str(target / TOKENIZER))
    _write_tokenizer_config(source, target, added, generic_class)
    if (source / "added_tokens.json").is_file():
        ids = {**_read(source / "added_tokens.json"), **{item.token.content: item.id for item in added}}
        _write(target / "added_tokens.json", ids)
    return left_out


def _write_tokenizer_config(source: Path, target: Path, added: Sequence[Added], generic_class: bool) -> None:
    path = source / "tokenizer_config.json"
    if not path.is_file() and not generic_class:
        return
    settings = _read(path) if path.is_file() else {}
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


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
