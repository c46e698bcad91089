"""Which rows of the dataset a loss that is no number comes from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from finetune.api.spec import DatasetSource
from finetune.steps.train.data.examples import Examples
from finetune.steps.workspace.origins import named

Batch = dict[str, Any]

SHOWN = 48
"""Characters of a row's text in a message."""

SHOWN_IDS = 8


class Culprits:
    """Finds rows again by what they hold: no batch has to carry its rows' numbers for the day when they are needed."""

    def __init__(self, examples: Examples, base: Path, sources: Sequence[DatasetSource]) -> None:
        """`base` is the folder of the tokenizer; `sources` are those of the spec, all that rows come from."""
        self._examples, self._base, self._sources = examples, base, sources

    def sentence(self, batches: Sequence[Batch]) -> str:
        """The rows of these batches, with the beginning of the first one's text; the end of a sentence."""
        return self.named(self._numbers([ids for batch in batches for ids in _rows(batch)]))

    def named(self, rows: Sequence[int]) -> str:
        """The same, of rows of the training data by their numbers."""
        if not rows:
            return ""
        examples = [example for row in rows for example in self._examples.examples_in(row)]
        first = self._text(self._examples[rows[0]]["input_ids"].tolist())
        return f"; in question: {named(self._examples.folder, examples, self._sources)} ({first!r} ...)"

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
            return f"ids {ids[:SHOWN_IDS]}"
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
