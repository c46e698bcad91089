"""compressed-tensors, the format of llm-compressor and vLLM: eight-bit floats or integers, or integers packed into
words, with scales for the tensor, each row, groups of columns or blocks, and zero points where it is asymmetric."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.steps.dequantisation.codes import E4M3, INT8, Bytes, Floats, unpacked
from finetune.steps.dequantisation.weights import (
    PLAIN_DTYPES,
    Grid,
    NotDequantisable,
    Reader,
    Weight,
    blocks,
    matrices_of,
    required,
    whole_bytes,
)

NAIVE = ("float-quantized", "naive-quantized", "int-quantized")
PACKED = "pack-quantized"
CLASSES = ("Linear", "Embedding")
"""Targets that are classes of modules, not names."""

ZERO_DTYPES = ("I8", "F8_E4M3", *PLAIN_DTYPES, "I32", "I64")

Scheme = Mapping[str, Any]
"""A group of the configuration."""


def weights(config: Mapping[str, Any], reader: Reader) -> Iterator[Weight]:
    """The weights that codes and their scales make."""
    settings = config["quantization_config"]
    for field, plain in (("sparsity_config", ("dense",)), ("transform_config", ())):
        found = settings.get(field)
        if found and not (isinstance(found, dict) and (not found or found.get("format") in plain)):
            raise NotDequantisable(f"quantization_config.{field} changes weights in a way that is not undone here")
    if (status := settings.get("quantization_status", "compressed")) != "compressed":
        raise NotDequantisable(f"quantization_config.quantization_status is {status!r}, not 'compressed'")
    for name in reader.tensors:
        module, dot, last = name.rpartition(".")
        if last == "weight_packed":
            yield _packed(module, _scheme(module, settings), reader)
        elif last == "weight" and f"{module}{dot}weight_scale" in reader.tensors:
            yield _naive(module, _scheme(module, settings), reader)


def _scheme(module: str, settings: Mapping[str, Any]) -> Scheme:
    """What the configuration says about a module's weight, the format included."""
    groups = [group for group in (settings.get("config_groups") or {}).values() if isinstance(group, dict)]
    named = [group for group in groups if any(_names(target, module) for target in group.get("targets") or ())]
    found = named or [group for group in groups if any(target in CLASSES for target in group.get("targets") or ())]
    schemes = []
    for group in found:
        scheme = {**(group.get("weights") or {}), "format": group.get("format") or settings.get("format")}
        if scheme not in schemes:
            schemes.append(scheme)
    if len(schemes) != 1:
        many = "several groups" if schemes else "no group"
        raise NotDequantisable(f"{many} of quantization_config.config_groups say how {module} is quantised")
    return schemes[0]


def _names(target: Any, module: str) -> bool:
    if not isinstance(target, str):
        return False
    return bool(re.match(target[3:], module)) if target.startswith("re:") else target == module


def _naive(module: str, scheme: Scheme, reader: Reader) -> Weight:
    name, kind = f"{module}.weight", scheme.get("type")
    if scheme["format"] not in NAIVE:
        raise NotDequantisable(f"{name} has the format {scheme['format']!r}, which is not known")
    dtype, book = {"float": ("F8_E4M3", E4M3), "int": ("I8", INT8)}.get(str(kind), (None, None))
    if dtype is None or book is None or (kind == "float" and scheme.get("num_bits") != 8):
        raise NotDequantisable(f"{name}: {scheme.get('num_bits')} bits of type {kind!r} are not known")
    tensor = required(reader.tensors, name, dtype)
    return _weight(module, name, tensor.shape, book, whole_bytes(name, tensor.shape[-1]), scheme, None, [], reader)


def _packed(module: str, scheme: Scheme, reader: Reader) -> Weight:
    name, bits = f"{module}.weight_packed", scheme.get("num_bits")
    if scheme["format"] != PACKED or scheme.get("type") != "int" or bits not in (2, 4, 8):
        raise NotDequantisable(
            f"{name}: {bits} bits of type {scheme.get('type')!r} in {scheme['format']!r} are not known"
        )
    tensor, said = (
        required(reader.tensors, name, "I32"),
        required(reader.tensors, f"{module}.weight_shape", "I64", "I32"),
    )
    shape = tuple(int(size) for size in reader.numbers(said.name).reshape(-1))
    words = blocks(shape[-1] * bits, 32) if shape else 0
    if len(shape) < 2 or tensor.shape != (*shape[:-1], words):
        raise NotDequantisable(f"{name} has shape {list(tensor.shape)}, which does not hold {bits} bits for {shape}")

    def codes(reader: Reader, first: int, last: int) -> Bytes:
        return unpacked(reader.rows(name, first, last, 4 * words), bits)[:, : shape[-1]]

    book: Floats = (np.arange(1 << bits) - (1 << bits - 1)).astype(np.float64)
    return _weight(module, name, shape, book, codes, scheme, bits, [said.name], reader)


def _weight(
    module: str,
    name: str,
    shape: tuple[int, ...],
    book: Floats,
    codes: Any,
    scheme: Scheme,
    bits: int | None,
    parts: list[str],
    reader: Reader,
) -> Weight:
    matrices, rows, columns = matrices_of(reader.tensors[name])
    columns = shape[-1]
    scale = required(reader.tensors, f"{module}.weight_scale", *PLAIN_DTYPES)
    height, width = _block(scheme, rows, columns, name)
    across, down = blocks(columns, width), blocks(rows, height)
    accepted = {(*shape[:-2], down, across)}
    if across == 1:
        accepted |= {(*shape[:-2], down)}
    if down == across == matrices == 1:
        accepted |= {()}
    if scale.shape not in accepted:
        raise NotDequantisable(f"{scale.name} has shape {list(scale.shape)}, not {[*shape[:-2], down, across]}")
    zero, index = f"{module}.weight_zero_point", f"{module}.weight_g_idx"
    zeros = required(reader.tensors, zero, *ZERO_DTYPES) if zero in reader.tensors else None
    if zeros is None and scheme.get("symmetric") is False:
        raise NotDequantisable(f"{name} is asymmetric, and there is no {zero}")
    packed = bits is not None and scheme.get("symmetric") is False and scheme.get("strategy") != "tensor"
    if zeros is not None and zeros.shape != (
        (*shape[:-2], blocks(rows * (bits or 8), 32), across) if packed else scale.shape
    ):
        raise NotDequantisable(f"{zero} has shape {list(zeros.shape)}, which does not fit {scale.name}")
    order = _order(index, columns, width, reader) if index in reader.tensors else None

    def grid(reader: Reader) -> Grid:
        points = None
        if zeros is not None and packed:
            points = _unpacked_zeros(reader, zero, bits or 8, matrices, rows, across)
        elif zeros is not None:
            points = reader.numbers(zero).reshape(matrices, down, across)
        scales = reader.numbers(scale.name).reshape(matrices, down, across)
        return Grid(book, scales, height, width, zeros=points, columns=order)

    more = [zero] * (zeros is not None) + [index] * (index in reader.tensors)
    return Weight(f"{module}.weight", shape, (name, scale.name, *parts, *more), matrices, rows, columns, codes, grid)


def _block(scheme: Scheme, rows: int, columns: int, name: str) -> tuple[int, int]:
    """Rows and columns that a scale is for."""
    strategy, size, structure = (scheme.get(key) for key in ("strategy", "group_size", "block_structure"))
    if strategy == "tensor":
        return rows, columns
    if strategy == "channel":
        return 1, columns
    if strategy == "group" and type(size) is int and size > 0 and columns % size == 0:
        return 1, size
    if strategy == "block" and isinstance(structure, list) and len(structure) == 2 and min(structure) > 0:
        return structure[0], structure[1]
    raise NotDequantisable(
        f"{name}: no scales of the strategy {strategy!r} are known for {rows} rows of {columns} columns "
        f"(group_size {size!r}, block_structure {structure!r})"
    )


def _order(name: str, columns: int, size: int, reader: Reader) -> npt.NDArray[np.intp] | None:
    """The group of each column, where columns were sorted before they were quantised; -1 says that they were not."""
    required(reader.tensors, name, "I32", "I64", shape=(columns,))
    groups = reader.numbers(name).astype(np.intp)
    if (groups == -1).any():
        return None
    if (groups < 0).any() or not np.array_equal(np.bincount(groups), np.full(columns // size, size)):
        raise NotDequantisable(f"{name} does not put {size} columns into each of {columns // size} groups")
    return groups


def _unpacked_zeros(reader: Reader, name: str, bits: int, matrices: int, rows: int, groups: int) -> Floats:
    """Zero points, packed along the rows."""
    words = reader.bytes_of(name).reshape(matrices, -1, groups, 4).transpose(0, 2, 1, 3).reshape(matrices, groups, -1)
    points: Floats = unpacked(words, bits)[..., :rows].transpose(0, 2, 1).astype(np.float64)
    return points - (1 << bits - 1)
