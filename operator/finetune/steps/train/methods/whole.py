"""A wholly trained model, written in the files of its base: the same files, tensors, shapes and types.

Each tensor that transformers loaded is replaced; all that it did not load (layers that predict further tokens, a vision
tower) keeps its bytes, so that config.json goes on saying what is there. Tensors are written one at a time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from finetune.api.contract import ExitCode
from finetune.steps.model_files.checkpoint import INDEX, read_checkpoint
from finetune.steps.model_files.copying import copy_range, write_all
from finetune.steps.model_files.safetensors_file import Header, Tensor, write_header
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.weight_names.correspondence import Correspondence

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""What is trained; tensors of other types (counters) keep their bytes."""


def require_home(names: Correspondence) -> None:
    """Raise StepFailure when what is trained could not be written in the files of the base."""
    if names.homeless:
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "NotPublishable",
            f"spec.model: transformers loads {names.homeless[0]}, but would write it as none of the model's tensors",
            "Load and save the model once with transformers (from_pretrained, save_pretrained), and use that.",
        )


def round_as_written(model: Any, names: Correspondence) -> None:
    """Give each weight the values that its type in the files can hold, so that the model answers as it will when it is
    loaded again."""
    dtypes = {
        weight: DTYPES[names.tensors[name].dtype]
        for name, weights in names.made.items()
        for weight in weights
        if names.tensors[name].dtype in DTYPES
    }
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name in dtypes and value.is_floating_point():
                value.copy_(value.to(dtypes[name]))


def write_whole(model: Any, names: Correspondence, base: Path, folder: Path) -> None:
    """Write the weights of a model that `round_as_written` has seen."""
    checkpoint = read_checkpoint(base)
    values = _Values(model.state_dict(), names)
    for file, header in checkpoint.headers.items():
        with (base / file).open("rb") as source, (folder / file).open("wb") as target:
            _write_file(source, header, values, target)
    if checkpoint.index is not None:
        (folder / INDEX).write_bytes((base / INDEX).read_bytes())


class _Values:
    """The tensors of the files, made of the weights in memory, one layer at a time."""

    def __init__(self, weights: Mapping[str, torch.Tensor], names: Correspondence) -> None:
        self._weights, self._names = weights, names
        self._layer: Mapping[str, torch.Tensor] = {}

    def of(self, tensor: Tensor) -> bytes | None:
        """A tensor's new bytes; None when it keeps those that it has."""
        if tensor.name not in self._names.made or tensor.dtype not in DTYPES:
            return None
        if tensor.name not in self._layer:
            self._layer = self._names.in_files(tensor.name, self._weights)
        value = self._layer[tensor.name].detach()
        if tuple(value.shape) != tensor.shape:
            raise ValueError(f"{tensor.name} has shape {list(value.shape)} in memory, {list(tensor.shape)} in its file")
        flat = value.to(DTYPES[tensor.dtype]).cpu().contiguous().reshape(-1)
        return bytes(flat.view(torch.uint8).numpy().data)


def _write_file(source: BinaryIO, header: Header, values: _Values, target: BinaryIO) -> None:
    write_header(target, header)
    target.flush()
    os.lseek(target.fileno(), 0, os.SEEK_END)
    for tensor in header.tensors.values():
        if (data := values.of(tensor)) is not None:
            write_all(target.fileno(), data)
        else:
            start = header.data_start + tensor.start
            copy_range(source.fileno(), start, start + tensor.size, target.fileno(), lambda _: None)
