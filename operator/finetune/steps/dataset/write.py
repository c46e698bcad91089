"""Writes encoded examples as an Arrow dataset, in bounded memory, counting and digesting on the way."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter

from finetune.steps.dataset.encode import IGNORED, Encoded

if TYPE_CHECKING:
    from hashlib import _Hash

FEATURES = {"input_ids": datasets.List(datasets.Value("int32")), "labels": datasets.List(datasets.Value("int32"))}
ROWS_IN_MEMORY = 1_000


class DatasetWriter:
    """Writes a folder that `datasets.load_from_disk` reads. Counts examples, tokens, learned tokens; notes the ids."""

    def __init__(self, folder: Path, vocabulary: int, hasher: _Hash) -> None:
        """`hasher` takes in the bytes of every example: length, ids, labels, as little-endian int32."""
        self.examples = self.tokens = self.learned = 0
        self.seen = np.zeros(vocabulary, bool)
        self._folder, self._hasher = folder, hasher
        self._file = folder.with_suffix(".arrow")
        self._writer = ArrowWriter(
            features=datasets.Features(FEATURES), path=str(self._file), writer_batch_size=ROWS_IN_MEMORY
        )

    def write(self, examples: Iterable[Encoded]) -> None:
        """Append examples."""
        for example in examples:
            ids, labels = np.asarray(example.ids, "<i4"), np.asarray(example.labels, "<i4")
            self._hasher.update(np.asarray([len(ids)], "<i4").tobytes() + ids.tobytes() + labels.tobytes())
            self.seen[ids] = True
            self.examples += 1
            self.tokens += len(ids)
            self.learned += int((labels != IGNORED).sum())
            self._writer.write({"input_ids": ids, "labels": labels})

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._writer.close()
        elif self.examples:
            self._writer.finalize()
            _folder_of(self._file).save_to_disk(str(self._folder))
        else:
            self._writer.close()
            datasets.Dataset.from_dict({"input_ids": [], "labels": []}, datasets.Features(FEATURES)).save_to_disk(
                str(self._folder)
            )
        self._file.unlink(missing_ok=True)


def _folder_of(file: Path) -> Any:
    return datasets.Dataset.from_file(str(file))
