"""New rows: one rounding, to nearest even, and the same bits as torch where torch rounds once."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.steps.tokens.initialise import Copy, Mean, VocabularyMean, decode, encode, initial_rows, mean_of_all

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def matrix(dtype: str, rows: int = 900, columns: int = 48) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)).mul(0.02).to(DTYPES[dtype])


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def reader(tensor: torch.Tensor):
    return lambda first, last: bytes_of(tensor[first:last])


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_bf16_is_the_nearest_even_neighbour_of_the_float64(value: float) -> None:
    (bits,) = np.frombuffer(encode(np.array([value]), "BF16"), "<u2")
    magnitude = int(bits) & 0x7FFF
    got = np.abs(decode(encode(np.array([value]), "BF16"), "BF16")[0])
    wanted = abs(value)
    if not np.isfinite(got):
        assert wanted >= float(2**127 * (2 - 2**-8))
        return

    def distance(candidate: int) -> Fraction:
        pattern = np.array([candidate], "<u2").tobytes()
        other = decode(pattern, "BF16")[0]
        return abs(Fraction(float(other)) - Fraction(wanted)) if np.isfinite(other) else Fraction(2) ** 200

    neighbours = [distance(magnitude + step) for step in (-1, 1) if magnitude + step >= 0]
    assert all(distance(magnitude) <= other for other in neighbours)
    if distance(magnitude) in neighbours:
        assert magnitude % 2 == 0


def test_not_a_number_stays_one() -> None:
    assert np.isnan(decode(encode(np.array([np.nan, -np.nan]), "BF16"), "BF16")).all()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_means_of_pieces_have_the_bits_that_torch_gives(dtype: str) -> None:
    weights = matrix(dtype)
    for rows in ([5], [1, 2], [7, 8, 9], [3, 3, 4, 899], list(range(11))):
        ours = initial_rows([Mean(tuple(rows))], reader(weights), dtype, lambda: np.zeros(0))
        assert ours == bytes_of(weights[rows].float().mean(0).to(DTYPES[dtype]))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_the_mean_of_the_vocabulary_is_that_of_float64(dtype: str) -> None:
    weights = matrix(dtype)
    mean = mean_of_all(reader(weights), 900, 48, dtype)
    assert encode(mean, dtype) == bytes_of(weights.double().mean(0).to(DTYPES[dtype]))
    in_order = np.zeros(48)
    for row in weights.double().numpy():
        in_order = in_order + row
    assert (mean == in_order / 900).all()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_copy_is_a_copy(dtype: str) -> None:
    weights = matrix(dtype)
    inits = [Copy(4), VocabularyMean(), Copy(4)]
    rows = initial_rows(inits, reader(weights), dtype, lambda: np.full(48, 0.5))
    parts = np.frombuffer(rows, np.uint8).reshape(3, -1)
    assert parts[0].tobytes() == parts[2].tobytes() == bytes_of(weights[4])
    assert (decode(parts[1].tobytes(), dtype) == 0.5).all()
