"""The numbers in a tensor's bytes, without torch: as float64, exactly, and back, rounded once to nearest even."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

EDITABLE_DTYPES = ("BF16", "F16", "F32")
"""The types, as safetensors calls them, whose numbers can be made."""

Floats = npt.NDArray[np.float64]


def decode(data: bytes, dtype: str) -> Floats:
    """Elements as float64, exactly."""
    return widened(data, dtype).astype(np.float64)


def widened(data: bytes, dtype: str) -> npt.NDArray[np.floating[Any]]:
    """Elements in a type that numpy has: as they are, and BF16 as float32."""
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[dtype])


def encode(values: Floats, dtype: str) -> bytes:
    """float64 rounded once, to nearest even."""
    if dtype == "BF16":
        return _to_bf16(values).tobytes()
    with np.errstate(over="ignore"):
        return values.astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()


def _to_bf16(values: Floats) -> npt.NDArray[np.uint16]:
    """Round to odd in float32 first: its 16 spare bits then decide as the float64 would have, so nothing is rounded
    twice (S. Boldo, G. Melquiond, "Emulation of a FMA and correctly rounded sums", 2008)."""
    with np.errstate(over="ignore"):
        near = values.astype(np.float32)
    back = near.astype(np.float64)
    bits = near.view(np.uint32).copy()
    bits[np.abs(back) > np.abs(values)] -= 1
    bits[(back != values) & ~np.isnan(values)] |= 1
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype("<u2")
