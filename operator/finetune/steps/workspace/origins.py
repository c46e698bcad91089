"""Which row of which source each training example comes from: kept beside the training data for the day when something
is wrong with one of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune.api.spec import DatasetSource

FILE = "origins"
"""One entry of `ENTRY` for each example, in the order of the training data."""

ENTRY = np.dtype([("source", "<i2"), ("row", "<i8")])
"""Both count from 0; the row's number is that in the source's split."""

NAMED = 8
"""Rows that a sentence names."""


def entries(sources: npt.NDArray[np.int16], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
    """What FILE holds of examples that come from these sources, and in each from that row."""
    found = np.empty(len(rows), ENTRY)
    found["source"], found["row"] = sources, rows
    return found


def named(folder: Path, examples: Iterable[int], sources: Sequence[DatasetSource]) -> str:
    """The rows that these examples of the training data in `folder` come from, as the user knows them."""
    origins = np.memmap(folder / FILE, ENTRY, "r")
    rows = sorted({(int(origins[example]["source"]), int(origins[example]["row"])) for example in examples})
    parts = []
    for source, found in groupby(rows[:NAMED], key=lambda row: row[0]):
        numbers = [str(row + 1) for _, row in found]
        spec = sources[source]
        parts.append(f"row{'s' * (len(numbers) > 1)} {', '.join(numbers)} of {spec.split} in {spec.uri}")
    more = f" and {len(rows) - NAMED} more" if rows[NAMED:] else ""
    return "; ".join(parts) + more
