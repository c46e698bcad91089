"""Samples: what the model says before and after training."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune.api.schema import Model


class Samples(Model):
    """Prompts that the model answers before and after training, always with its likeliest next token."""

    prompts: list[Annotated[str, Field(min_length=1, max_length=4096)]] = Field(
        description="Each is a user's turn of the chat template; plain text to go on from where there is none, or with "
        "objective Pretraining.",
        min_length=1,
        max_length=16,
    )
    max_tokens: int = Field(64, description="Longest answer in tokens.", ge=1, le=1024)
