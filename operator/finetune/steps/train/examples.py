"""The encoded examples on disk as torch wants them.

Read with pyarrow from a memory map: importing `datasets` (and pandas with it) would add seconds to every start.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import torch

from finetune.steps.dataset.encode import IGNORED

Example = dict[str, torch.Tensor]


class Examples(torch.utils.data.Dataset[Example]):
    """A folder that load-dataset wrote: ids and labels, one example at a time, straight from the page cache."""

    def __init__(self, folder: Path) -> None:
        files = [entry["filename"] for entry in json.loads((folder / "state.json").read_text())["_data_files"]]
        tables = [pa.ipc.open_stream(pa.memory_map(str(folder / name))).read_all() for name in files]
        table = pa.concat_tables(tables)
        self._ids, self._labels = table["input_ids"], table["labels"]

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Example:
        ids, labels = self._ids[index].values.to_numpy(), self._labels[index].values.to_numpy()
        return {"input_ids": torch.tensor(ids, dtype=torch.long), "labels": torch.tensor(labels, dtype=torch.long)}


class Collator:
    """Examples of different lengths as one batch: filled up on the right; what is filled carries no loss.

    Labels are padded by position, never by comparing with the pad id: that id may be a token to be learned (SmolLM2
    pads with its end marker).
    """

    def __init__(self, pad: int, multiple: int = 1) -> None:
        self._pad, self._multiple = pad, multiple

    def __call__(self, examples: Sequence[Example]) -> Example:
        """Tensors of shape (examples, longest length): input_ids, attention_mask, labels."""
        longest = max(len(example["input_ids"]) for example in examples)
        shape = (len(examples), -(-longest // self._multiple) * self._multiple)
        ids, mask = torch.full(shape, self._pad), torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED)
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            ids[row, :length], labels[row, :length], mask[row, :length] = example["input_ids"], example["labels"], 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
