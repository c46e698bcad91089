"""A quantised checkpoint written out as a plain one, tensor by tensor, in the memory that a few rows take."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.steps.dequantisation.plan import Plan
from finetune.steps.dequantisation.weights import Reader
from finetune.steps.model_files.checkpoint import INDEX, Checkpoint
from finetune.steps.model_files.config import read_object
from finetune.steps.model_files.copying import Count, copy_range, take_file, write_all
from finetune.steps.model_files.safetensors_file import BITS, Header, Tensor, write_header

SETTINGS = ("quantization_config", "compression_config")


def headers_of(checkpoint: Checkpoint, plan: Plan) -> dict[str, Header]:
    """The headers of the files to be, by name; a file that only had scales is none."""
    headers = {file: _header(header, plan) for file, header in checkpoint.headers.items()}
    return {file: header for file, header in headers.items() if header.tensors}


def write(
    checkpoint: Checkpoint, plan: Plan, headers: Mapping[str, Header], reader: Reader, target: Path, count: Count
) -> None:
    """Write weights, index and config.json into the folder `target`."""
    for file, header in headers.items():
        if header.tensors.keys() == checkpoint.headers[file].tensors.keys() and plan.made.keys().isdisjoint(
            checkpoint.headers[file].tensors
        ):
            take_file(checkpoint.folder / file, target / file, count, link=True)
        else:
            _write_file(checkpoint, file, header, plan, reader, target / file, count)
    if checkpoint.index is not None:
        _write_index(checkpoint.index, headers, target / INDEX)
    config = read_object(checkpoint.folder / "config.json")
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        for name in SETTINGS:
            part.pop(name, None)
    (target / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _header(header: Header, plan: Plan) -> Header:
    """Wide numbers first, so that each lies at a multiple of its size, as readers of memory-mapped files need."""
    used = {part for weight in plan.made.values() for part in weight.parts}
    tensors = []
    for name, tensor in header.tensors.items():
        if weight := plan.made.get(name):
            tensors.append(Tensor(weight.name, plan.dtype, weight.shape, 0, 2 * weight.count))
        elif name not in used and name not in plan.left_out:
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
                write_all(written.fileno(), values.astype("<u2", copy=False).data)
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
