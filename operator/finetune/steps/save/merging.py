"""A LoRA adapter merged into the model that it was trained on: streamed, without torch, without loading the model.

The merged matrix is W + alpha / rank * B A (E. J. Hu et al., "LoRA", 2021, section 4.1), computed in f64 some rows at
a time and rounded once, to the type that W has. What QLoRA froze in 4 or 8 bits is merged into the weights as they were
before. Trained rows of the embedding and of the head replace those of the model. All other bytes are copied by the
kernel.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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

BLOCK = 1 << 21
"""Elements that are merged at a time: 16 MiB of f64."""

HEAD = "lm_head.weight"

_PREFIX = "base_model.model."
_ROWS = "trainable_tokens_delta"


@dataclass(frozen=True)
class _Update:
    """What is added to a tensor: `scale` times `b`, of shape (rows, rank), times `a`, (rank, columns)."""

    a: Floats
    b: Floats
    scale: float

    def applied(self, rows: Floats, first: int) -> Floats:
        return rows + self.scale * (self.b[first : first + len(rows)] @ self.a)


@dataclass(frozen=True)
class _Rows:
    """What rows of a tensor are replaced with, by id."""

    rows: Mapping[int, Floats]

    def applied(self, rows: Floats, first: int) -> Floats:
        for id_, values in self.rows.items():
            if first <= id_ < first + len(rows):
                rows[id_ - first] = values
        return rows


_Change = _Update | _Rows


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


def _merge_file(path: Path, header: Header, changes: Mapping[str, _Change], target: Path, count: Count) -> None:
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


def _merged(source: BinaryIO, data_start: int, tensor: Tensor, change: _Change) -> Iterator[bytes]:
    rows, columns = tensor.shape
    row_bytes = tensor.size // rows
    at_once = max(1, BLOCK // columns)
    for first in range(0, rows, at_once):
        size = min(at_once, rows - first) * row_bytes
        data = os.pread(source.fileno(), size, data_start + tensor.start + first * row_bytes)
        values = change.applied(decode(data, tensor.dtype).reshape(-1, columns), first)
        if not np.isfinite(values).all():
            raise _unfit(f"the merged {tensor.name} has values that are no finite numbers")
        yield encode(values, tensor.dtype)


def _changes(adapter: Path, tensors: Mapping[str, Tensor]) -> dict[str, _Change]:
    """What the adapter changes, by the name of the base's tensor."""
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    values = _Values(adapter / ADAPTER_WEIGHTS)
    ids: Mapping[str, list[int]] = config.get("trainable_token_indices") or {}
    changes: dict[str, _Change] = {}
    for name in values.header.tensors:
        module, _, part = name.removeprefix(_PREFIX).rpartition(".")
        if part == _ROWS:
            module = module.removesuffix(".token_adapter")
            matrix = _tensor_of(module, tensors)
            rows = ids[module.rpartition(".")[2]]
            changes[matrix.name] = _Rows(dict(zip(rows, values.read(name), strict=True)))
            twin = tensors.get(HEAD)
            if HEAD.partition(".")[0] not in ids and twin is not None and twin.shape == matrix.shape:
                changes[HEAD] = changes[matrix.name]  # a tied head that the files hold once more
        elif name.endswith(".lora_A.weight"):
            module = name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
            matrix = _tensor_of(module, tensors)
            a, b = values.read(name), values.read(name.replace(".lora_A.", ".lora_B."))
            if config.get("fan_in_fan_out"):
                a, b = b.T, a.T
            if (len(b), a.shape[1]) != matrix.shape:
                raise _unfit(f"{matrix.name} has shape {list(matrix.shape)}, the adapter's is {[len(b), a.shape[1]]}")
            changes[matrix.name] = _Update(a, b, config["lora_alpha"] / config["r"])
        elif not name.endswith(".lora_B.weight"):
            raise _unfit(f"it holds {name}, which is neither LoRA nor rows of tokens")
    return changes


def _tensor_of(module: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight of a module in the files: some leave out the outermost name."""
    for name in (f"{module}.weight", f"{module.partition('.')[2]}.weight"):
        if (tensor := tensors.get(name)) is not None:
            if tensor.dtype not in EDITABLE_DTYPES or len(tensor.shape) != 2:
                raise _unfit(f"{name} is {tensor.dtype} {list(tensor.shape)}, not a matrix of floats")
            return tensor
    raise _unfit(f"the model has no tensor {module}.weight")


class _Values:
    """The adapter's tensors, one at a time."""

    def __init__(self, path: Path) -> None:
        self.header = read_header(path)
        self._path = path

    def read(self, name: str) -> Floats:
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
