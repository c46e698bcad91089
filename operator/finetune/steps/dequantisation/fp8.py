"""FP8 as DeepSeek-V3 and Qwen publish it: a number of eight bits with a scale for each block of rows and columns, each
row, or the whole tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from finetune.steps.dequantisation.codes import E4M3, E8M0
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

SCALE = {"fp8": "_scale_inv", "fbgemm_fp8": "_scale"}
"""What the name of a weight's scales ends with, by method."""


def weights(config: Mapping[str, Any], reader: Reader) -> Iterator[Weight]:
    """The weights that eight-bit numbers and their scales make."""
    settings = config["quantization_config"]
    for name, tensor in reader.tensors.items():
        if tensor.dtype == "F8_E4M3":
            yield _weight(name, SCALE[settings["quant_method"]], settings.get("weight_block_size"), reader)


def _weight(name: str, suffix: str, block: Any, reader: Reader) -> Weight:
    tensor = reader.tensors[name]
    matrices, rows, columns = matrices_of(tensor)
    scale = required(reader.tensors, name + suffix, *PLAIN_DTYPES, "F8_E8M0")
    height, width = _block(scale.shape, tensor.shape, block, scale.name)

    def grid(reader: Reader) -> Grid:
        powers = scale.dtype == "F8_E8M0"
        scales = reader.bytes_of(scale.name) if powers else reader.numbers(scale.name)
        grid = scales.reshape(matrices, blocks(rows, height), blocks(columns, width))
        return Grid(E4M3, grid, height, width, scale_book=E8M0 if powers else None)

    return Weight(name, tensor.shape, (name, scale.name), matrices, rows, columns, whole_bytes(name, columns), grid)


def _block(scale: tuple[int, ...], weight: tuple[int, ...], block: Any, name: str) -> tuple[int, int]:
    """Rows and columns that a scale is for. What config.json says counts, not what shapes suggest: 192 rows in blocks
    of 128 have two scales, as two blocks of 96 would."""
    *outer, rows, columns = weight
    if block is not None:
        if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
            raise NotDequantisable(f"quantization_config.weight_block_size is {block!r}, not rows and columns")
        expected = (*outer, blocks(rows, block[0]), blocks(columns, block[1]))
        if scale != expected:
            raise NotDequantisable(f"{name} has shape {list(scale)}, blocks of {block} make {list(expected)}")
        return block[0], block[1]
    if math.prod(scale) == math.prod(outer):
        return rows, columns
    if scale in ((*outer, rows), (*outer, rows, 1)):
        return 1, columns
    raise NotDequantisable(f"{name} has shape {list(scale)}: neither one scale nor one for each of {rows} rows")
