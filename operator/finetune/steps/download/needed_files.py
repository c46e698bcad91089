"""Which files of a model repository a fine-tuning job needs, and which it refuses to touch."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from finetune.api.contract import ExitCode
from finetune.steps.model_files.adapter import ADAPTER_CONFIG
from finetune.steps.model_files.checkpoint import INDEX, WEIGHTS, read_index, weight_files
from finetune.steps.model_files.safetensors_file import InvalidSafetensors
from finetune.steps.runtime.failure import StepFailure

BESIDE_WEIGHTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
)
"""Configuration, tokenizer, chat templates, and the terms under which all of it is used."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def needed_beside_weights(names: Iterable[str]) -> list[str]:
    """Those files of a repository that are needed whatever its weights are called."""
    return sorted(name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in BESIDE_WEIGHTS))


def index_name(names: Iterable[str], uri: str) -> str | None:
    """The index to read before the weights' names are known; None when the weights are one file.

    Raises StepFailure when the repository has no safetensors weights.
    """
    present = set(names)
    if WEIGHTS in present:
        return None
    if INDEX in present:
        return INDEX
    if ADAPTER_CONFIG in present:
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "AdapterOnly",
            f"spec.model.uri: {uri} holds a LoRA adapter, not a whole model",
            "Publish it with spec.output.format: Merged, and use that as the base.",
        )
    pickles = sorted(name for name in present if any(fnmatch.fnmatch(name, pattern) for pattern in PICKLES))
    if pickles:
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "PickledWeights",
            f"spec.model.uri: {uri} has its weights only as pickles ({', '.join(pickles[:3])}), "
            "which can run any code when they are loaded",
            "Use a repository with safetensors weights, or convert it once with transformers "
            "(from_pretrained, then save_pretrained).",
        )
    raise StepFailure(
        ExitCode.BAD_CONFIGURATION,
        "NoWeights",
        f"spec.model.uri: {uri} has neither {WEIGHTS} nor {INDEX}",
        "Name a repository or folder of a transformers model in safetensors form.",
    )


def weights_of(index: Path | None) -> list[str]:
    """The names of the weight files, the index itself included."""
    return [WEIGHTS] if index is None else [INDEX, *weight_files(read_index(index))]


def refuse_remote_code(folder: Path, uri: str) -> None:
    """Raise StepFailure when the model needs code from its repository: nothing downloaded is ever run."""
    config = model_config(folder, uri)
    if not config.get("auto_map") or _is_native(config.get("model_type")):
        return
    raise StepFailure(
        ExitCode.BAD_CONFIGURATION,
        "RemoteCode",
        f"spec.model.uri: {uri} needs code from its own repository (config.json has an auto_map, and transformers does "
        f"not know the model_type {config.get('model_type')!r}), which is never run",
        "Use a model whose architecture is part of transformers.",
    )


def model_config(folder: Path, uri: str) -> Mapping[str, Any]:
    """config.json; raises StepFailure when it is absent or broken."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError as error:
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "NoConfig",
            f"spec.model.uri: {uri} has no config.json",
            "Name a repository or folder of a transformers model.",
        ) from error
    except (ValueError, RecursionError) as error:
        raise corrupt(uri, f"config.json is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise corrupt(uri, "config.json is not a JSON object")
    return config


def corrupt(uri: str, what: InvalidSafetensors | str) -> StepFailure:
    """The failure of a model whose files are not what they should be."""
    return StepFailure(
        ExitCode.BAD_DATA,
        "CorruptModel",
        f"spec.model.uri: {uri}: {what}",
        "Upload the file again or choose another spec.model.revision, then delete the job and apply it anew.",
    )


def _is_native(model_type: object) -> bool:
    from transformers import CONFIG_MAPPING  # slow to import, and seldom needed

    return model_type in CONFIG_MAPPING
