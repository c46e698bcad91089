"""What the codes of quantised weights stand for, as tables of float64 by code: exact, whatever the method."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]


def _e4m3() -> Floats:
    """float8_e4m3fn: no infinities, and two codes that are no number."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    values: Floats = np.where(code & 127 == 127, np.nan, np.where(code & 128, -size, size))
    return values


E4M3 = _e4m3()
INT8: Floats = np.arange(256).astype(np.uint8).view(np.int8).astype(np.float64)
E8M0: Floats = np.append(2.0 ** (np.arange(255) - 127.0), np.nan)
"""Scales that are powers of two."""

E2M1: Floats = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""The four bits of MXFP4."""

NF4: Floats = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip
"""bitsandbytes' own numbers, which are f32."""

_FP4 = np.array([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0], np.float32) / np.float32(12)
FP4: Floats = np.concatenate([_FP4, -_FP4]).astype(np.float64) + 0.0
"""bitsandbytes' own four bits, which are not those of MXFP4."""


def nibbles(data: Bytes, *, high_first: bool) -> Bytes:
    """Four-bit codes, two from each byte along the last axis."""
    low, high = data & 15, data >> 4
    pair = (high, low) if high_first else (low, high)
    return np.stack(pair, axis=-1).reshape(*data.shape[:-1], 2 * data.shape[-1])


def unpacked(words: Bytes, bits: int) -> Bytes:
    """Codes of `bits`, which divide 8, from little-endian words given as bytes: the lowest bits of a byte first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes: npt.NDArray[Any] = words[..., None] >> shifts & np.uint8((1 << bits) - 1)
    return codes.astype(np.uint8).reshape(*words.shape[:-1], -1)
