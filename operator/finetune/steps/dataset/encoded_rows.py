"""The encoded examples of all sources on disk, in the order in which they were read.

Between reading and writing stands the question which examples come, how often and in what order. It is answered on a
few numbers for each example; the ids stay on disk, where the answer picks them up.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from finetune.steps.dataset.encode import Encoded

if TYPE_CHECKING:
    from hashlib import _Hash

Numbers = npt.NDArray[np.int64]


class EncodedRows:
    """Examples by number: ids and learned marks in two files, length, row, source and category in memory (about 30
    bytes for each example)."""

    def __init__(self, folder: Path, *, keyed: bool = False) -> None:
        """`folder` is made, or emptied of former files. `keyed`: a key of its content is kept for each example."""
        folder.mkdir(parents=True, exist_ok=True)
        self._paths = folder / "ids", folder / "learned"
        self._files = [path.open("wb") for path in self._paths]
        self._columns: dict[str, list[npt.NDArray[Any]]] = {
            name: [] for name in ("lengths", "rows", "sources", "categories", "keys")
        }
        self._keyed = keyed
        self._digests: dict[int, _Hash] = {}

    def append(self, encoded: Sequence[Encoded], first_row: int, source: int, categories: Sequence[int] | None) -> None:
        """Add examples of a source; `first_row` is the number of the first of the rows that they come from."""
        if not encoded:
            return
        lengths = np.fromiter((len(each.ids) for each in encoded), np.int32, len(encoded))
        rows = np.fromiter((each.row for each in encoded), np.int64, len(encoded))
        total = int(lengths.sum())
        ids = array("i")
        for each in encoded:
            ids.fromlist(each.ids)
        learned = np.zeros(total, bool)
        start = 0
        for each in encoded:
            for first, last in each.learned:
                learned[start + first : start + last] = True
            start += len(each.ids)
        data = ids.tobytes()
        self._files[0].write(data)
        self._files[1].write(learned.tobytes())
        for part in (lengths.tobytes(), data, learned.tobytes()):
            self._digests.setdefault(source, hashlib.sha256()).update(part)
        keys = _keys(data, lengths) if self._keyed else np.zeros(0, np.uint64)
        kinds = np.zeros(len(encoded), np.int32) if categories is None else np.asarray(categories, np.int32)[rows]
        for name, column in (
            ("lengths", lengths),
            ("rows", rows + first_row),
            ("sources", np.full(len(encoded), source, np.int16)),
            ("categories", kinds),
            ("keys", keys),
        ):
            self._columns[name].append(column)

    def finish(self) -> None:
        """No more examples come."""
        for file in self._files:
            file.close()

    def _column(self, name: str) -> npt.NDArray[Any]:
        parts = self._columns[name]
        if len(parts) > 1:
            parts[:] = [np.concatenate(parts)]
        return parts[0] if parts else np.zeros(0, np.int64)

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each example."""
        return self._column("lengths")

    @property
    def rows(self) -> Numbers:
        """The number of the row in its source, from 0, that each example comes from."""
        return self._column("rows")

    @property
    def sources(self) -> npt.NDArray[np.int16]:
        return self._column("sources")

    @property
    def categories(self) -> npt.NDArray[np.int32]:
        """A number for each category of a source; the same for all where the rows have none."""
        return self._column("categories")

    @property
    def keys(self) -> npt.NDArray[np.uint64]:
        """A number for what each example says: equal for equal ids."""
        return self._column("keys")

    def digest(self, source: int) -> str:
        """SHA-256 of all that a source gave, in its order."""
        return self._digests[source].hexdigest() if source in self._digests else ""

    @cached_property
    def _starts(self) -> Numbers:
        return np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))

    def tokens(self, numbers: Numbers) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Ids and learned marks of these examples, one after the other."""
        all_ids, all_learned = self._mapped
        starts = self._starts
        spans = [slice(starts[number], starts[number + 1]) for number in numbers]
        return np.concatenate([all_ids[span] for span in spans]), np.concatenate([all_learned[span] for span in spans])

    @cached_property
    def _mapped(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        ids, learned = self._paths
        return np.memmap(ids, "<i4", "r"), np.memmap(learned, bool, "r")


def _keys(ids: bytes, lengths: npt.NDArray[np.int32]) -> npt.NDArray[np.uint64]:
    ends = 4 * np.cumsum(lengths, dtype=np.int64)
    whole = memoryview(ids)
    keys = (
        hashlib.blake2b(whole[start:end], digest_size=8).digest()
        for start, end in zip(ends - 4 * lengths, ends, strict=True)
    )
    return np.frombuffer(b"".join(keys), "<u8")
