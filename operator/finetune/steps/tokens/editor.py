"""The streamed edit: a checkpoint with more embedding rows, written without loading it.

Files without token matrices are linked or copied whole. In the others the kernel copies every old byte, and only the
new rows pass through memory, so neither time nor memory depends on how the model computes.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from finetune.steps.model_files.checkpoint import INDEX, Checkpoint
from finetune.steps.model_files.copying import Count, copy_range, take_file, write_all
from finetune.steps.model_files.floats import decode
from finetune.steps.model_files.safetensors_file import Header, Tensor, write_header
from finetune.steps.token_matrices.matrices import Matrices
from finetune.steps.tokens.initialise import Init, OldRows, VocabularyMean, initial_rows

SAMPLED = 256
"""Rows that a usual norm is taken of."""

ROWS_AT_ONCE = 1024
"""New rows that are held in memory at a time."""


def extend(
    checkpoint: Checkpoint,
    matrices: Matrices,
    rows: int,
    inits: Mapping[int, Init],
    trained_rows: int,
    target: Path,
    count: Count,
) -> None:
    """Write the weights of `checkpoint` into the folder `target`, with token matrices of `rows` rows.

    `inits` says what the row of each new token holds, by id; rows that are new without being a token's hold the mean
    of the vocabulary, which is that of the first `trained_rows` rows. Every other row keeps its bytes.
    """
    for file, header in checkpoint.headers.items():
        if matrices.names_in(header):
            _extend_file(checkpoint.folder / file, header, matrices, rows, inits, trained_rows, target / file, count)
        else:
            take_file(checkpoint.folder / file, target / file, count, link=True)
    if checkpoint.index is not None:
        _write_index(checkpoint, matrices, rows, target / INDEX)


def extended_size(checkpoint: Checkpoint, matrices: Matrices, rows: int) -> int:
    """Bytes of the weight files after the edit."""
    return checkpoint.size + sum(
        (rows - matrices.rows) * _row_bytes(checkpoint.tensors[name]) for name in matrices.names
    )


def columns_of(tensor: Tensor) -> int:
    """How many numbers a row has; one, for the bias of a head."""
    return math.prod(tensor.shape[1:])


def row_norm(checkpoint: Checkpoint, name: str, row: int | None, trained_rows: int) -> float:
    """The Euclidean norm of a matrix's row; with None the mean over some of the first `trained_rows`, evenly spaced."""
    tensor = checkpoint.tensors[name]
    file, header = next((file, header) for file, header in checkpoint.headers.items() if name in header.tensors)
    rows = range(0, trained_rows, -(-trained_rows // SAMPLED)) if row is None else [row]
    norms = []
    with (checkpoint.folder / file).open("rb") as source:
        for each in rows:
            place = header.data_start + tensor.start + each * _row_bytes(tensor)
            values = decode(os.pread(source.fileno(), _row_bytes(tensor), place), tensor.dtype)
            norms.append(float(np.linalg.norm(values)))
    return sum(norms) / len(norms)


def _row_bytes(tensor: Tensor) -> int:
    return tensor.size // tensor.shape[0]


def _extend_file(
    path: Path,
    header: Header,
    matrices: Matrices,
    rows: int,
    inits: Mapping[int, Init],
    trained_rows: int,
    target: Path,
    count: Count,
) -> None:
    target.unlink(missing_ok=True)
    with path.open("rb") as source, target.open("wb") as written:
        extended = _extended_header(header, matrices, rows)
        write_header(written, extended, _aligned_start(header, extended))
        written.flush()
        first = 0
        for name, tensor in header.tensors.items():
            if name not in matrices.names:
                continue
            copy_range(
                source.fileno(), header.data_start + first, header.data_start + tensor.start, written.fileno(), count
            )
            _extend_matrix(source, header.data_start, tensor, rows, inits, trained_rows, written, count)
            first = tensor.end
        copy_range(
            source.fileno(), header.data_start + first, header.data_start + header.data_size, written.fileno(), count
        )


def _extend_matrix(
    source: BinaryIO,
    data_start: int,
    tensor: Tensor,
    rows: int,
    inits: Mapping[int, Init],
    trained_rows: int,
    written: BinaryIO,
    count: Count,
) -> None:
    old_rows, row_bytes = tensor.shape[0], _row_bytes(tensor)
    start = data_start + tensor.start

    def read(first: int, last: int) -> bytes:
        return os.pread(source.fileno(), (last - first) * row_bytes, start + first * row_bytes)

    old = OldRows(read, tensor.dtype, trained_rows, columns_of(tensor))
    place = os.lseek(written.fileno(), 0, os.SEEK_CUR)
    copy_range(source.fileno(), start, start + tensor.size, written.fileno(), count)
    for first in range(old_rows, rows, ROWS_AT_ONCE):
        ids = range(first, min(first + ROWS_AT_ONCE, rows))
        write_all(written.fileno(), initial_rows((inits.get(id_, VocabularyMean()) for id_ in ids), old))
        count(len(ids) * row_bytes)
    for id_, init in inits.items():
        if id_ < old_rows:
            os.pwrite(written.fileno(), initial_rows([init], old), place + id_ * row_bytes)


def _extended_header(header: Header, matrices: Matrices, rows: int) -> Header:
    tensors: dict[str, Tensor] = {}
    position = 0
    for name, tensor in header.tensors.items():
        shape, size = tensor.shape, tensor.size
        if name in matrices.names:
            shape, size = (rows, *tensor.shape[1:]), rows * _row_bytes(tensor)
        tensors[name] = replace(tensor, shape=shape, start=position, end=position + size)
        position += size
    return replace(header, tensors=tensors)


def _aligned_start(old: Header, new: Header) -> int:
    """Where, modulo a page, the new data has to start for most of the old bytes to keep their place in their page."""
    moved: Counter[int] = Counter()
    for name, tensor in old.tensors.items():
        if new.tensors[name].size == tensor.size:
            moved[new.tensors[name].start - tensor.start] += tensor.size
    return old.data_start - max(moved, key=lambda distance: moved[distance], default=0)


def _write_index(checkpoint: Checkpoint, matrices: Matrices, rows: int, path: Path) -> None:
    index = dict(checkpoint.index or {})
    metadata = dict(index.get("metadata") or {})
    size = sum(header.data_size for header in checkpoint.headers.values())
    metadata["total_size"] = size + extended_size(checkpoint, matrices, rows) - checkpoint.size
    if isinstance(metadata.get("total_parameters"), int):
        metadata["total_parameters"] += sum(
            (rows - matrices.rows) * columns_of(checkpoint.tensors[name]) for name in matrices.names
        )
    path.write_text(json.dumps({**index, "metadata": metadata}, indent=2) + "\n")
