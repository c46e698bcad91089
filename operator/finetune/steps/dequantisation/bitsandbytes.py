"""bitsandbytes: four bits (nf4, fp4) in blocks of the flattened weight, whose scales may be quantised once more; eight
bits with a scale for each row."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from finetune.steps.dequantisation.codes import FP4, INT8, NF4, Bytes, Floats, nibbles
from finetune.steps.dequantisation.weights import (
    Grid,
    NotDequantisable,
    Reader,
    Weight,
    blocks,
    matrices_of,
    required,
    whole_bytes,
)

STATE = ".quant_state.bitsandbytes__"
BOOKS = {"nf4": NF4, "fp4": FP4}
TURNED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
"""Models whose linear layers are Conv1D, which bitsandbytes turns before it quantises."""


def weights(config: Mapping[str, Any], reader: Reader) -> Iterator[Weight]:
    """The weights that four-bit blocks with their states, or eight-bit rows with their scales, make."""
    if config.get("model_type") in TURNED:
        raise NotDequantisable(f"bitsandbytes keeps the weights of a {config['model_type']} turned")
    for name in reader.tensors:
        plain, state, kind = name.partition(STATE)
        if state:
            yield _four_bits(plain, kind, reader)
        elif name.endswith(".SCB"):
            yield _eight_bits(name.removesuffix(".SCB"), reader)


def _four_bits(name: str, kind: str, reader: Reader) -> Weight:
    tensors, state = reader.tensors, _state(f"{name}{STATE}{kind}", kind, reader)
    shape, size = tuple(state["shape"]), state["blocksize"]
    count = math.prod(shape)
    if required(tensors, name).size != (count + 1) // 2:
        raise NotDequantisable(f"{name} has {tensors[name].size} bytes, its state says four bits for each of {shape}")
    rows, nested = blocks(count, size), "nested_blocksize" in state
    absmax = required(tensors, f"{name}.absmax", "U8" if nested else "F32", shape=(rows,)).name
    book = required(tensors, f"{name}.quant_map", "F32", shape=(16,)).name
    parts = [name, f"{name}{STATE}{kind}", absmax, book]
    if nested:
        each = blocks(rows, state["nested_blocksize"])
        parts.append(required(tensors, f"{name}.nested_absmax", "F32", shape=(each,)).name)
        parts.append(required(tensors, f"{name}.nested_quant_map", "F32", shape=(256,)).name)

    def codes(reader: Reader, first: int, last: int) -> Bytes:
        return nibbles(reader.rows(name, first, last, size // 2), high_first=True)

    def grid(reader: Reader) -> Grid:
        if not np.array_equal(reader.numbers(book), BOOKS[kind]):
            raise NotDequantisable(f"{book} has other numbers than {kind} has")
        scales = _absmax(name, state, reader) if nested else reader.numbers(absmax)
        return Grid(BOOKS[kind], scales.reshape(1, rows, 1), width=size)

    return Weight(name, shape, tuple(parts), 1, rows, size, codes, grid)


def _absmax(name: str, state: Mapping[str, Any], reader: Reader) -> Floats:
    """The scales of quantised scales: f32 numbers, computed as bitsandbytes does, which is what makes them."""
    codes = reader.bytes_of(f"{name}.absmax")
    book, scales = (reader.numbers(f"{name}.{part}") for part in ("nested_quant_map", "nested_absmax"))
    each = np.arange(len(codes)) // state["nested_blocksize"]
    scaled = book.astype(np.float32)[codes] * scales.astype(np.float32)[each]
    absmax: Floats = (scaled + np.float32(state["nested_offset"])).astype(np.float64)
    return absmax


def _state(name: str, kind: str, reader: Reader) -> Mapping[str, Any]:
    try:
        state = json.loads(reader.bytes_of(name).tobytes())
        sizes = [
            *state["shape"],
            state["blocksize"],
            *([state["nested_blocksize"]] if "nested_offset" in state else []),
        ]
        good = kind in BOOKS and state["quant_type"] == kind and len(state["shape"]) >= 2
        good &= all(type(size) is int and size > 0 for size in sizes) and state["blocksize"] % 2 == 0
        good &= ("nested_blocksize" in state) == isinstance(state.get("nested_offset"), float)
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise NotDequantisable(f"{name} is no state of bitsandbytes that is known")
    return state  # type: ignore[no-any-return]


def _eight_bits(module: str, reader: Reader) -> Weight:
    name = f"{module}.weight"
    tensor = required(reader.tensors, name, "I8")
    matrices, rows, columns = matrices_of(tensor)
    scale = required(reader.tensors, f"{module}.SCB", "F32", shape=tensor.shape[:-1]).name
    layout = f"{module}.weight_format"
    if layout in reader.tensors and reader.bytes_of(layout).any():
        raise NotDequantisable(f"{layout} says that {name} does not lie row by row")
    parts = (name, scale, *([layout] if layout in reader.tensors else []))

    def grid(reader: Reader) -> Grid:
        return Grid(INT8, reader.numbers(scale).reshape(matrices, rows, 1) / 127, width=columns)

    return Weight(name, tensor.shape, parts, matrices, rows, columns, whole_bytes(name, columns), grid)
