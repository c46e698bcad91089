"""Rows that occur in training and in validation: what is measured on them is memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from finetune.steps.dataset.encoded_rows import EncodedRows
from finetune.steps.dataset.mixture import in_both, like_the_first

Places = npt.NDArray[np.int64]

NOWHERE = np.iinfo(np.int64).min
"""The place of a row that is neither trained on nor held out."""


def duplicates(encoded: EncodedRows, places: Sequence[Places], *, move: bool, own_source: bool) -> int:
    """How many rows that were to be trained on occur among those that are held out.

    `places` say where each row of a source stands; below zero it is held out. With `move` they are changed: equal rows
    are held out together, or, where validation has its `own_source`, not trained on.
    """
    if not len(encoded.rows):
        return 0
    first = np.flatnonzero(np.diff(encoded.rows, prepend=-1) | np.diff(encoded.sources, prepend=-1))
    sources, rows, keys = encoded.sources[first], encoded.rows[first], _row_keys(encoded.keys, first)
    held = np.zeros(len(rows), bool)
    for number, each in enumerate(places):
        held[sources == number] = each[rows[sources == number]] < 0
    both = in_both(keys, held)
    if move and both.any():
        goal = held if own_source else like_the_first(keys, held)
        for number, each in enumerate(places):
            here = sources == number
            if own_source:
                each[rows[here & both]] = NOWHERE
            each[rows[here & goal & ~held]] -= len(each)
            each[rows[here & held & ~goal]] += len(each)
    return int(both.sum())


def _row_keys(keys: npt.NDArray[np.uint64], first: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """One key for each row, of those of its examples, which begin at `first`; their order counts."""
    place = np.arange(len(keys)) - np.repeat(first, np.diff(np.append(first, len(keys))))
    mixed: npt.NDArray[np.uint64] = np.add.reduceat(keys * (2 * place + 1).astype(np.uint64), first)
    return mixed
