"""The rows of docs/families.md: families of models, as tiny random checkpoints with the tensor names of published ones,
each with a tokenizer, and with the chat template that its vendor gave it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.unit.steps.families import SMALL, edit_config, tiny_of
from tests.unit.steps.published import with_prediction_layer
from tests.unit.steps.quantised import KINDS

SCALE = {"query_pre_attn_scalar": SMALL["head_dim"]}
EQUAL_HEADS = {"num_key_value_heads": SMALL["num_attention_heads"]}
PUBLISHED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("gemma2", "gemma3_text", "gemma3"), SCALE),
    "phi": EQUAL_HEADS | {"intermediate_size": 4 * SMALL["hidden_size"]},
    "olmoe": EQUAL_HEADS,
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
}
"""Settings that published checkpoints have too, and which llama.cpp takes for granted without a look at config.json."""

WRITTEN: dict[str, dict[str, Any]] = {"gpt2": {"n_ctx": 1024}, "falcon": {"num_kv_heads": 1}}
"""Fields of config.json that transformers 5 does not write or takes for granted, and llama.cpp's converter asks for."""

Make = Callable[[Path, Path | None], Any]
"""Write a checkpoint into a folder, with the tokenizer in another one, or with a small one trained on the spot."""


class Family(NamedTuple):
    """A row: its kind, the model_type with what is special about it, and how a checkpoint is made."""

    kind: str
    name: str
    make: Make
    tokenizer: str | None = None
    """The vendor whose tokenizer every column has, and not only GGUF: llama.cpp's converter takes few others."""
    gguf: str | None = None
    """The vendor whose tokenizer the column GGUF has."""
    template: str | None = None
    """The vendor's chat template, by trl's name."""


def _plain(family: str) -> Make:
    def make(folder: Path, tokenizer: Path | None) -> None:
        # weights that are large enough for every part of a layer to matter to the logits
        tiny_of(
            folder, family, dtype=torch.float32, tokenizer=tokenizer, initializer_range=0.1, **PUBLISHED.get(family, {})
        )
        edit_config(folder, **WRITTEN.get(family, {}))

    return make


def _predicting(family: str) -> Make:
    def make(folder: Path, tokenizer: Path | None) -> None:
        with_prediction_layer(folder, family, copies=family != "qwen3_5", tokenizer=tokenizer)

    return make


def _declared(family: str, **config: Any) -> Make:
    def make(folder: Path, tokenizer: Path | None) -> None:
        tiny_of(folder, "llama")
        edit_config(folder, **({"model_type": family, "architectures": None} | config))

    return make


def _published(make: Callable[[Path], Any]) -> Make:
    return lambda folder, tokenizer: make(folder)


def _family(kind: str, name: str, gguf: str | None = None, template: str | None = None) -> Family:
    return Family(kind, name, _plain(name), None, gguf, template)


def _sentencepiece(name: str, tokenizer: str, gguf: str | None = None, template: str | None = None) -> Family:
    """A family that is published with tokenizer.model."""
    title = name if tokenizer == "Gemma" else f"{name} ({tokenizer})"
    return Family("sentencepiece", title, _plain(name), tokenizer, gguf or tokenizer, template)


ELSE = "SmolLM2"
"""The vendor whose tokenizer stands in where no package carries the family's own, in the column GGUF."""

FAMILIES = (
    _family("dense", "llama", "Llama 3", "llama3_1"),
    _family("dense", "qwen2", "Qwen3", "qwen2_5"),
    _family("dense", "qwen3", "Qwen3", "qwen3"),
    _family("dense", "phi", ELSE),
    _family("dense", "gpt2", ELSE),
    _family("dense", "gpt_neox", ELSE),
    _family("dense", "gptj", ELSE),
    _family("dense", "falcon", ELSE),
    _family("dense", "bloom", ELSE),
    _family("dense", "opt", ELSE),
    _family("dense", "olmo2", ELSE),
    _family("dense", "granite", ELSE),
    _family("dense", "smollm3", ELSE),
    _family("dense", "stablelm", ELSE),
    _family("dense", "starcoder2", ELSE),
    _family("dense", "glm4", "GLM"),
    _sentencepiece("llama", "Llama 2"),
    _sentencepiece("mistral", "Mistral v1"),
    _sentencepiece("mistral", "Mistral v3"),
    _sentencepiece("phi3", "Phi-3", template="phi3"),
    _sentencepiece("gemma", "Gemma", template="gemma"),
    _sentencepiece("gemma2", "Gemma", template="gemma"),
    _sentencepiece("gemma3_text", "Gemma", "Gemma 3", "gemma3"),
    Family("tekken", "mistral (Tekken)", _plain("mistral"), "Tekken", "Tekken"),
    Family("tekken", "mistral (Tekken without names)", _plain("mistral"), "Tekken without names"),
    _family("experts", "mixtral", "Mistral v1"),
    _family("experts", "qwen2_moe", "Qwen3", "qwen2_5"),
    _family("experts", "qwen3_moe", "Qwen3", "qwen3_instruct_2507"),
    _family("experts", "qwen3_next", "Qwen3", "qwen3_instruct_2507"),
    _family("experts", "olmoe", ELSE),
    _family("experts", "phimoe", ELSE),
    _family("experts", "granitemoe", ELSE),
    _family("experts", "gpt_oss", "gpt-oss", "gptoss"),
    _family("several parts", "gemma3", "Gemma", "gemma3"),
    Family("prediction layer", "glm4_moe", _predicting("glm4_moe"), None, "GLM", "glm4moe"),
    Family("prediction layer", "deepseek_v3", _predicting("deepseek_v3"), None, "DeepSeek-V3", "deepseekv3"),
    Family("prediction layer", "qwen3_5", _predicting("qwen3_5"), None, "Qwen3", "qwen3_5_think"),
    *(Family("quantised", name, _published(make)) for name, make in KINDS.items()),
    *(
        Family("quantised", f"llama ({method})", _declared("llama", quantization_config={"quant_method": method}))
        for method in ("gptq", "awq", "modelopt", "hqq", "torchao")
    ),
    *(Family("no decoder", name, _declared(name)) for name in ("t5", "bart", "bert")),
)
