"""How a trained adapter is merged into the files of its base: worked out before the first step, where torch is and the
model is loaded, and used by `save`, where neither is.

A layer of the adapter changes a weight in memory, and that weight lies in the files in blocks: under another name, as
one matrix for each expert, as a part of a larger matrix, transposed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

FILE = "finetune-merge.json"


class Range(NamedTuple):
    """Rows or columns: from `first` to `last` (both are part of it), in steps."""

    first: int
    last: int
    step: int = 1

    @property
    def slice(self) -> slice:
        return slice(self.first, self.last + 1, self.step)


class Block(NamedTuple):
    """Where rows and columns of a weight (of one of its experts) lie in a tensor of the files.

    They begin at `row` of the tensor, which is taken as a matrix of as many columns as its last dimension has; with
    `transposed` it is their transpose that lies there.
    """

    tensor: str
    row: int
    expert: int
    rows: Range
    columns: Range
    transposed: bool = False


@dataclass(frozen=True)
class Adapted:
    """A layer of an adapter, by the name that its tensors in the adapter's file begin with.

    `experts` is None for LoRA on a matrix; for a stack of them (peft's target_parameters) it is their number, and
    `inputs_first` says whether each is (inputs, outputs) instead of (outputs, inputs). `scale` is alpha / rank. With
    `ids` it is not LoRA: its rows replace those of these tokens.
    """

    layer: str
    blocks: tuple[Block, ...]
    scale: float = 1.0
    experts: int | None = None
    inputs_first: bool = False
    ids: tuple[int, ...] | None = None


def write_merge_record(folder: Path, layers: Iterable[Adapted]) -> None:
    """Leave the record beside the adapter, one line for each layer."""
    lines = (json.dumps(vars(layer)) for layer in layers)
    (folder / FILE).write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def read_merge_record(folder: Path) -> list[Adapted]:
    """The layers of the adapter in `folder`."""
    return [_layer(**entry) for entry in json.loads((folder / FILE).read_text())]


def _layer(blocks: list[list[object]], ids: list[int] | None, **others: object) -> Adapted:
    places = tuple(
        Block(tensor, row, expert, Range(*rows), Range(*columns), transposed)  # type: ignore[arg-type,misc]
        for tensor, row, expert, rows, columns, transposed in blocks
    )
    return Adapted(blocks=places, ids=None if ids is None else tuple(ids), **others)  # type: ignore[arg-type]
