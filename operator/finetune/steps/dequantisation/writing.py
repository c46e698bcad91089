"""A quantised checkpoint written out as a plain one, tensor by tensor, in the memory that a few rows take."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.steps.dequantisation.plan import Plan, planned
from finetune.steps.dequantisation.weights import Reader
from finetune.steps.model_files.checkpoint import INDEX, Checkpoint, read_checkpoint
from finetune.steps.model_files.config import read_config, read_object
from finetune.steps.model_files.copying import Count, copy_range, take_file, write_all
from finetune.steps.model_files.safetensors_file import BITS, Header, Tensor, write_header
from finetune.steps.runtime.disk import in_words, room_for

FORMAT = 1
"""Raise it, and that of `tokens/step.py`, when the same checkpoint would be written out otherwise."""

SETTINGS = ("quantization_config", "compression_config")
SHOWN = 3

Report = Callable[[int, int], None]
"""Called with the bytes done and those to do."""


def write_plain(source: Path, target: Path, report: Report) -> dict[str, Any]:
    """Write the weights of the quantised checkpoint in `source`, their index and config.json into the folder `target`,
    as the checkpoint would be unquantised; no other file. Returns `dequantized` and `warnings` of a ModelStatus.

    Raises NotDequantisable when a tensor would be left over or cannot be what its method makes, StepFailure when there
    is no room.
    """
    checkpoint = read_checkpoint(source)
    with Reader(checkpoint) as reader:
        plan = planned(read_config(source), reader)
        headers = {file: _header(header, plan) for file, header in checkpoint.headers.items()}
        headers = {file: header for file, header in headers.items() if header.tensors}  # some had scales only
        size = sum(header.data_size for header in headers.values())
        said = f"{plan.method} weights were written out as {plan.dtype.lower()}: {in_words(checkpoint.size)} became "
        done = 0

        def count(size_done: int) -> None:
            nonlocal done
            done += size_done
            report(done, size)

        with room_for(target, size, f"the model with its {plan.method} weights written out as {plan.dtype.lower()}"):
            for file, header in headers.items():
                if header.tensors == checkpoint.headers[file].tensors:
                    take_file(source / file, target / file, count, link=True)
                else:
                    _write_file(checkpoint, file, header, plan, reader, target / file, count)
            if checkpoint.index is not None:
                _write_index(checkpoint.index, headers, target / INDEX)
            _write_config(source, target)
    return {"dequantized": said + in_words(read_checkpoint(target).size), "warnings": _warnings(plan)}


def _warnings(plan: Plan) -> list[str]:
    names = plan.left_out
    if not names:
        return []
    some = ", ".join([*names[:SHOWN], *["..."] * (len(names) > SHOWN)])
    return [f"{len(names)} scales of activations were left out ({some}): unquantised weights need none"]


def _header(header: Header, plan: Plan) -> Header:
    """That of a file to be. Wide numbers come first, so that each lies at a multiple of its size, as in files of
    safetensors' own writer; a file in which nothing changes is as it was."""
    if header.tensors.keys() <= set(plan.copied):
        return header
    tensors = []
    for name, tensor in header.tensors.items():
        if weight := plan.made.get(name):
            tensors.append(Tensor(weight.name, plan.dtype, weight.shape, 0, 2 * weight.count))
        elif name in plan.copied:
            tensors.append(tensor)
    placed, position = {}, 0
    for tensor in sorted(tensors, key=lambda each: -BITS[each.dtype]):
        placed[tensor.name] = replace(tensor, start=position, end=position + tensor.size)
        position += tensor.size
    return replace(header, tensors=placed)


def _write_file(
    checkpoint: Checkpoint, file: str, header: Header, plan: Plan, reader: Reader, target: Path, count: Count
) -> None:
    made = {weight.name: weight for weight in plan.made.values()}
    before = checkpoint.headers[file]
    target.unlink(missing_ok=True)
    with (checkpoint.folder / file).open("rb") as source, target.open("wb") as written:
        write_header(written, header)
        written.flush()
        for name in header.tensors:
            if (weight := made.get(name)) is None:
                start, end = (
                    before.data_start + place for place in (before.tensors[name].start, before.tensors[name].end)
                )
                copy_range(source.fileno(), start, end, written.fileno(), count)
                continue
            for values in weight.values(reader, plan.dtype):
                write_all(written.fileno(), values.astype("<u2", copy=False).tobytes())
                count(values.nbytes)


def _write_index(index: Mapping[str, Any], headers: Mapping[str, Header], path: Path) -> None:
    metadata = dict(index.get("metadata") or {})
    metadata["total_size"] = sum(header.data_size for header in headers.values())
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(
            math.prod(tensor.shape) for header in headers.values() for tensor in header.tensors.values()
        )
    weight_map = {name: file for file, header in headers.items() for name in header.tensors}
    document = {**index, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(document, indent=2) + "\n")


def _write_config(source: Path, target: Path) -> None:
    config = read_object(source / "config.json")
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        for name in SETTINGS:
            part.pop(name, None)
    (target / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
