"""Tiny random checkpoints of any architecture, as transformers itself saves them, and ways to change them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.models import write_tokenizer

VOCABULARY = 384

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4}

OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe", "gpt_oss"), EXPERTS),
    "qwen3_next": EXPERTS
    | {
        "shared_expert_intermediate_size": 32,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gptj": GPT | {"rotary_dim": 8},
    "codegen": GPT | {"rotary_dim": 8},
    "bloom": GPT,
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32},
    "falcon": {"head_dim": None},
    "gemma3": {"text_config": SMALL, "vision_config": VISION},
}
"""What an architecture calls otherwise than SMALL does, or has besides."""


def tiny_of(
    folder: Path,
    family: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    padding: int = 0,
    shard: str = "5GB",
    tokenizer: Path | None = None,
    **settings: Any,
) -> Path:
    """Write a checkpoint of the family, its rows beyond the tokenizer being `padding`, with biases and norms that are
    not all zeros and ones. The tokenizer's files are those of a folder, or trained on the spot."""
    torch.manual_seed(0)
    rows = (length_of(tokenizer) if tokenizer else VOCABULARY) + padding
    own = OWN.get(family, {})
    if "text_config" in own:
        wanted = {**own, "text_config": {**own["text_config"], "vocab_size": rows, **settings}}
    else:
        wanted = {**SMALL, "vocab_size": rows, **own, **settings}
    config = AutoConfig.for_model(family, **{key: value for key, value in wanted.items() if value is not None})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape).to(dtype) * 0.1)
    model.save_pretrained(folder, max_shard_size=shard)
    if tokenizer:
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
        return folder
    write_tokenizer_for(folder, family)
    return folder


def write_tokenizer_for(folder: Path, family: str) -> None:
    """A small tokenizer that transformers reads alike for this family."""
    write_tokenizer(folder, VOCABULARY)
    if family in ("qwen2", "qwen3_5"):  # it builds theirs by rules of its own, whatever the files say
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


def length_of(tokenizer: Path) -> int:
    """How many rows the tokenizer in a folder needs."""
    path = tokenizer / "tokenizer.json"
    if path.is_file():
        return max(Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True).values()) + 1
    if (path := tokenizer / "tokenizer.model").is_file():
        return int(SentencePieceProcessor(str(path)).vocab_size())
    return int(json.loads((tokenizer / "tekken.json").read_bytes())["config"]["default_vocab_size"])


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Write a single-file checkpoint's tensors anew, as `change` returns them."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def rename(folder: Path, prefixes: dict[str, str]) -> None:
    """Give tensors of a single-file checkpoint other prefixes."""

    def renamed(name: str) -> str:
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        return prefixes.get(old, "") + name.removeprefix(old)

    edit_tensors(folder, lambda tensors: {renamed(name): tensor for name, tensor in tensors.items()})


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
