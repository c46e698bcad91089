"""Writes the training data as an Arrow dataset, in bounded memory, counting and digesting on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from finetune.steps.dataset.encoded_rows import EncodedRows
from finetune.steps.workspace.origins import FILE as ORIGINS
from finetune.steps.workspace.origins import entries
from finetune.steps.workspace.training_data import FILE, IDS, IGNORED, LABELS, LENGTHS, write_state

if TYPE_CHECKING:
    from hashlib import _Hash

LISTS = datasets.List(datasets.Value("int32"))
TOKENS_IN_MEMORY = 1 << 18

Numbers = npt.NDArray[np.int64]


class DatasetWriter:
    """Writes a folder that `datasets.load_from_disk` reads: rows of input_ids and labels, and of seq_lengths, the
    lengths of the examples in a row, where examples are packed; and beside it where each example comes from. Counts
    rows, examples, tokens and learned tokens, and notes which ids occur."""

    def __init__(self, folder: Path, vocabulary: int, hasher: _Hash, *, packed: bool) -> None:
        """`hasher` takes in all that is written: lengths, ids and labels, as little-endian int32."""
        self.rows = self.examples = self.tokens = self.learned = 0
        self.seen = np.zeros(vocabulary, bool)
        self.ending = np.zeros(vocabulary, np.int64)
        """How often each token is the last of a learned span."""
        self.alone = np.zeros(vocabulary, np.int64)
        """How often it is the only one."""
        self._folder, self._hasher, self._packed = folder, hasher, packed

    def write(self, encoded: EncodedRows, rows: Iterable[Numbers]) -> Iterator[int]:
        """Write rows, each given as the numbers of its examples. Says after every batch how many examples it had."""
        self._folder.mkdir(parents=True, exist_ok=True)
        names = (IDS, LABELS, LENGTHS)[: 3 if self._packed else 2]
        features = datasets.Features(dict.fromkeys(names, LISTS))
        with (
            pa.ipc.new_stream(self._folder / FILE, features.arrow_schema) as stream,
            (self._folder / ORIGINS).open("wb") as origins,
        ):
            for batch in _batches(rows, encoded.lengths):
                columns = self._columns(encoded, batch)
                numbers = np.concatenate(batch)
                origins.write(entries(encoded.sources[numbers], encoded.rows[numbers]).tobytes())
                stream.write_batch(pa.record_batch(columns[: len(names)], schema=features.arrow_schema))
                yield sum(map(len, batch))
        datasets.DatasetInfo(features=features).write_to_directory(str(self._folder))
        write_state(self._folder, self._hasher.hexdigest()[:16])

    def _columns(self, encoded: EncodedRows, batch: Sequence[Numbers]) -> list[pa.Array]:
        """Ids, labels and lengths of some rows, as lists."""
        numbers = np.concatenate(batch)
        ids, learned = encoded.tokens(numbers)
        lengths = encoded.lengths[numbers].astype("<i4")
        learned[np.cumsum(lengths) - lengths] = False  # nothing predicts the first token of an example
        labels = np.where(learned, ids, np.int32(IGNORED)).astype("<i4")
        sizes = np.fromiter(map(len, batch), np.int32, len(batch))
        ends = np.cumsum(sizes)
        bounds = _offsets(np.add.reduceat(lengths, ends - sizes))
        self.rows += len(batch)
        self.examples += len(numbers)
        self.tokens += len(ids)
        self.learned += int(learned.sum())
        self.seen[ids] = True
        self._count_ends(ids, learned)
        for part in (lengths, ids, labels) if not self._packed else (sizes.astype("<i4"), lengths, ids, labels):
            self._hasher.update(part.tobytes())
        return [
            *(pa.ListArray.from_arrays(bounds, pa.array(values)) for values in (ids, labels)),
            pa.ListArray.from_arrays(_offsets(sizes), pa.array(lengths)),
        ]

    def _count_ends(self, ids: npt.NDArray[np.int32], learned: npt.NDArray[np.bool_]) -> None:
        """Spans never reach from one example into the next, since the first token of each is not learned."""
        bounds = np.diff(np.concatenate(([False], learned, [False])).astype(np.int8))
        starts, ends = np.flatnonzero(bounds == 1), np.flatnonzero(bounds == -1)
        last = ids[ends - 1]
        self.ending += np.bincount(last, minlength=len(self.ending))
        self.alone += np.bincount(last[ends - starts == 1], minlength=len(self.alone))


def _offsets(lengths: npt.NDArray[np.int32]) -> pa.Array:
    return pa.array(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32))


def _batches(rows: Iterable[Numbers], lengths: npt.NDArray[np.int32]) -> Iterator[list[Numbers]]:
    """Rows of about `TOKENS_IN_MEMORY` tokens together."""
    batch: list[Numbers] = []
    tokens = 0
    for row in rows:
        batch.append(row)
        tokens += int(lengths[row].sum())
        if tokens >= TOKENS_IN_MEMORY:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch


def unpacked(order: Numbers) -> Iterator[Numbers]:
    """Every example in a row of its own."""
    return (order[place : place + 1] for place in range(len(order)))


def paired(order: Numbers) -> Iterator[Numbers]:
    """A pair's two examples, of which the order numbers the first, in a row."""
    return (np.array((number, number + 1)) for number in order)


def joined(buckets: Iterable[Iterable[Numbers]]) -> Iterator[Numbers]:
    return chain.from_iterable(buckets)
