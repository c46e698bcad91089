"""Tiny random checkpoints with the tensors that published ones have besides what transformers loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from tests.unit.steps.families import SMALL, VOCABULARY, edit_tensors, length_of, write_tokenizer_for

LINEAR = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 14,
    "num_position_embeddings": 16,
}
ROTATION = {
    "rope_type": "default",
    "rope_theta": 1e7,
    "partial_rotary_factor": 0.5,
    "mrope_interleaved": True,
    "mrope_section": [2, 1, 1],
}
MIXTURE = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "tie_word_embeddings": False,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
PREDICTING: dict[str, tuple[dict[str, Any], str, str]] = {
    "glm4_moe": (MIXTURE | {"num_nextn_predict_layers": 1}, "model.layers.1.", "model.layers.2."),
    "deepseek_v3": (
        MIXTURE | LATENT | {"num_nextn_predict_layers": 1, "num_key_value_heads": 4, "head_dim": 8},
        "model.layers.1.",
        "model.layers.2.",
    ),
    "qwen3_5": (
        {
            "vision_config": QWEN_VISION,
            "text_config": SMALL
            | LINEAR
            | {
                "layer_types": ["linear_attention", "full_attention"],
                "mtp_num_hidden_layers": 1,
                "rope_parameters": ROTATION,
            },
        },
        "model.language_model.layers.1.",
        "mtp.layers.0.",
    ),
}
"""Configuration, and the layer whose copy stands for the one that predicts a further token."""


def with_prediction_layer(folder: Path, family: str, *, copies: bool = False, tokenizer: Path | None = None) -> Path:
    """A checkpoint of a family that publishes a layer more than transformers loads; with `copies` of embedding and head
    in it, as DeepSeek-V3 and GLM-4.5 have. The tokenizer's files are those of a folder, or trained on the spot."""
    own, layer, further = PREDICTING[family]
    torch.manual_seed(0)
    nested = "text_config" in own
    settings = {"vocab_size": length_of(tokenizer) if tokenizer else VOCABULARY}
    if nested:
        own = own | {"text_config": own["text_config"] | settings}
    config = AutoConfig.for_model(family, **({} if nested else SMALL | settings) | own)
    whole = AutoModelForImageTextToText if nested else AutoModelForCausalLM
    whole.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    if tokenizer:
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    else:
        write_tokenizer_for(folder, family)

    def add(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        further_ones = {
            name.replace(layer, further): value.clone() for name, value in held.items() if name.startswith(layer)
        }
        further_ones[f"{further}enorm.weight"] = torch.ones(64, dtype=torch.bfloat16)
        if copies:
            further_ones[f"{further}embed_tokens.weight"] = held["model.embed_tokens.weight"].clone()
            further_ones[f"{further}shared_head.head.weight"] = held["lm_head.weight"].clone()
        return held | further_ones

    edit_tensors(folder, add)
    return folder
