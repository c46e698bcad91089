"""The proof that an edit changed nothing but what it had to: every old byte, compared in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from typing import BinaryIO

from finetune.steps.model_files.checkpoint import Checkpoint
from finetune.steps.model_files.copying import Count
from finetune.steps.model_files.safetensors_file import Header, Tensor

BLOCK = 4 << 20


def differences(
    before: Checkpoint, after: Checkpoint, matrices: Collection[str], new_ids: Collection[int], count: Count
) -> Iterator[str]:
    """What differs, in sentences: names, dtypes, shapes and bytes.

    The token matrices may have more rows than before, and their rows of `new_ids` may differ; nothing else may.
    """
    if list(before.headers) != list(after.headers):
        yield f"the weight files are {list(after.headers)}, not {list(before.headers)}"
        return
    for file, old in before.headers.items():
        new = after.headers[file]
        old_path, new_path = before.folder / file, after.folder / file
        if old_path.samefile(new_path):
            count(old.data_size)
            continue
        if list(old.tensors) != list(new.tensors):
            yield f"{file} does not hold the tensors that it held"
            continue
        with old_path.open("rb") as old_data, new_path.open("rb") as new_data:
            for name, tensor in old.tensors.items():
                changed = new_ids if name in matrices else ()
                yield from _differences(tensor, new.tensors[name], (old_data, old), (new_data, new), changed)
                count(tensor.size)


def _differences(
    old: Tensor,
    new: Tensor,
    old_file: tuple[BinaryIO, Header],
    new_file: tuple[BinaryIO, Header],
    new_ids: Collection[int],
) -> Iterator[str]:
    grown = old.shape != new.shape
    if old.dtype != new.dtype or (grown and not (new_ids and _has_more_rows(old, new))):
        yield f"{old.name} was {old.dtype} {list(old.shape)} and is {new.dtype} {list(new.shape)}"
        return
    rows = old.shape[0] if old.shape else 1
    row_bytes = old.size // rows if rows else 0
    inside = sorted(id_ for id_ in new_ids if id_ < rows)
    first = 0
    for id_ in [*inside, rows]:
        start, end = first * row_bytes, id_ * row_bytes
        if not _equal(old_file, old.start + start, new_file, new.start + start, end - start):
            yield f"{old.name} differs in its old rows {first} to {id_ - 1}"
        first = id_ + 1


def _has_more_rows(old: Tensor, new: Tensor) -> bool:
    return new.shape[1:] == old.shape[1:] and new.shape[0] > old.shape[0]


def _equal(
    old_file: tuple[BinaryIO, Header], old_start: int, new_file: tuple[BinaryIO, Header], new_start: int, size: int
) -> bool:
    (old, old_header), (new, new_header) = old_file, new_file
    for done in range(0, size, BLOCK):
        length = min(BLOCK, size - done)
        left = os.pread(old.fileno(), length, old_header.data_start + old_start + done)
        right = os.pread(new.fileno(), length, new_header.data_start + new_start + done)
        if left != right:
            return False
    return True
