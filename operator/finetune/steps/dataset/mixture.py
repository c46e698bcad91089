"""Which examples are trained on, how often, and in what order: arithmetic on their numbers, deterministic by seed.

Mixing: each source gives its share of the mixture, which is as large as the sources' limits of repetition allow, and is
spread evenly over it, so that every part of the mixture has about the whole's proportions.

Buckets are ColossalAI's way to balance and order data: each source (and in it each category) is cut into bins, and each
bucket is made of one bin of every source, in the source's order; inside a bucket the order is random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ingredient:
    """A source's examples, by number, in its order; and its part of the mixture."""

    numbers: Numbers
    categories: npt.NDArray[np.int32]
    """The category of each."""

    weight: float | None = None
    max_repeats: int = 1


def amounts(ingredients: Sequence[Ingredient]) -> list[int]:
    """How many examples each ingredient gives, repeated ones counted each time.

    With weights w, limits r and n examples, the mixture has N = min(r n / (w / sum w)) examples; shares are rounded by
    largest remainder, so that they add up to N and miss their ratio by less than one example each.
    """
    if any(each.weight is None for each in ingredients):
        return [len(each.numbers) for each in ingredients]
    weights = np.array([each.weight for each in ingredients], np.float64)
    shares = weights / weights.sum()
    limits = np.array([each.max_repeats * len(each.numbers) for each in ingredients])
    total = int(np.floor(np.min(limits / shares) + 1e-9))
    exact = total * shares
    counts = np.floor(exact + 1e-9).astype(np.int64)
    by_remainder = np.argsort(counts - exact, kind="stable")
    counts[by_remainder[: total - counts.sum()]] += 1
    return [int(count) for count in np.minimum(counts, limits)]


def mixed(ingredients: Sequence[Ingredient], buckets: int | None, seed: int) -> list[Numbers]:
    """The numbers of the examples to train on, in order; one array for each bucket (one in all without buckets)."""
    random = np.random.default_rng((seed, 1))
    taken = [_taken(each, amount, random) for each, amount in zip(ingredients, amounts(ingredients), strict=True)]
    if buckets is None:
        return [_spread([each.numbers for each in taken], random)]
    bins = [_bins(each, buckets) for each in taken]
    return [random.permutation(np.concatenate([each[bucket] for each in bins])) for bucket in range(buckets)]


def _taken(ingredient: Ingredient, amount: int, random: np.random.Generator) -> Ingredient:
    """So many of the examples: all of them as often as they fit in, and a random sample for the rest, in order."""
    available = len(ingredient.numbers)
    passes, rest = divmod(amount, available) if available else (0, 0)
    sample = np.sort(random.choice(available, rest, replace=False)) if rest else np.zeros(0, np.int64)
    places = np.concatenate((np.tile(np.arange(available), passes), sample)).astype(np.int64)
    return Ingredient(ingredient.numbers[places], ingredient.categories[places])


def _spread(parts: Sequence[Numbers], random: np.random.Generator) -> Numbers:
    """The parts interleaved: the i-th of k examples stands at (i + u) / k of the whole, u drawn for each part."""
    places = [(np.arange(len(part)) + random.random()) / max(1, len(part)) for part in parts]
    result: Numbers = np.concatenate(parts)[np.argsort(np.concatenate(places), kind="stable")]
    return result


def _bins(ingredient: Ingredient, count: int) -> list[Numbers]:
    """The examples of each category cut into equal runs; a bin has one run of each category."""
    by_category = np.argsort(ingredient.categories, kind="stable")
    _, sizes = np.unique(ingredient.categories, return_counts=True)
    bins = np.empty(len(by_category), np.int64)
    start = 0
    for size in sizes:
        bins[by_category[start : start + size]] = np.arange(size) * count // size
        start += size
    return [ingredient.numbers[bins == bucket] for bucket in range(count)]


def held_out(rows: int, fraction: float, seed: int) -> Numbers:
    """The place of each row in the order in which `datasets.Dataset.train_test_split(fraction, seed=seed)` gives the
    rows: below zero for those that it holds out."""
    if not fraction:
        return np.arange(rows)
    places = np.empty(rows, np.int64)
    places[np.random.default_rng(seed).permutation(rows)] = np.arange(rows)
    return places - int(np.ceil(fraction * rows))


def in_both(keys: npt.NDArray[np.uint64], held: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which rows are trained on and equal (by key) to one that is held out."""
    return ~held & np.isin(keys, keys[held])


def like_the_first(keys: npt.NDArray[np.uint64], held: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which rows to hold out so that equal ones stay together: what becomes of the first becomes of all. The share that
    is held out stays what it is, on average, however often single rows are repeated."""
    _, first, row = np.unique(keys, return_index=True, return_inverse=True)
    result: npt.NDArray[np.bool_] = held[first][row]
    return result
