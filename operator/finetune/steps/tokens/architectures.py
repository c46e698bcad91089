"""Which tensors of a checkpoint have one row for each token: a small table, and a proof by shape.

Names alone would be a guess and shapes alone could be a coincidence; an edit needs both. To support a further family,
add it to TABLE.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.steps.tokens.safetensors_file import Header, Tensor

EDITABLE_DTYPES = ("BF16", "F16", "F32")


class UnknownArchitecture(ValueError):
    """The checkpoint cannot be edited this way; the message says why."""


@dataclass(frozen=True)
class Family:
    """How a model family names its matrices, and whether they are one matrix when config.json does not say."""

    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    tied: bool = False


LLAMA_LIKE = Family()
TIED = Family(tied=True)

TABLE: Mapping[str, Family] = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "mixtral": LLAMA_LIKE,
    "phi3": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "smollm3": TIED,
    "gemma": TIED,
    "gemma2": TIED,
    "gemma3_text": TIED,
}
"""Families by config.json's model_type."""


@dataclass(frozen=True)
class Matrices:
    """The matrices with one row per token: the embedding, and the head unless that is tied to it."""

    names: tuple[str, ...]
    rows: int
    columns: int

    def names_in(self, header: Header) -> list[str]:
        """Those of them that a file holds."""
        return [name for name in header.tensors if name in self.names]


def token_matrices(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Matrices:
    """The matrices to extend, proven by the table, the configuration and the shapes.

    Raises UnknownArchitecture when any of the three disagrees or something else depends on the vocabulary's size.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in TABLE:
        raise UnknownArchitecture(f"model_type {model_type!r} is not among {', '.join(sorted(TABLE))}")
    if config.get("quantization_config"):
        raise UnknownArchitecture("the weights are quantised (config.json has a quantization_config)")
    family = TABLE[model_type]
    embedding = tensors.get(family.embedding)
    if embedding is None:
        raise UnknownArchitecture(f"there is no tensor {family.embedding}, which {model_type} has")
    rows = config.get("vocab_size")
    expected = (rows, config.get("hidden_size"))
    names = [family.embedding]
    if family.head in tensors:
        names.append(family.head)
    elif not config.get("tie_word_embeddings", family.tied):
        raise UnknownArchitecture(f"there is no tensor {family.head}, and config.json does not tie it to the embedding")
    for name in names:
        tensor = tensors[name]
        if tensor.shape != expected:
            raise UnknownArchitecture(
                f"{name} has shape {list(tensor.shape)}, config.json's vocab_size and hidden_size say {list(expected)}"
            )
        if tensor.dtype not in EDITABLE_DTYPES:
            raise UnknownArchitecture(f"{name} has dtype {tensor.dtype}, not one of {', '.join(EDITABLE_DTYPES)}")
    for name, tensor in tensors.items():
        if name not in names and rows in tensor.shape and rows != embedding.shape[1] and ".layers." not in name:
            raise UnknownArchitecture(f"{name} also depends on the vocabulary's size and is not in the table")
    return Matrices(tuple(names), *embedding.shape)
