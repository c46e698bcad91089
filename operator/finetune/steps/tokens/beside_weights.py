"""The files beside the weights: configuration and tokenizer, consistent with the new vocabulary."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from finetune.steps.model_files.config import read_object
from finetune.steps.tokenizer_files.agreement import TOKENIZER
from finetune.steps.tokenizer_files.as_it_is import GENERIC, SETTINGS
from finetune.steps.tokenizer_files.conversion import OTHERS, SENTENCEPIECE
from finetune.steps.tokens.sentencepiece_model import NotExtendable, extended
from finetune.steps.tokens.vocabulary import FLAGS, Added

STALE = (*OTHERS, "tokenizer_object.json")
"""Vocabularies in other forms. They do not know the new tokens, and some loaders prefer them to tokenizer.json."""

WEIGHTS = (".safetensors", ".safetensors.index.json")


def write_beside_weights(
    source: Path, target: Path, tokenizer: Tokenizer, added: Sequence[Added], rows: int, *, generic_class: bool
) -> list[str]:
    """Write everything but the weights and return sentences about vocabularies that were left out.

    `generic_class` names the tokenizer class that takes tokenizer.json as it is: some classes build a decoder of
    their own. A sentencepiece model is written with the new tokens.
    """
    stale = sorted(path.name for pattern in STALE for path in source.glob(pattern) if path.is_file())
    left_out = [f"{name} was left out: it does not know the new tokens, tokenizer.json does" for name in stale]
    models = [source / name for name in SENTENCEPIECE if (source / name).is_file()]
    kept = False
    for path in models:
        try:
            model = extended(path.read_bytes(), tokenizer, {item.id for item in added if item.piece is not None})
        except NotExtendable as error:
            left_out.append(f"{path.name} was left out, and llama.cpp's converter needs it: {error}")
            continue
        (target / path.name).write_bytes(model)
        kept = True
    for path in _others(source, [*stale, *(path.name for path in models)]):
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
    _write_settings(source, target, tokenizer, generic_class=generic_class, declare=kept)
    if (source / "added_tokens.json").is_file():
        new = {item.token.content: item.id for item in added if item.piece is None}
        ids = {**read_object(source / "added_tokens.json"), **new}
        _write(target / "added_tokens.json", ids)
    return left_out


def _write_settings(source: Path, target: Path, tokenizer: Tokenizer, *, generic_class: bool, declare: bool) -> None:
    """tokenizer_config.json, with all of tokenizer.json's added tokens where it declares any (a list that is not whole
    would win over tokenizer.json) or where a sentencepiece model is read together with it (`declare`)."""
    path = source / SETTINGS
    if not path.is_file() and not generic_class and not declare:
        return
    settings = read_object(path) if path.is_file() else {}
    if declare or isinstance(settings.get("added_tokens_decoder"), dict):
        settings["added_tokens_decoder"] = {
            str(id_): {"content": token.content, **{flag: getattr(token, flag) for flag in FLAGS}}
            for id_, token in sorted(tokenizer.get_added_tokens_decoder().items())
        }
    if generic_class:
        settings["tokenizer_class"] = GENERIC
    _write(target / SETTINGS, settings)


def _others(source: Path, left_out: Iterable[str]) -> Iterable[Path]:
    rewritten = {"config.json", TOKENIZER, SETTINGS, "added_tokens.json", *left_out}
    for path in sorted(source.iterdir()):
        hidden = path.name.startswith((".", "finetune-"))
        if path.is_file() and not hidden and path.name not in rewritten and not path.name.endswith(WEIGHTS):
            yield path


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
