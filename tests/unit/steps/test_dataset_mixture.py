"""Which examples come, how often, in what order, and into which rows: arithmetic, without a tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.steps.dataset.mixture import Ingredient, amounts, held_out, mixed
from finetune.steps.dataset.packing import WINDOW, best_fit, packed, require_isolation
from finetune.steps.runtime.failure import StepFailure


def ingredient(
    first: int, count: int, weight: float | None = None, repeats: int = 1, categories: int = 1
) -> Ingredient:
    return Ingredient(np.arange(first, first + count), np.arange(count, dtype=np.int32) % categories, weight, repeats)


@pytest.mark.parametrize(
    ("ingredients", "expected"),
    [
        ([(1000, 0.9, 1), (10_000, 0.1, 1)], [1000, 111]),
        ([(1000, 9, 1), (10_000, 1, 1)], [1000, 111]),
        ([(1000, 0.5, 4), (10_000, 0.5, 1)], [4000, 4000]),
        ([(10, 1, 1), (10, 1, 1), (10, 1, 1)], [10, 10, 10]),
        ([(7, 1, 1), (100, 2, 1)], [7, 14]),
        ([(100, None, 1), (3, None, 1)], [100, 3]),
    ],
)
def test_a_mixture_is_as_large_as_the_limits_of_repetition_allow(ingredients: Any, expected: list[int]) -> None:
    assert amounts([ingredient(0, *each) for each in ingredients]) == expected


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0.01, 100), st.integers(1, 5)), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_the_ratio_is_met_within_one_example_and_no_limit_is_passed(parts: list[tuple[int, float, int]]) -> None:
    counts = amounts([ingredient(0, *part) for part in parts])
    weights = sum(weight for _, weight, _ in parts)
    for (available, weight, repeats), count in zip(parts, counts, strict=True):
        assert count <= available * repeats
        assert abs(count - sum(counts) * weight / weights) <= 1


def test_every_part_of_a_mixture_has_the_wholes_proportions() -> None:
    (order,) = mixed([ingredient(0, 900, 0.9), ingredient(5000, 5000, 0.1)], None, seed=3)
    assert len(order) == 1000
    for start in range(0, 1000, 100):
        assert 9 <= (order[start : start + 100] >= 5000).sum() <= 11


def test_a_row_is_used_as_often_as_its_neighbours_within_one() -> None:
    (order,) = mixed([ingredient(0, 10, 1, repeats=3), ingredient(100, 25, 1)], None, seed=3)
    uses = Counter(order[order < 100].tolist())
    assert (sum(uses.values()), set(uses.values())) == (25, {2, 3})


def test_without_weights_one_source_keeps_its_order_and_several_are_interleaved_whole() -> None:
    (alone,) = mixed([ingredient(0, 50)], None, seed=0)
    assert alone.tolist() == list(range(50))
    (both,) = mixed([ingredient(0, 50), ingredient(100, 10)], None, seed=0)
    assert sorted(both.tolist()) == [*range(50), *range(100, 110)]
    assert (both[:30] >= 100).sum() in (4, 5, 6)


def test_the_same_seed_gives_the_same_mixture_and_another_a_different_one() -> None:
    parts = [ingredient(0, 40, 1), ingredient(100, 400, 3)]
    for buckets in (None, 4):
        first, again, other = (np.concatenate(mixed(parts, buckets, seed)).tolist() for seed in (1, 1, 2))
        assert first == again
        assert first != other


def test_every_bucket_holds_one_bin_of_every_source_and_of_every_category() -> None:
    parts = [ingredient(0, 80, categories=4), ingredient(1000, 40)]
    buckets = mixed(parts, 8, seed=5)
    assert len(buckets) == 8
    for number, bucket in enumerate(buckets):
        first, second = bucket[bucket < 1000], bucket[bucket >= 1000]
        assert sorted(second.tolist()) == list(range(1000 + 5 * number, 1005 + 5 * number))
        assert set(Counter((first % 4).tolist()).values()) <= {2, 3}  # of 20 rows of a category in 8 bins
    assert sorted(np.concatenate(buckets).tolist()) == [*range(80), *range(1000, 1040)]


def test_inside_a_bucket_the_sources_are_shuffled_together() -> None:
    (bucket,) = mixed([ingredient(0, 100), ingredient(1000, 100)], 1, seed=5)
    assert 20 < (bucket[:100] < 1000).sum() < 80


@pytest.mark.parametrize(("rows", "fraction", "seed"), [(40, 0.1, 7), (41, 0.25, 0), (3, 0.5, 1)])
def test_the_same_rows_are_held_out_as_by_train_test_split(rows: int, fraction: float, seed: int) -> None:
    import datasets

    expected = datasets.Dataset.from_dict({"row": range(rows)}).train_test_split(fraction, seed=seed)
    places = held_out(rows, fraction, seed)
    in_order = np.argsort(places)
    held = int((places < 0).sum())
    assert in_order[:held].tolist() == expected["test"]["row"]
    assert in_order[held:].tolist() == expected["train"]["row"]


@given(st.integers(2, 300).flatmap(lambda size: st.tuples(st.just(size), st.lists(st.integers(1, size), max_size=80))))
@settings(max_examples=200, deadline=None)
def test_packing_loses_nothing_overfills_nothing_and_leaves_no_two_rows_that_fit_into_one(case: Any) -> None:
    size, lengths = case
    rows = best_fit(np.array(lengths, np.int32), size)
    assert sorted(place for row in rows for place in row.tolist()) == list(range(len(lengths)))
    filled = sorted(sum(lengths[place] for place in row) for row in rows)
    assert not filled or filled[-1] <= size
    assert len(filled) < 2 or filled[0] + filled[1] > size


def test_rows_are_filled_as_by_trls_best_fit() -> None:
    import pyarrow as pa
    from trl.data_utils import _pack_bfd

    lengths = np.random.default_rng(0).integers(2, 1025, 1000).astype(np.int32)
    table = pa.table({"input_ids": [[0] * length for length in lengths]})
    assert len(best_fit(lengths, 1024)) == len(_pack_bfd(table, 1024))


def test_windows_bound_the_work_and_keep_the_order_of_what_is_far_apart() -> None:
    lengths = np.full(3 * WINDOW, 10, np.int32)
    windows = list(packed(np.arange(3 * WINDOW), lengths, 100, seed=0))
    assert [len(window) for window in windows] == [-(-WINDOW // 10)] * 3
    for number, window in enumerate(windows):
        assert {int(place) // WINDOW for row in window for place in row} == {number}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "bloom"}, "ALiBi"),
        ({"model_type": "falcon", "alibi": True}, "ALiBi"),
        ({"model_type": "mamba2"}, "state space"),
        ({"model_type": "some_hybrid", "layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"model_type": "vision", "text_config": {"model_type": "qwen3_next"}}, "state space"),
    ],
)
def test_packing_is_refused_for_models_that_cannot_keep_examples_apart(
    tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StepFailure, match=words) as failure:
        require_isolation(tmp_path)
    assert failure.value.error.reason == "PackingNotPossible"


def test_packing_is_not_refused_for_models_of_positions_and_attention(tmp_path: Path) -> None:
    for config in ({"model_type": "llama"}, {"model_type": "falcon"}, {"layer_types": ["sliding_attention"]}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        require_isolation(tmp_path)
