"""Which rows of the dataset a loss that is no number comes from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from finetune.steps.train.examples import Examples

Batch = dict[str, Any]

NAMED = 8
"""Rows that a message names."""

SHOWN = 48
"""Characters of a row's text in a message."""


class Culprits:
    """Finds rows again by what they hold: nothing has to be carried along for the day when it is needed."""

    def __init__(self, examples: Examples, base: Path) -> None:
        """`base` is the folder of the tokenizer."""
        self._examples, self._base = examples, base

    def sentence(self, batches: Sequence[Batch]) -> str:
        """The rows of these batches, with the beginning of the first one's text."""
        wanted = [ids for batch in batches for ids in _rows(batch)]
        numbers = self._numbers(wanted)
        if not numbers:
            return ""
        named = ", ".join(map(str, numbers[:NAMED])) + (f" and {len(numbers) - NAMED} more" if numbers[NAMED:] else "")
        first = self._text(self._examples[numbers[0]]["input_ids"].tolist())
        return f"; in question: row{'s' * (len(numbers) > 1)} {named} of dataset/train, counted from 0 ({first!r} ...)"

    def _numbers(self, wanted: Sequence[torch.Tensor]) -> list[int]:
        keys = {ids.numpy().tobytes() for ids in wanted}
        lengths = {len(ids) for ids in wanted}
        found = []
        for number in range(len(self._examples)):
            ids = self._examples[number]["input_ids"]
            if len(ids) in lengths and ids.numpy().tobytes() in keys:
                found.append(number)
        return found

    def _text(self, ids: list[int]) -> str:
        path = self._base / "tokenizer.json"
        if not path.is_file():
            return f"ids {ids[:NAMED]}"
        return str(Tokenizer.from_file(str(path)).decode(ids[:SHOWN], skip_special_tokens=False))[:SHOWN]


def alone(batch: Batch, row: int) -> Batch:
    """One row of a batch as a batch."""
    return {name: value[row : row + 1] if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def _rows(batch: Batch) -> list[torch.Tensor]:
    """The ids of each row without its padding: what lies behind the last place that is not 0."""
    ids, places = batch["input_ids"].cpu(), batch.get("attention_mask", batch.get("position_ids"))
    if places is None:
        return list(ids)
    return [row[: int(place.nonzero().max()) + 1] for row, place in zip(ids, places.cpu(), strict=True) if place.any()]
