"""A LoRA adapter merged into the model that it was trained on: streamed, without torch, without loading the model.

The merged matrix is W + alpha / rank * B A (E. J. Hu et al., "LoRA", 2021, section 4.1), computed in f64 some rows at
a time and rounded once, to the type that W has. What QLoRA froze in 4 or 8 bits is merged into the weights as they were
before. Trained rows of the embedding and of the head replace those of the model. All other bytes are copied by the
kernel. Where each changed weight lies in the files was worked out before the training began (`merge_record`).
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from finetune.api.contract import ExitCode
from finetune.steps.model_files.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from finetune.steps.model_files.checkpoint import INDEX, read_checkpoint
from finetune.steps.model_files.copying import Count, copy_range, take_file, write_all
from finetune.steps.model_files.floats import EDITABLE_DTYPES, Floats, decode, encode
from finetune.steps.model_files.safetensors_file import Header, Tensor, read_header, write_header
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.workspace.merge_record import Adapted, Block, read_merge_record

BLOCK = 1 << 21
"""Elements that are merged at a time: 16 MiB of f64."""

KEPT = 4
"""Tensors of the adapter that are held in memory: those of the experts of one layer."""

_PREFIX = "base_model.model."
_ROWS = "trainable_tokens_delta"


class _Change(ABC):
    """What becomes of some rows of a tensor, from row `first` on."""

    def __init__(self, first: int, count: int) -> None:
        self._first, self._count = first, count

    def apply(self, rows: Floats, first: int) -> None:
        """Change, in place, those of the tensor's `rows` that are meant; `first` is the number of the first one."""
        start, stop = max(first, self._first), min(first + len(rows), self._first + self._count)
        if start < stop:
            self._change(rows[start - first : stop - first], start - self._first)

    @abstractmethod
    def _change(self, rows: Floats, first: int) -> None: ...


class _Update(_Change):
    """`scale` times `b`, of shape (rows, rank), times `a`, (rank, columns), is added; `read` gives `a` and `b`."""

    def __init__(self, block: Block, scale: float, read: Callable[[], tuple[Floats, Floats]]) -> None:
        size = _size(block)
        super().__init__(block.row, size[1] if block.transposed else size[0])
        self._scale, self._read = scale, read

    def _change(self, rows: Floats, first: int) -> None:
        a, b = self._read()
        rows += self._scale * (b[first : first + len(rows)] @ a)


class _Rows(_Change):
    """Rows are replaced, by their number."""

    def __init__(self, block: Block, rows: Mapping[int, Floats]) -> None:
        super().__init__(block.row, _size(block)[0])
        self._rows = rows

    def _change(self, rows: Floats, first: int) -> None:
        for id_, values in self._rows.items():
            if first <= id_ < first + len(rows):
                rows[id_ - first] = values


def _size(block: Block) -> tuple[int, int]:
    """Rows and columns of the weight in memory."""
    rows, columns = ((part.last - part.first) // part.step + 1 for part in (block.rows, block.columns))
    return rows, columns


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter instead of a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def merged_size(base: Path) -> int:
    """Bytes of the merged weights: those of the base."""
    return read_checkpoint(base).size


def merge(adapter: Path, base: Path, target: Path, count: Count) -> None:
    """Write the weights of `base` with the adapter merged into them into the folder `target`, in the same files.

    Raises StepFailure when the adapter is not one of this base.
    """
    checkpoint = read_checkpoint(base)
    changes = _changes(adapter, checkpoint.tensors)
    for file, header in checkpoint.headers.items():
        if changes.keys() & header.tensors.keys():
            _merge_file(base / file, header, changes, target / file, count)
        else:
            take_file(base / file, target / file, count, link=False)
    if checkpoint.index is not None:
        (target / INDEX).write_bytes((base / INDEX).read_bytes())


def _merge_file(
    path: Path, header: Header, changes: Mapping[str, Sequence[_Change]], target: Path, count: Count
) -> None:
    with path.open("rb") as source, target.open("wb") as written:
        write_header(written, header)
        written.flush()
        done = 0
        for name, tensor in header.tensors.items():
            if name in changes:
                start = header.data_start
                copy_range(source.fileno(), start + done, start + tensor.start, written.fileno(), count)
                for block in _merged(source, header.data_start, tensor, changes[name]):
                    write_all(written.fileno(), block)
                    count(len(block))
                done = tensor.end
        end = header.data_start + header.data_size
        copy_range(source.fileno(), header.data_start + done, end, written.fileno(), count)


def _merged(source: BinaryIO, data_start: int, tensor: Tensor, changes: Sequence[_Change]) -> Iterator[bytes]:
    columns = tensor.shape[-1]
    rows = math.prod(tensor.shape[:-1])
    row_bytes = tensor.size // rows
    at_once = max(1, BLOCK // columns)
    for first in range(0, rows, at_once):
        size = min(at_once, rows - first) * row_bytes
        data = os.pread(source.fileno(), size, data_start + tensor.start + first * row_bytes)
        values = decode(data, tensor.dtype).reshape(-1, columns)
        for change in changes:
            change.apply(values, first)
        if not np.isfinite(values).all():
            raise _unfit(f"the merged {tensor.name} has values that are no finite numbers")
        yield encode(values, tensor.dtype)


def _changes(adapter: Path, tensors: Mapping[str, Tensor]) -> dict[str, list[_Change]]:
    """What the adapter changes, by the name of the base's tensor."""
    values = _Values(adapter / ADAPTER_WEIGHTS)
    unused = set(values.header.tensors)
    changes: dict[str, list[_Change]] = defaultdict(list)
    for layer in read_merge_record(adapter):
        names = [f"{_PREFIX}{layer.layer}.{part}" for part in _parts(layer)]
        if missing := [name for name in names if name not in values.header.tensors]:
            raise _unfit(f"it has no {missing[0]}")
        unused -= set(names)
        for block in layer.blocks:
            _require_matrix(block, tensors)
            changes[block.tensor].append(_change(layer, block, values, names))
    if unused:
        raise _unfit(f"it holds {min(unused)}, which is neither LoRA nor rows of tokens")
    return changes


def _parts(layer: Adapted) -> tuple[str, ...]:
    return (_ROWS,) if layer.ids is not None else ("lora_A.weight", "lora_B.weight")


def _change(layer: Adapted, block: Block, values: _Values, names: Sequence[str]) -> _Change:
    if layer.ids is not None:
        return _Rows(block, dict(zip(layer.ids, values.read(names[0]), strict=True)))

    def read() -> tuple[Floats, Floats]:
        left, right = _factors(layer, block.expert, values.read(names[0]), values.read(names[1]))
        left, right = left[block.rows.slice], right[:, block.columns.slice]
        return (left.T, right.T) if block.transposed else (right, left)

    return _Update(block, layer.scale, read)


def _factors(layer: Adapted, expert: int, a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """Of A and B as peft keeps them, the factors (rows, rank) and (rank, columns) of the change of one matrix.

    A stack of matrices has A of shape (experts x rank, inputs), expert after expert, and B of (outputs, rank x
    experts), where the expert comes last (peft's lora.ParamWrapper)."""
    if layer.experts is not None:
        a = a.reshape(layer.experts, -1, a.shape[-1])[expert]
        b = b.reshape(len(b), -1, layer.experts)[:, :, expert]
    return (a.T, b.T) if layer.inputs_first else (b, a)


def _require_matrix(block: Block, tensors: Mapping[str, Tensor]) -> None:
    tensor = tensors.get(block.tensor)
    if tensor is None:
        raise _unfit(f"the model has no tensor {block.tensor}")
    if tensor.dtype not in EDITABLE_DTYPES:
        raise _unfit(f"{tensor.name} is {tensor.dtype}, not one of {', '.join(EDITABLE_DTYPES)}")
    size = _size(block)[::-1] if block.transposed else _size(block)
    if block.row + size[0] > math.prod(tensor.shape[:-1]) or size[1] != tensor.shape[-1]:
        raise _unfit(f"{tensor.name} has shape {list(tensor.shape)}, the adapter was made for {list(size)}")


class _Values:
    """The adapter's tensors, one at a time."""

    def __init__(self, path: Path) -> None:
        self.header = read_header(path)
        self._path = path
        self.read = lru_cache(maxsize=KEPT)(self._read)

    def _read(self, name: str) -> Floats:
        tensor = self.header.tensors[name]
        with self._path.open("rb") as file:
            data = os.pread(file.fileno(), tensor.size, self.header.data_start + tensor.start)
        return decode(data, tensor.dtype).reshape(tensor.shape)


def _unfit(what: str) -> StepFailure:
    return StepFailure(
        ExitCode.BAD_DATA,
        "NotMergeable",
        f"the adapter cannot be merged into the model: {what}",
        "Set spec.output.format: Adapter, which publishes the adapter as it is.",
    )
