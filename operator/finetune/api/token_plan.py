"""What adding tokens would do: the result of `finetune-step add-tokens --dry-run`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from finetune.api.schema import Model


class Piece(Model):
    """A token of the base model."""

    id: int = Field(description="Its id.")
    text: str = Field(description="Its text; bytes that are no whole character as <0xE6>.")


class PlannedToken(Model):
    """A token that would be new."""

    content: str = Field(description="Its text.")
    id: int = Field(description="The id that it would get.")
    special: bool = Field(description="Whether skip_special_tokens would hide it.")
    pieces: list[Piece] = Field(description="What running text has in its place now.")
    leading_space: bool = Field(description="Whether that is with the space before it.")
    init: dict[str, Any] = Field(description="What its rows would start as, as in finetune-tokens.json.")


class PlannedMatrix(Model):
    """A tensor that would have more rows."""

    name: str = Field(description="Its name in the checkpoint.")
    dtype: str = Field(description="Its type, as safetensors writes it.")
    shape_before: list[int] = Field(description="Its shape now.")
    shape: list[int] = Field(description="Its shape then.")


class TokenPlan(Model):
    """The model before and after."""

    tokens: list[PlannedToken] = Field(
        description="Tokens that would be new, in the order of their ids; then those that are reused."
    )
    already_present: list[Piece] = Field(description="Tokens that are asked for and there already.")
    vocabulary_size_before: int = Field(description="Tokens of the tokenizer now.")
    vocabulary_size: int = Field(description="Tokens of the tokenizer then.")
    matrices: list[PlannedMatrix] = Field(description="Tensors with one row for each token.")
    size_bytes_before: int = Field(description="Size of the weights' files now.")
    size_bytes: int = Field(description="Size of the weights' files then.")
    warnings: list[str] = Field(description="What may surprise later.")
