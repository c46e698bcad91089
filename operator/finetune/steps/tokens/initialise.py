"""What the new rows of an embedding matrix hold.

This arithmetic is the reference: means are summed in float64 in the order of the rows, divided, and rounded once, to
nearest even, to the matrix's type. Sums of 8- and 11-bit significands are nearly always exact in float64, so for bf16
and f16 other orders agree; for f32 libraries differ in the last bit. What is drawn depends on the job's seed and the
token's id alone, not on the other tokens nor on the matrix: tied matrices that a file holds twice stay equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from finetune.steps.model_files.floats import Floats, decode, encode, widened

BLOCK_ROWS = 256
"""Rows that are summed at a time: a block of float64 stays near the processor's caches."""

COVARIANCE_ROWS = 2048
"""Rows that the covariance takes at a time: each time, all of it is written once."""


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


@dataclass(frozen=True)
class Normal:
    """A draw from N(mean, COVARIANCE_SCALE x covariance) of the old tokens' rows."""

    seed: tuple[int, int]


@dataclass(frozen=True)
class Noisy:
    """Another start, plus normal noise of `noise` standard deviations that the old tokens have in each column."""

    init: Copy | Mean | VocabularyMean
    noise: float
    seed: tuple[int, int]


Init = Copy | Mean | VocabularyMean | Normal | Noisy
"""A `seed` is the job's seed and the token's id."""

COVARIANCE_SCALE = 1e-5
"""Small enough that new tokens take no probability from old ones, large enough to survive the rounding to bf16, which
transformers' 1e-9 does not. (J. Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021)"""

LARGEST: Mapping[str, float] = {
    "BF16": float.fromhex("0x1.fep127"),
    "F16": 65504.0,
    "F32": float.fromhex("0x1.fffffep127"),
}
"""The largest finite numbers. A mean cannot exceed them, a draw could."""

ReadRows = Callable[[int, int], bytes]
"""Bytes of the rows from `first` up to, not including, `last`."""


class OldRows:
    """What the new rows of one matrix are made of: `read` gives its rows, the first `trained` of which are tokens'.

    What needs all rows is computed once, when it is first asked for, in bounded memory.
    """

    def __init__(self, read: ReadRows, dtype: str, trained: int, columns: int) -> None:
        self.dtype, self._read, self._trained, self._columns = dtype, read, trained, columns

    def bytes_of(self, row: int) -> bytes:
        """One row as it is."""
        return self._read(row, row + 1)

    def mean_of(self, rows: Sequence[int]) -> Floats:
        """The mean of some rows."""
        return mean((decode(self.bytes_of(row), self.dtype) for row in rows), len(rows))

    @cached_property
    def mean(self) -> Floats:
        """The mean of all tokens' rows."""
        return mean_of_all(self._read, self._trained, self._columns, self.dtype)

    @cached_property
    def deviation(self) -> Floats:
        """The standard deviation of each column over all tokens' rows."""
        squares = np.zeros(self._columns)
        for block in self._centered(BLOCK_ROWS):
            squares += np.square(block).sum(axis=0)
        return np.asarray(np.sqrt(squares / self._trained))

    @cached_property
    def factor(self) -> Floats:
        """A matrix whose product with its transpose is the covariance of all tokens' rows, columns x columns."""
        covariance = np.zeros((self._columns, self._columns))
        for block in self._centered(COVARIANCE_ROWS):
            covariance += block.T @ block
        covariance /= self._trained
        if not np.isfinite(covariance).all():
            return covariance  # as with every other start, what is wrong with the old rows shows in the new ones
        try:
            return np.asarray(np.linalg.cholesky(covariance), np.float64)
        except np.linalg.LinAlgError:  # fewer tokens than columns, or a column that never varies
            values, vectors = np.linalg.eigh(covariance)
            return np.asarray(vectors * np.sqrt(values.clip(min=0)))

    def _centered(self, rows: int) -> Iterator[Floats]:
        for first in range(0, self._trained, rows):
            last = min(first + rows, self._trained)
            with np.errstate(invalid="ignore"):
                yield decode(self._read(first, last), self.dtype).reshape(-1, self._columns) - self.mean


def factor_bytes(columns: int) -> int:
    """Memory that it takes at most to compute a matrix's `factor`: the decomposition's workspace, and blocks of rows in
    three forms."""
    return 8 * columns * (5 * columns + 3 * COVARIANCE_ROWS)


def initial_rows(inits: Iterable[Init], old: OldRows) -> bytes:
    """The bytes of new rows, in order."""
    return b"".join(_row(init, old) for init in inits)


def _row(init: Init, old: OldRows) -> bytes:
    match init:
        case Copy(row):
            return old.bytes_of(row)
        case Mean(rows):
            return encode(old.mean_of(rows), old.dtype)
        case VocabularyMean():
            return encode(old.mean, old.dtype)
        case Normal(seed):
            drawn = old.mean + np.sqrt(COVARIANCE_SCALE) * (old.factor @ _draw(seed, len(old.mean)))
        case Noisy(start, noise, seed):
            drawn = decode(_row(start, old), old.dtype) + noise * old.deviation * _draw(seed, len(old.deviation))
    return encode(drawn.clip(-LARGEST[old.dtype], LARGEST[old.dtype]), old.dtype)


def _draw(seed: tuple[int, int], columns: int) -> Floats:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed))).standard_normal(columns)


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
        part[1:] = widened(read(first, last), dtype).reshape(-1, columns)
        part[0] = np.add.reduce(part, axis=0)
    return np.asarray(block[0] / rows)
