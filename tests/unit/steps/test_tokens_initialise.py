"""New rows: one rounding, to nearest even, and the same bits as torch where torch rounds once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.steps.model_files.floats import Floats, decode, encode
from finetune.steps.tokens.initialise import Copy, Init, Mean, Noisy, Normal, OldRows, VocabularyMean, initial_rows

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def matrix(dtype: str, rows: int = 900, columns: int = 48) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)).mul(0.02).to(DTYPES[dtype])


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def old_rows(tensor: torch.Tensor) -> OldRows:
    dtype = next(name for name, of_torch in DTYPES.items() if of_torch == tensor.dtype)
    columns = tensor.shape[1] if tensor.ndim == 2 else 1
    return OldRows(lambda first, last: bytes_of(tensor[first:last]), dtype, tensor.shape[0], columns)


def values(inits: Sequence[Init], tensor: torch.Tensor) -> Floats:
    old = old_rows(tensor)
    return decode(initial_rows(inits, old), old.dtype).reshape(len(inits), -1)


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
        ours = initial_rows([Mean(tuple(rows))], old_rows(weights))
        assert ours == bytes_of(weights[rows].float().mean(0).to(DTYPES[dtype]))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_the_mean_of_the_vocabulary_is_that_of_float64(dtype: str) -> None:
    weights = matrix(dtype)
    mean = old_rows(weights).mean
    assert encode(mean, dtype) == bytes_of(weights.double().mean(0).to(DTYPES[dtype]))
    in_order = np.zeros(48)
    for row in weights.double().numpy():
        in_order = in_order + row
    assert (mean == in_order / 900).all()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_copy_is_a_copy(dtype: str) -> None:
    weights = matrix(dtype)
    rows = initial_rows([Copy(4), VocabularyMean(), Copy(4)], old_rows(weights))
    parts = np.frombuffer(rows, np.uint8).reshape(3, -1)
    assert parts[0].tobytes() == parts[2].tobytes() == bytes_of(weights[4])
    assert parts[1].tobytes() == encode(old_rows(weights).mean, dtype)


def correlated(rows: int, columns: int, dtype: str = "F32") -> torch.Tensor:
    """Rows with a mean, and columns of different scale that depend on each other."""
    generator = torch.Generator().manual_seed(5)
    mixed = torch.randn(rows, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return (mixed * torch.linspace(0.1, 1, columns) + torch.linspace(-1, 1, columns)).to(DTYPES[dtype])


DRAWS = 20_000


@pytest.mark.parametrize("rows", [500, 6], ids=["more rows than columns", "fewer rows than columns"])
def test_drawn_rows_are_distributed_as_the_old_ones_scaled(rows: int) -> None:
    """Along the covariance's axes the draws are independent and normal, so their squared lengths are chi-squared."""
    weights = correlated(rows, 8)
    drawn = values([Normal((1, id_)) for id_ in range(DRAWS)], weights)
    old = weights.double().numpy()
    spread, directions = np.linalg.eigh(np.cov(old.T, bias=True))
    varies = spread > 1e-9 * spread.max()
    assert varies.sum() == min(8, rows - 1)
    off = (drawn - old.mean(axis=0)) @ directions / np.sqrt(1e-5 * spread.clip(min=1e-12))
    degrees = int(varies.sum())
    off = torch.from_numpy(off[:, varies])
    assert_uniform(torch.special.gammainc(torch.tensor(degrees / 2).double(), off.square().sum(dim=1) / 2))
    assert float(off.mean(dim=0).abs().max()) < 6 / np.sqrt(DRAWS)
    assert np.corrcoef(off.T) == pytest.approx(np.eye(degrees), abs=6 / np.sqrt(DRAWS))
    for column in off.T:
        assert_uniform(torch.special.ndtr(column))


def assert_uniform(probabilities: torch.Tensor) -> None:
    """Kolmogorov's test: the right distribution fails it once in a million seeds."""
    ranked, count = probabilities.sort().values, len(probabilities)
    distance = float((ranked - (torch.arange(count) + 0.5) / count).abs().max())
    assert distance * np.sqrt(count) < np.sqrt(-np.log(1e-6 / 2) / 2)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_drawn_rows_differ_in_every_type(dtype: str) -> None:
    drawn = values([Normal((1, id_)) for id_ in range(50)], correlated(300, 64, dtype))
    assert len({row.tobytes() for row in drawn}) == 50


@pytest.mark.parametrize("make", [Normal, lambda seed: Noisy(VocabularyMean(), 0.1, seed)], ids=["normal", "noise"])
def test_a_draw_depends_on_seed_and_id_and_on_nothing_else(make: Callable[[tuple[int, int]], Init]) -> None:
    weights = correlated(700, 32, "BF16")
    alone = {id_: initial_rows([make((1, id_))], old_rows(weights)) for id_ in (384, 385, 400)}
    assert len(set(alone.values())) == 3
    together = initial_rows([make((1, id_)) for id_ in (400, 384, 385)], old_rows(weights))
    assert together == alone[400] + alone[384] + alone[385]
    assert initial_rows([make((2, 384))], old_rows(weights)) != alone[384]


@pytest.mark.parametrize("start", [Copy(7), Mean((1, 2, 3)), VocabularyMean()], ids=repr)
def test_noise_is_relative_to_each_columns_deviation(start: Copy | Mean | VocabularyMean) -> None:
    weights = correlated(500, 8)
    (center,) = values([start], weights)
    noise = values([Noisy(start, 0.02, (1, id_)) for id_ in range(DRAWS)], weights) - center
    relative = noise / (0.02 * weights.double().numpy().std(axis=0))
    assert relative.std(axis=0) == pytest.approx(np.ones(8), rel=0.03)
    for column in torch.from_numpy(relative).T:
        assert_uniform(torch.special.ndtr(column))


def test_the_bias_of_a_head_is_a_matrix_of_one_column() -> None:
    bias = torch.linspace(-1, 2, 300)
    inits: list[Init] = [Copy(3), Mean((0, 299)), VocabularyMean(), Normal((1, 5)), Noisy(Copy(3), 0.01, (1, 6))]
    copied, averaged, mean, drawn, noisy = values(inits, bias)[:, 0]
    assert (copied, averaged, mean) == (bias[3], 0.5, pytest.approx(0.5))
    assert 0 < abs(drawn - mean) < 0.02 and 0 < abs(noisy - copied) < 0.06


def test_no_start_overflows_f16() -> None:
    """The rows lie at the largest number that the type has; their sum lies far beyond."""
    weights = torch.full((64, 16), 65504.0, dtype=torch.float16)
    weights[::2, ::2] = -65504.0
    inits: list[Init] = [Mean(tuple(range(64))), Mean((1, 3, 5)), VocabularyMean()]
    inits += [Normal((1, id_)) for id_ in range(20)]
    inits += [Noisy(Copy(1), 1.0, (1, id_)) for id_ in range(20)]
    rows = values(inits, weights)
    assert np.isfinite(rows).all()
    assert (rows[1] == 65504).all() and (np.abs(rows) == 65504).any(axis=1)[3:].any()


def test_what_is_not_finite_in_the_base_model_is_not_hidden() -> None:
    weights = torch.ones(8, 4)
    weights[2, 1] = torch.inf
    assert not np.isfinite(values([Mean((1, 2))], weights)[0, 1])
    assert np.isnan(values([Normal((1, 1))], weights)).any() and np.isnan(
        values([Noisy(Copy(1), 0.1, (1, 1))], weights)[0, 1]
    )
