"""Whether transformers takes tokenizer.json as it is, where the files alone prove it.

Asking transformers costs a second and as much memory as a whole edit of tokens. Most bases that name the generic class
need not be asked about: transformers reads the file for these, and adds only tokens that the settings declare.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

SETTINGS = "tokenizer_config.json"

GENERIC = "PreTrainedTokenizerFast"
"""The class of transformers that takes tokenizer.json as it is, by the name that its versions 4 and 5 both know."""

NAMES = (GENERIC, "TokenizersBackend")

HONOURED = (
    "llama", "mistral", "mixtral", "ministral", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "smollm3",
    "olmo", "olmo2", "olmo3", "olmoe", "granite", "granitemoe", "stablelm", "glm", "glm4", "phi", "starcoder2",
    "cohere", "cohere2", "gpt_oss", "seed_oss", "exaone4", "lfm2", "gpt2", "gpt_neox", "opt", "falcon", "bloom",
)  # fmt: skip
"""Model types for which transformers takes the class that the settings name; for some (qwen2, phi3) it knows better."""

HARMLESS = {
    "tokenizer_class", "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "chat_template",
    "model_max_length", "model_input_names", "padding_side", "truncation_side", "clean_up_tokenization_spaces",
    "add_bos_token", "add_eos_token", "legacy", "use_default_system_prompt", "backend", "is_local", "local_files_only",
}  # fmt: skip
"""Settings, besides the named tokens, that change no id of a text's own tokens."""

FLAGS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


def honours_settings(folder: Path) -> bool:
    """Whether transformers is known to take the class that the folder's tokenizer_config.json names."""
    config = _object(folder / "config.json")
    return config.get("model_type") in HONOURED and "model_name" not in config


def proven(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether it is certain without asking that transformers gives the ids of `tokenizer`, the folder's tokenizer.json.

    False means only that it has to be asked.
    """
    settings = _object(folder / SETTINGS)
    if not honours_settings(folder):
        return False
    if settings.get("tokenizer_class") not in NAMES or (folder / "added_tokens.json").exists():
        return False
    if any(name not in HARMLESS and not name.endswith("_token") for name in settings):
        return False
    known = tokenizer.get_added_tokens_decoder()
    declared = settings.get("added_tokens_decoder") or {}
    if any(not _alike(known.get(int(id_)), token) for id_, token in declared.items()):
        return False
    contents = {token.content for token in known.values()}
    named = [*_named(settings), *_named(_object(folder / "special_tokens_map.json"))]
    return all(content in contents for content in named)


def _named(settings: Mapping[str, Any]) -> Iterator[str]:
    """The tokens that the settings call by a name; transformers adds those that are no added tokens yet."""
    for name, value in settings.items():
        if name.endswith("_token") and name not in ("add_bos_token", "add_eos_token"):
            yield from _contents(value)
        elif name in ("additional_special_tokens", "extra_special_tokens"):
            for item in value.values() if isinstance(value, dict) else value or ():
                yield from _contents(item)


def _contents(value: Any) -> Iterator[str]:
    if value is not None:
        yield str(value.get("content")) if isinstance(value, dict) else str(value)


def _alike(known: AddedToken | None, declared: Mapping[str, Any]) -> bool:
    return known is not None and all(getattr(known, flag) == declared.get(flag) for flag in FLAGS)


def _object(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_bytes()) if path.is_file() else {}
    return content if isinstance(content, dict) else {}
