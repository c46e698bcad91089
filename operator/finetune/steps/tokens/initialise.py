"""What the new rows of an embedding matrix hold.

This arithmetic is the reference: means are summed in float64 in the order of the rows, divided, and rounded once, to
nearest even, to the matrix's type. Sums of 8- and 11-bit significands are nearly always exact in float64, so for bf16
and f16 other orders agree; for f32 libraries differ in the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

ITEM_BYTES: Mapping[str, int] = {"BF16": 2, "F16": 2, "F32": 4}

BLOCK_ROWS = 256
"""Rows that are summed at a time: a block of float64 stays near the processor's caches."""


@dataclass(frozen=True)
class Copy:
    """The row of an existing token, bit for bit."""

    row: int


@dataclass(frozen=True)
class Mean:
    """The mean of some rows, in this order; a row that occurs twice counts twice."""

    rows: tuple[int, ...]


@dataclass(frozen=True)
class VocabularyMean:
    """The mean of the rows of all old tokens: no token is more alike to it than to any other."""


Init = Copy | Mean | VocabularyMean

ReadRows = Callable[[int, int], bytes]
"""Bytes of the rows from `first` up to, not including, `last`."""


def initial_rows(inits: Sequence[Init], read: ReadRows, dtype: str, vocabulary_mean: Callable[[], Floats]) -> bytes:
    """The bytes of new rows, in order; `read` gives old ones. The vocabulary's mean is asked for only when needed."""
    return b"".join(_row(init, read, dtype, vocabulary_mean) for init in inits)


def _row(init: Init, read: ReadRows, dtype: str, vocabulary_mean: Callable[[], Floats]) -> bytes:
    match init:
        case Copy(row):
            return read(row, row + 1)
        case Mean(rows):
            return encode(mean((decode(read(row, row + 1), dtype) for row in rows), len(rows)), dtype)
        case VocabularyMean():
            return encode(vocabulary_mean(), dtype)


def mean(rows: Iterable[Floats], count: int) -> Floats:
    """The float64 mean of row vectors, summed in order."""
    total: Floats | None = None
    for row in rows:
        total = row.astype(np.float64) if total is None else total + row
    if total is None:
        raise ValueError("the mean of no rows")
    return total / count


def mean_of_all(read: ReadRows, rows: int, columns: int, dtype: str) -> Floats:
    """The float64 mean of rows 0 to `rows`, summed in order, in bounded memory.

    numpy reduces the outer axis row by row, each column for itself; the running total goes first into each block, so
    the result does not depend on the block's size.
    """
    block = np.zeros((BLOCK_ROWS + 1, columns))
    for first in range(0, rows, BLOCK_ROWS):
        last = min(first + BLOCK_ROWS, rows)
        part = block[: last - first + 1]
        part[1:] = _widened(read(first, last), dtype).reshape(-1, columns)
        part[0] = np.add.reduce(part, axis=0)
    return np.asarray(block[0] / rows)


def decode(data: bytes, dtype: str) -> Floats:
    """Elements as float64, exactly."""
    return _widened(data, dtype).astype(np.float64)


def _widened(data: bytes, dtype: str) -> npt.NDArray[np.floating[Any]]:
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[dtype])


def encode(values: Floats, dtype: str) -> bytes:
    """float64 rounded once, to nearest even."""
    if dtype == "BF16":
        return _to_bf16(values).tobytes()
    with np.errstate(over="ignore"):
        return values.astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()


def _to_bf16(values: Floats) -> npt.NDArray[np.uint16]:
    """Round to odd in float32 first: its 16 spare bits then decide as the float64 would have, so nothing is rounded
    twice (S. Boldo, G. Melquiond, "Emulation of a FMA and correctly rounded sums", 2008)."""
    with np.errstate(over="ignore"):
        near = values.astype(np.float32)
    back = near.astype(np.float64)
    bits = near.view(np.uint32).copy()
    bits[np.abs(back) > np.abs(values)] -= 1
    bits[(back != values) & ~np.isnan(values)] |= 1
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype("<u2")
