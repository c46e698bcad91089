"""The encoded examples on disk as torch wants them, read from a memory map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from finetune.steps.workspace.training_data import IDS, IGNORED, LABELS, LENGTHS, read_rows

Example = dict[str, torch.Tensor]
Batch = dict[str, Any]


class Examples(torch.utils.data.Dataset[Example]):
    """A folder that load-dataset wrote, one row at a time, straight from the page cache: input_ids and labels, and
    position_ids where a row packs several examples: they begin anew with each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        table = read_rows(folder)
        self._ids, self._labels = table[IDS], table[LABELS]
        self._lengths = table[LENGTHS] if LENGTHS in table.column_names else None

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def packed(self) -> bool:
        return self._lengths is not None

    def examples_in(self, index: int) -> range:
        """The examples that a row holds, by their numbers in the training data."""
        if self._lengths is None:
            return range(index, index + 1)
        ends = np.cumsum(pc.list_value_length(self._lengths))
        return range(int(ends[index - 1]) if index else 0, int(ends[index]))

    def __getitem__(self, index: int) -> Example:
        example = {"input_ids": _tensor(self._ids[index]), "labels": _tensor(self._labels[index])}
        if self._lengths is not None:
            example["position_ids"] = torch.cat([torch.arange(length) for length in self._lengths[index].as_py()])
        return example


def _tensor(numbers: pa.ListScalar) -> torch.Tensor:
    return torch.tensor(numbers.values.to_numpy(), dtype=torch.long)


class Collator:
    """Examples of different lengths as one batch: filled up on the right; what is filled carries no loss.

    Labels are padded by position, never by comparing with the pad id: that id may be a token to be learned (SmolLM2
    pads with its end marker). Rows that pack several examples come without an attention mask and without a cache:
    only then does transformers keep apart what begins anew at position 0.
    """

    def __init__(self, pad: int, multiple: int = 1) -> None:
        self._pad, self._multiple = pad, multiple

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Tensors of shape (examples, longest length): input_ids, labels, and attention_mask; or, for packed rows,
        position_ids, and use_cache (False)."""
        longest = max(len(example["input_ids"]) for example in examples)
        shape = (len(examples), -(-longest // self._multiple) * self._multiple)
        ids, labels = torch.full(shape, self._pad), torch.full(shape, IGNORED)
        places = torch.zeros(shape, dtype=torch.long)
        packed = "position_ids" in examples[0]
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            ids[row, :length], labels[row, :length] = example["input_ids"], example["labels"]
            places[row, :length] = example["position_ids"] if packed else 1
        further: Batch = {"position_ids": places, "use_cache": False} if packed else {"attention_mask": places}
        return {"input_ids": ids, **further, "labels": labels}


def tokens_in(batch: Batch) -> torch.Tensor:
    """How many tokens of a batch are not padding. In packed rows padding lies at position 0, and every example has at
    least two tokens, so that its first is counted with its second."""
    if (mask := batch.get("attention_mask")) is not None:
        count: torch.Tensor = mask.sum()
        return count
    positions: torch.Tensor = batch["position_ids"]
    return (positions > 0).sum() + (positions == 1).sum()
