"""The weights of a Hugging Face checkpoint folder: which file holds which tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.steps.model_files.safetensors_file import Header, InvalidSafetensors, Tensor, read_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class NoSafetensors(ValueError):
    """The folder holds no safetensors weights."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's files with their validated headers, in name order, and its index if it is sharded."""

    folder: Path
    headers: Mapping[str, Header]
    index: Mapping[str, Any] | None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        return {name: tensor for header in self.headers.values() for name, tensor in header.tensors.items()}

    @property
    def size(self) -> int:
        """Bytes of all weight files."""
        return sum(header.data_start + header.data_size for header in self.headers.values())


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read and check the headers of all weight files, without reading a tensor.

    Like transformers, a model.safetensors wins over an index. Raises NoSafetensors when there is neither,
    InvalidSafetensors when a file is missing, truncated, or not as the index says.
    """
    if (folder / WEIGHTS).is_file():
        return Checkpoint(folder, {WEIGHTS: read_header(folder / WEIGHTS)}, None)
    if not (folder / INDEX).is_file():
        raise NoSafetensors(f"neither {WEIGHTS} nor {INDEX}")
    index = read_index(folder / INDEX)
    headers: dict[str, Header] = {}
    for file in weight_files(index):
        if not (folder / file).is_file():
            raise InvalidSafetensors(f"{INDEX} names {file}, which is missing")
        headers[file] = read_header(folder / file)
    _check_index(index["weight_map"], headers)
    return Checkpoint(folder, headers, index)


def read_index(path: Path) -> dict[str, Any]:
    """The index of a sharded checkpoint; raises InvalidSafetensors unless it maps tensors to files beside it."""
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidSafetensors(f"{path.name} is not valid JSON ({error})") from error
    if not isinstance(index, dict):
        raise InvalidSafetensors(f"{path.name} is not a JSON object")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidSafetensors(f"{path.name} has no weight_map")
    for file in weight_map.values():
        if not isinstance(file, str) or "/" in file or not file.endswith(".safetensors"):
            raise InvalidSafetensors(f"{path.name} names {file!r}, which is no safetensors file beside it")
    return index


def weight_files(index: Mapping[str, Any]) -> list[str]:
    """The files that an index names, each once, in name order."""
    return sorted(set(index["weight_map"].values()))


def _check_index(weight_map: Mapping[str, str], headers: Mapping[str, Header]) -> None:
    for name, file in weight_map.items():
        if name not in headers[file].tensors:
            raise InvalidSafetensors(f"{INDEX} looks for {name!r} in {file}, which has no such tensor")
    for file, header in headers.items():
        for name in header.tensors:
            if weight_map.get(name) != file:
                raise InvalidSafetensors(f"{file} holds {name!r}, which {INDEX} does not expect there")
