"""A weight that quantised tensors make, and its numbers, rounded once.

Every method here comes to the same: a code stands for a number, a scale belongs to a block of codes, and now and then a
zero point with it. For each block, the numbers that its codes can stand for are computed in float64 and rounded once,
to nearest even; the codes then look theirs up. So memory and the work of rounding are those of a few rows and scales.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.steps.dequantisation.codes import E4M3, INT8, Bytes, Floats
from finetune.steps.model_files.checkpoint import Checkpoint
from finetune.steps.model_files.floats import decode, encode
from finetune.steps.model_files.safetensors_file import Tensor

AT_ONCE = 1 << 19
"""Numbers that are made at a time."""

NO_NUMBER = {"BF16": 0x7F80, "F16": 0x7C00}
"""The bits of the exponent: all of them are set in what is no finite number."""

PLAIN_DTYPES = ("BF16", "F16", "F32")

Half = npt.NDArray[np.uint16]
"""bf16 or f16, as bits."""


class NotDequantisable(ValueError):
    """The checkpoint cannot be written out as a plain one; the message says why."""


class Reader:
    """The tensors of a checkpoint, read as they are needed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tensors: Mapping[str, Tensor] = checkpoint.tensors
        self._open = ExitStack()
        self._places: dict[str, tuple[int, int]] = {}
        for file, header in checkpoint.headers.items():
            source = self._open.enter_context((checkpoint.folder / file).open("rb")).fileno()
            self._places |= {name: (source, header.data_start + each.start) for name, each in header.tensors.items()}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def rows(self, name: str, first: int, last: int, width: int) -> Bytes:
        """Bytes `first * width` to `last * width` of a tensor, as rows of that width; zeros beyond its end."""
        source, start = self._places[name]
        size = self.tensors[name].size
        data = os.pread(source, max(0, min(last * width, size) - first * width), start + first * width)
        found = np.frombuffer(data.ljust((last - first) * width, b"\0"), np.uint8)
        return found.reshape(last - first, width)

    def bytes_of(self, name: str) -> Bytes:
        """All bytes of a tensor."""
        return self.rows(name, 0, 1, self.tensors[name].size).reshape(-1)

    def numbers(self, name: str) -> Floats:
        """A small tensor's numbers in its shape, exactly."""
        tensor, data = self.tensors[name], self.bytes_of(name)
        if tensor.dtype in PLAIN_DTYPES:
            values = decode(data.tobytes(), tensor.dtype)
        elif tensor.dtype in ("I8", "F8_E4M3"):
            values = (INT8 if tensor.dtype == "I8" else E4M3)[data].astype(np.float64)
        elif tensor.dtype in ("I32", "I64"):
            values = data.view({"I32": "<i4", "I64": "<i8"}[tensor.dtype]).astype(np.float64)
        else:
            raise NotDequantisable(f"{name} has dtype {tensor.dtype}, and nothing says what its numbers are")
        return values.reshape(tensor.shape)


@dataclass(frozen=True)
class Grid:
    """What the codes of a weight's matrices stand for: `book` has a number for each code; `scales`, and `zeros` which
    are taken off before, are [matrices, block rows, block columns], for blocks of `height` rows and `width` columns.
    Scales that are codes themselves stand for numbers of `scale_book`. With `columns` it is said which block column
    each column belongs to."""

    book: Floats
    scales: npt.NDArray[Any]
    height: int = 1
    width: int = 1
    scale_book: Floats | None = None
    zeros: Floats | None = None
    columns: npt.NDArray[np.intp] | None = None

    def rounded(self, codes: Bytes, matrix: int, first: int, dtype: str) -> Half:
        """The numbers of whole rows of a matrix, of which `first` is the first."""
        row = np.arange(first, first + len(codes)) // self.height
        column = np.arange(codes.shape[1]) // self.width if self.columns is None else self.columns
        place = np.s_[matrix, row[0] : row[-1] + 1]
        scales = self.scales[place]
        if self.scale_book is None:
            zeros = 0.0 if self.zeros is None else self.zeros[place][..., None]
            table, block = (self.book - zeros) * scales[..., None], np.arange(scales.size).reshape(scales.shape)
        else:
            table, block = self.book * self.scale_book[:, None], scales.astype(np.intp)
        index = (block * len(self.book)).take(column, axis=1).take(row - row[0], axis=0)
        index += codes
        found: Half = np.frombuffer(encode(table, dtype), "<u2").take(index, mode="clip")  # none is out of range
        return found


@dataclass(frozen=True)
class Weight:
    """A weight by the name and shape that an unquantised checkpoint has, the tensors that make it, the one with its
    codes first, and how: `codes(reader, first, last)` are those of rows of all `matrices`, [last - first, `columns`],
    numbered through, and `grid(reader)` what they stand for. With `transposed` each matrix is turned."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    matrices: int
    rows: int
    columns: int
    codes: Callable[[Reader, int, int], Bytes]
    grid: Callable[[Reader], Grid]
    transposed: bool = False

    @property
    def count(self) -> int:
        """How many numbers it has. (The last row of codes may have some to spare.)"""
        return math.prod(self.shape)

    def values(self, reader: Reader, dtype: str) -> Iterator[Half]:
        """Its numbers, piece by piece."""
        grid, left = self.grid(reader), self.count
        for matrix in range(self.matrices):
            pieces = self._matrix(reader, grid, matrix, dtype)
            for piece in self._turned(pieces) if self.transposed else pieces:
                flat = piece.reshape(-1)[:left]
                left -= len(flat)
                if ((flat & NO_NUMBER[dtype]) == NO_NUMBER[dtype]).any():
                    raise NotDequantisable(f"{self.parts[0]} and its scales make numbers that are not finite")
                yield flat

    def _matrix(self, reader: Reader, grid: Grid, matrix: int, dtype: str) -> Iterator[Half]:
        table = len(grid.book) * grid.scales.shape[2] // grid.height  # numbers that a row's codes can stand for
        at_once = max(1, AT_ONCE // max(1, self.columns, table))
        for first in range(0, self.rows, at_once):
            last = min(first + at_once, self.rows)
            codes = self.codes(reader, matrix * self.rows + first, matrix * self.rows + last)
            yield grid.rounded(codes, matrix, first, dtype)

    def _turned(self, pieces: Iterator[Half]) -> Iterator[Half]:
        turned = np.empty((self.columns, self.rows), np.uint16)
        done = 0
        for piece in pieces:
            turned[:, done : done + len(piece)] = piece.T
            done += len(piece)
        yield turned


def whole_bytes(name: str, columns: int) -> Callable[[Reader, int, int], Bytes]:
    """Codes of a byte each."""
    return lambda reader, first, last: reader.rows(name, first, last, columns)


def matrices_of(tensor: Tensor) -> tuple[int, int, int]:
    """How many matrices a tensor of codes has, their rows and columns.

    Raises NotDequantisable for a vector."""
    if len(tensor.shape) < 2:
        raise NotDequantisable(f"{tensor.name} has shape {list(tensor.shape)}, quantised weights have rows and columns")
    return math.prod(tensor.shape[:-2]), tensor.shape[-2], tensor.shape[-1]


def blocks(count: int, size: int) -> int:
    """How many blocks of `size` it takes."""
    return -(-count // size)


def required(tensors: Mapping[str, Tensor], name: str, *dtypes: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """The tensor of that name; raises NotDequantisable when it is absent, or of another type or shape than it must."""
    tensor = tensors.get(name)
    if tensor is None:
        raise NotDequantisable(f"there is no tensor {name}")
    if dtypes and tensor.dtype not in dtypes:
        raise NotDequantisable(f"{name} has dtype {tensor.dtype}, not {' or '.join(dtypes)}")
    if shape is not None and tensor.shape != shape:
        raise NotDequantisable(f"{name} has shape {list(tensor.shape)}, not {list(shape)}")
    return tensor
