"""config.json of a model, and the other JSON objects beside its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VOCAB_SIZE = {"gemma3_text": 262_208}
"""What transformers takes when config.json does not say: that of published Gemma 3 models does not."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json; for a model of several parts, with the text part's fields at the top.

    Whether embedding and head are tied is for the whole model to say. Raises ValueError when it is not a JSON object,
    FileNotFoundError when it is absent.
    """
    config = read_object(folder / "config.json")
    nested = config.get("text_config")
    if isinstance(nested, dict):
        config = {**config, **nested, **{key: config[key] for key in ("tie_word_embeddings",) if key in config}}
    model_type = config.get("model_type")
    if "vocab_size" not in config and model_type in VOCAB_SIZE:
        config["vocab_size"] = VOCAB_SIZE[model_type]
    return config


UNQUANTISED = (
    "Use the model in bf16 that it was quantised from: its model card names it as base_model, and publishers mostly "
    "have it beside."
)
"""What helps where a checkpoint is quantised and cannot be written out."""


def quantised(config: Mapping[str, Any]) -> str | None:
    """How the weights of a checkpoint are quantised, by the method's name; None when they are not."""
    settings = config.get("quantization_config")
    if not settings:
        return "compressed-tensors" if config.get("compression_config") else None
    if not isinstance(settings, dict):
        return "unknown method"
    loading = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    return str(settings.get("quant_method") or ("bitsandbytes" if loading else "quantization_config"))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises ValueError when it holds something else, FileNotFoundError when it is absent.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return content
