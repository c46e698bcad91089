"""Reading the header of a safetensors file, distrusting every number in it.

The format (https://github.com/huggingface/safetensors#format): eight bytes of little-endian header length, a JSON
object that maps each tensor's name to dtype, shape and the range of its bytes, then the bytes of all tensors without
gap or overlap. Nothing here reads a tensor, so a file of any size is checked in milliseconds.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from finetune.steps.model_files.copying import PAGE

MAX_HEADER_BYTES = 100_000_000
"""The limit that the safetensors library has as well."""

MAX_DIMENSIONS = 64

BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits of one element."""


class InvalidSafetensors(ValueError):
    """The file is not what a safetensors file has to be; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Tensor:
    """One tensor's place: `start` and `end` count from the beginning of the data, as in the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """A file's tensors by name, in the order of their bytes; `data_start` is where the first byte of data lies."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    data_start: int

    @property
    def data_size(self) -> int:
        """Bytes of all tensors."""
        return max((tensor.end for tensor in self.tensors.values()), default=0)


def read_header(path: Path) -> Header:
    """The validated header of a file.

    Raises InvalidSafetensors when the file is truncated or its header lies; OSError when it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return _read_header(file)
    except InvalidSafetensors as error:
        raise InvalidSafetensors(f"{path.name}: {error}") from error.__cause__


def write_header(file: BinaryIO, header: Header, data_start: int | None = None) -> None:
    """Write length and JSON, padded with spaces so that the data starts at a multiple of 8; and at `data_start` modulo
    a page, if that is such a multiple."""
    entries: dict[str, Any] = {"__metadata__": dict(header.metadata)} if header.metadata else {}
    for tensor in header.tensors.values():
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.start, tensor.end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    residue, modulus = (data_start, PAGE) if data_start is not None and data_start % 8 == 0 else (0, 8)
    text += b" " * ((residue - 8 - len(text)) % modulus)
    file.write(struct.pack("<Q", len(text)) + text)


def _read_header(file: BinaryIO) -> Header:
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    if len(prefix) < 8:
        raise InvalidSafetensors(f"the file has {size} bytes, too few for a safetensors header")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES:
        raise InvalidSafetensors(f"a header of {length} bytes is claimed, more than the format allows: not safetensors")
    if length > size - 8:
        raise InvalidSafetensors(
            f"the file is truncated: a header of {length} bytes is claimed, {size - 8} bytes follow"
        )
    entries = _parse(file.read(length))
    metadata = _metadata(entries.pop("__metadata__", {}))
    tensors = sorted((_tensor(name, entry) for name, entry in entries.items()), key=lambda item: (item.start, item.end))
    _check_layout(tensors, size - 8 - length)
    return Header({tensor.name: tensor for tensor in tensors}, metadata, 8 + length)


def _parse(text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise InvalidSafetensors("the header does not start with '{': not a safetensors file")
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        if isinstance(error, InvalidSafetensors):
            raise
        raise InvalidSafetensors(f"the header is not valid JSON ({error})") from error
    if not isinstance(entries, dict):
        raise InvalidSafetensors("the header is not a JSON object")
    return entries


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, entry in pairs:
        if name in entries:
            raise InvalidSafetensors(f"the header names {name!r} twice")
        entries[name] = entry
    return entries


def _metadata(entry: Any) -> dict[str, str]:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise InvalidSafetensors("__metadata__ is not a map of strings")
    return entry


def _tensor(name: str, entry: Any) -> Tensor:
    if not isinstance(entry, dict):
        raise InvalidSafetensors(f"the entry of {name!r} is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise InvalidSafetensors(f"{name!r} has the unknown dtype {dtype!r}")
    if not _are_sizes(shape):
        raise InvalidSafetensors(f"{name!r} has an invalid shape")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InvalidSafetensors(f"{name!r} has invalid data_offsets")
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise InvalidSafetensors(
            f"{name!r} of shape {shape} and dtype {dtype} needs {bits // 8} bytes, "
            f"its data_offsets span {offsets[1] - offsets[0]}"
        )
    return Tensor(name, dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        return False
    return all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_layout(tensors: list[Tensor], data_size: int) -> None:
    position = 0
    for tensor in tensors:
        if tensor.start < position:
            raise InvalidSafetensors(f"the bytes of {tensor.name!r} overlap those of another tensor")
        if tensor.start > position:
            raise InvalidSafetensors(f"there is a hole of {tensor.start - position} bytes before {tensor.name!r}")
        position = tensor.end
    if position > data_size:
        raise InvalidSafetensors(f"the file is truncated: its tensors take {position} bytes, {data_size} are there")
    if position < data_size:
        raise InvalidSafetensors(f"{data_size - position} bytes follow the last tensor")
