"""Curves as inline SVG, for a page that must not load anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WIDTH = 880.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, 16.0, 12.0, 28.0
TICKS = 5
DRAWN = 1_200
"""Points of a curve that are drawn: more than there are pixels to tell apart."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One curve. `kind` names its style in the page: raw, mean, held-out, rate."""

    name: str
    kind: str
    points: Sequence[Point]
    dots: bool = False


def chart(series: Sequence[Series], height: float) -> dict[str, Any]:
    """What the page draws: ticks of both axes, a path and dots for each series, in pixels; and the scales, by which a
    script finds the values under the pointer. y starts at 0 and ends at a round number; points beyond the 99.5 %
    quantile of a raw curve may leave the picture at the top."""
    filled = [each for each in series if each.points]
    last = max(point[0] for each in filled for point in each.points)
    first = min(point[0] for each in filled for point in each.points)
    highest = max(_highest(each) for each in filled)
    ticks = _round_ticks(highest)
    top = ticks[-1]
    span = (last - first) or 1.0

    def x(step: float) -> float:
        return LEFT + (step - first) / span * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return height - BOTTOM - min(value / top, 1.05) * (height - TOP - BOTTOM)

    drawn = []
    for each in filled:
        stride = -(-len(each.points) // DRAWN)
        points = [*each.points[:-1:stride], each.points[-1]]
        drawn.append(
            {
                "name": each.name,
                "kind": each.kind,
                "path": "M" + "L".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points),
                "dots": [(round(x(step), 1), round(y(value), 1)) for step, value in points] if each.dots else [],
                "points": [(step, float(f"{value:.5g}")) for step, value in points],
            }
        )
    return {
        "width": WIDTH,
        "height": height,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "top": TOP,
        "bottom": height - BOTTOM,
        "first": first,
        "span": span,
        "ticks_y": [(round(y(value), 1), _number(value)) for value in ticks],
        "ticks_x": [(round(x(step), 1), f"{step:,.0f}") for step in _steps(first, last)],
        "series": drawn,
    }


def smoothed(values: Sequence[float]) -> list[float]:
    """The exponential running mean over about a tenth of the run."""
    share = 2 / (1 + max(1.0, len(values) / 10))
    smooth: list[float] = []
    for value in values:
        smooth.append(value if not smooth else smooth[-1] + share * (value - smooth[-1]))
    return smooth


def _highest(series: Series) -> float:
    values = sorted(value for _, value in series.points)
    return values[min(len(values) - 1, int(len(values) * 0.995))]


def _round_ticks(highest: float) -> list[float]:
    """0 and multiples of 1, 2, 2.5 or 5 times a power of ten, up to at least `highest`."""
    if highest <= 0:
        return [0.0, 1.0]
    rough = highest / (TICKS - 1)
    power = 10 ** math.floor(math.log10(rough))
    size = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [float(f"{number * size:.6g}") for number in range(math.ceil(highest / size - 1e-9) + 1)]


def _steps(first: float, last: float) -> list[float]:
    """Round steps between the ends, and the last."""
    between = [tick for tick in _round_ticks(last) if first <= tick and tick == int(tick)]
    room = (last - first) * 0.06
    return [*(tick for tick in between if tick <= last - room), last] if last > first else [first]


def _number(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e") if abs(value) < 1e-2 else f"{value:,.4g}"
