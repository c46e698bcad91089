"""MXFP4 as gpt-oss is published: blocks of 32 four-bit numbers with a power of two each, the experts of a layer in one
tensor. transformers has the matrices of experts the other way round than the blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from finetune.steps.dequantisation.codes import E2M1, E8M0, Bytes, nibbles
from finetune.steps.dequantisation.weights import Grid, NotDequantisable, Reader, Weight, required

BLOCKS, SCALES = "_blocks", "_scales"
BYTES, NUMBERS = 16, 32
"""Of a block."""


def weights(config: Mapping[str, Any], reader: Reader) -> Iterator[Weight]:
    """The weights that blocks and scales make."""
    if config.get("model_type") != "gpt_oss":
        raise NotDequantisable(f"how a {config.get('model_type')} has its weights in MXFP4 is not known")
    for name in reader.tensors:
        if name.endswith(BLOCKS):
            yield _weight(name, reader)


def _weight(name: str, reader: Reader) -> Weight:
    shape = required(reader.tensors, name, "U8").shape
    if len(shape) != 4 or shape[-1] != BYTES:
        raise NotDequantisable(f"{name} has shape {list(shape)}, not [experts, rows, blocks, {BYTES}]")
    experts, rows, groups, _ = shape
    plain = name.removesuffix(BLOCKS)
    scales = required(reader.tensors, plain + SCALES, "U8", shape=shape[:3]).name

    def codes(reader: Reader, first: int, last: int) -> Bytes:
        return nibbles(reader.rows(name, first, last, groups * BYTES), high_first=False)

    def grid(reader: Reader) -> Grid:
        return Grid(E2M1, reader.bytes_of(scales).reshape(shape[:3]), width=NUMBERS, scale_book=E8M0)

    columns = groups * NUMBERS
    return Weight(plain, (experts, columns, rows), (name, scales), experts, rows, columns, codes, grid, transposed=True)
