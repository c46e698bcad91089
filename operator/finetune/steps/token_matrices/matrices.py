"""The tensors of a checkpoint that have one row for each token, and what must be true of them before any is edited."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.steps.model_files.floats import EDITABLE_DTYPES
from finetune.steps.model_files.safetensors_file import Header, Tensor


class NotEditable(ValueError):
    """Tokens cannot be added to the checkpoint; the message says why."""


class UnknownArchitecture(NotEditable):
    """Table and shapes do not prove which tensors to extend; transformers might know."""


@dataclass(frozen=True)
class Matrices:
    """The tensors with one row per token: the embedding, the head unless that is tied to it, and the head's bias,
    whose rows are single numbers; and copies of embedding and head that further layers have."""

    names: tuple[str, ...]
    rows: int

    def names_in(self, header: Header) -> list[str]:
        """Those of them that a file holds."""
        return [name for name in header.tensors if name in self.names]


COPIES = re.compile(r"(?:^|\.)(?:embed_tokens|lm_head|shared_head\.(?:head|output))\.weight$")
"""How copies of embedding and head are called, wherever they lie."""


def copies_of(names: Collection[str], tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Further copies of embedding or head, by name and shape.

    Layers that predict a further token have them (DeepSeek-V3, GLM-4.5), transformers does not load them, and servers
    build them with as many rows as the vocabulary has."""
    shapes = {tensors[name].shape for name in names if len(tensors[name].shape) == 2}
    return tuple(
        name
        for name, tensor in tensors.items()
        if name not in names and COPIES.search(name) and tensor.shape in shapes and tensor.dtype in EDITABLE_DTYPES
    )


def check_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[Any, ...]]) -> tuple[str, ...]:
    """The names, when each is a tensor of its shape and of a type whose rows can be made.

    Raises UnknownArchitecture for a shape, NotEditable for a type.
    """
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise UnknownArchitecture(
                f"{name} has shape {list(tensor.shape)}, config.json's vocabulary and width say {list(shape)}"
            )
        if tensor.dtype not in EDITABLE_DTYPES:
            raise NotEditable(f"{name} has dtype {tensor.dtype}, not one of {', '.join(EDITABLE_DTYPES)}")
    return tuple(expected)
