"""Which tensors of a checkpoint have one row for each token: a small table, and a proof by shape.

Names alone would be a guess and shapes alone could be a coincidence; an edit needs both. To support a further family,
add it to TABLE. Where table and shapes prove nothing, transformers is asked, if it can be: see `resizing`.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.steps.model_files.checkpoint import Checkpoint
from finetune.steps.model_files.config import quantised, read_config
from finetune.steps.model_files.safetensors_file import Tensor
from finetune.steps.token_matrices.matrices import Matrices, NotEditable, UnknownArchitecture, check_shapes, copies_of

WIDTHS = ("word_embed_proj_dim", "hidden_size", "n_embd", "n_embed", "d_model")
"""How configurations call the number of columns; the first that is there counts (OPT's hidden_size is another one)."""


@dataclass(frozen=True)
class Family:
    """How a model family names its matrices, and whether they are one matrix when config.json does not say.

    `embedding` lies below `body`, which files of the base model alone leave out (GPT-2's and BLOOM's do).
    """

    body: str = "model"
    embedding: str = "embed_tokens.weight"
    head: str = "lm_head.weight"
    tied: bool = False

    def embeddings(self, *, nested: bool) -> tuple[str, ...]:
        """The names that the embedding may have; `nested` in a model of several parts."""
        if nested:
            return (
                f"model.language_model.{self.embedding}",
                f"language_model.{self.body}.{self.embedding}",
                f"{self.body}.{self.embedding}",
            )
        return (f"{self.body}.{self.embedding}", self.embedding)

    def heads(self, *, nested: bool) -> tuple[str, ...]:
        """The names that the head may have."""
        return (self.head, f"language_model.{self.head}") if nested else (self.head,)


LLAMA_LIKE = Family()
TIED = Family(tied=True)
GPT_LIKE = Family(body="transformer", embedding="wte.weight", tied=True)
GPT_J_LIKE = Family(body="transformer", embedding="wte.weight")

TABLE: Mapping[str, Family] = {
    **dict.fromkeys(
        (
            "llama", "mistral", "ministral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "phi",
            "phi3", "phimoe", "olmo", "olmo2", "olmo3", "olmoe", "granite", "granitemoe", "stablelm", "glm", "glm4",
            "nemotron", "seed_oss", "gpt_oss", "exaone4", "helium", "arcee", "apertus",
            "hunyuan_v1_dense",
        ),
        LLAMA_LIKE,
    ),
    **dict.fromkeys(
        (
            "gemma", "gemma2", "gemma3_text", "smollm3", "starcoder2", "cohere", "cohere2", "ernie4_5", "lfm2",
        ),
        TIED,
    ),
    **dict.fromkeys(("gpt2", "gpt_neo", "gpt_bigcode", "mpt"), GPT_LIKE),
    **dict.fromkeys(("gptj", "codegen"), GPT_J_LIKE),
    **dict.fromkeys(
        ("bloom", "falcon"), Family(body="transformer", embedding="word_embeddings.weight", tied=True)
    ),
    "gpt_neox": Family(body="gpt_neox", embedding="embed_in.weight", head="embed_out.weight"),
    "opt": Family(embedding="decoder.embed_tokens.weight", tied=True),
    "mamba": Family(body="backbone", embedding="embeddings.weight", tied=True),
}  # fmt: skip
"""Families by the model_type in config.json, the text part's in a model of several parts."""


def matrices_of(checkpoint: Checkpoint) -> Matrices:
    """The matrices to extend, proven by the table and the shapes, or else found by transformers where torch is there.

    Raises NotEditable when neither can tell.
    """
    try:
        return token_matrices(read_config(checkpoint.folder), checkpoint.tensors)
    except UnknownArchitecture as unproven:
        if importlib.util.find_spec("torch") is None:
            raise UnknownArchitecture(
                f"{unproven}; transformers could tell which tensors to extend, but torch is not installed here"
            ) from unproven
        from finetune.steps.token_matrices.resizing import matrices_by_resizing  # imports torch

        return matrices_by_resizing(checkpoint, unproven)


def token_matrices(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Matrices:
    """The matrices to extend, proven by the table, the configuration and the shapes.

    Raises UnknownArchitecture when any of the three disagrees, NotEditable when transformers could not help either.
    """
    if how := quantised(config):
        raise NotEditable(f"the weights are quantised ({how}, says config.json)")
    if per_layer := [name for name in tensors if "per_layer" in name and "embed" in name]:
        raise NotEditable(f"it has per-layer embeddings ({per_layer[0]}): no row of those can be made for a new token")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in TABLE:
        raise UnknownArchitecture(f"the operator does not know the model_type {model_type!r}")
    family, nested = TABLE[model_type], isinstance(config.get("text_config"), dict)
    embedding = _one_of(family.embeddings(nested=nested), tensors)
    if embedding is None:
        wanted = " or ".join(family.embeddings(nested=nested))
        raise UnknownArchitecture(f"there is no tensor {wanted}, which {model_type} has")
    heads = family.heads(nested=nested)
    head = _one_of(heads, tensors)
    if head is None and not config.get("tie_word_embeddings", family.tied):
        raise UnknownArchitecture(
            f"there is no tensor {' or '.join(heads)}, and config.json does not tie it to the embedding"
        )
    bias = _one_of([f"{name.removesuffix('weight')}bias" for name in heads], tensors)
    rows = config.get("vocab_size")
    width = next((config[name] for name in WIDTHS if name in config), None)
    names = check_shapes(
        tensors, {name: (rows, width) for name in (embedding, head) if name} | ({bias: (rows,)} if bias else {})
    )
    for name, tensor in tensors.items():
        if name not in names and rows in tensor.shape and rows != width and not re.search(r"\.\d+\.", name):
            raise UnknownArchitecture(f"{name} also depends on the vocabulary's size and is not in the table")
    return Matrices((*names, *copies_of(names, tensors)), tensors[embedding].shape[0])


def _one_of(names: Sequence[str], tensors: Mapping[str, Tensor]) -> str | None:
    present = [name for name in names if name in tensors]
    if len(present) > 1:
        raise NotEditable(f"{' and '.join(present)} are both there: which of them counts is not said")
    return present[0] if present else None
