"""A pod's live report: from the bytes on the wire to `status.progress`. Whatever is not sound is dropped.

The format is the one that transformers' KubeflowCallback sends, so any trainer image reports without a line of code;
our own steps add metrics: step, current, total, unit, checkpoint_step, validation_loss, tokens_per_second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import orjson

from finetune.api.contract import Step
from finetune.api.status import Progress, Unit

MAX_BODY = 64 * 1024
MAX_METRICS = 256
_MAX_COUNT = 2**53
_MAX_SECONDS = 10 * 365 * 86_400


class BadReportError(ValueError):
    """The body is not a report at all."""


@dataclass(frozen=True)
class Report:
    """What a report says, as far as it is sound."""

    percent: int | None = None
    remaining_seconds: int | None = None
    numbers: dict[str, float] = field(default_factory=dict)
    step: str = ""
    phase: str | None = None
    unit: Unit | None = None


def parse(body: bytes) -> Report:
    """The report in a request's body. Raises BadReportError when there is none."""
    if len(body) > MAX_BODY:
        raise BadReportError("the report is too long")
    try:
        status = orjson.loads(body)["trainerStatus"]
        metrics = status.get("metrics") or []
        if not isinstance(status, dict) or not isinstance(metrics, list):
            raise TypeError
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise BadReportError('expected {"trainerStatus": {...}}') from error
    numbers: dict[str, float] = {}
    words: dict[str, str] = {}
    for metric in metrics[:MAX_METRICS]:
        if not isinstance(metric, dict) or not isinstance(name := metric.get("name"), str):
            continue
        value = metric.get("value")
        if (number := _number(value)) is not None:
            numbers[name[:64]] = number
        elif isinstance(value, str):
            words[name[:64]] = value[:64]
    percent, seconds = _number(status.get("progressPercentage")), _number(status.get("estimatedRemainingSeconds"))
    return Report(
        percent=None if percent is None else int(min(100, max(0, percent))),
        remaining_seconds=None if seconds is None else int(min(_MAX_SECONDS, max(0, seconds))),
        numbers=numbers,
        step=words.get("step", ""),
        phase=words.get("phase", "")[:32] or None,
        unit=Unit(words["unit"]) if words.get("unit") in set(Unit) else None,
    )


def progress(report: Report, step: Step, before: Progress | None, now: datetime) -> Progress:
    """The progress to show, given the step whose container runs and what was shown before.

    What a report leaves out keeps its value within the step; of an earlier step only the losses stay.
    """
    same = before is not None and before.step == step
    numbers = report.numbers
    current = _count(numbers, "current", "current_step")
    total = _count(numbers, "total", "total_steps")
    kept = before.wire() if before and same else {}
    percent = report.percent
    if percent is None:
        percent = min(100, current * 100 // total) if current is not None and total else int(kept.get("percent", 0))
    unit = report.unit or (Unit.STEP if step == Step.TRAIN else None)
    fields: dict[str, Any] = {
        "current": current,
        "total": total,
        "unit": unit,
        "phase": report.phase,
        "loss": _rounded(numbers, "loss", "train_loss"),
        "validationLoss": _rounded(numbers, "validation_loss", "eval_loss"),
        "learningRate": _rounded(numbers, "learning_rate"),
        "tokensPerSecond": _rounded(numbers, "tokens_per_second"),
        "checkpointStep": _count(numbers, "checkpoint_step"),
    }
    if before and not same:
        kept = {"loss": before.loss, "validationLoss": before.validation_loss, "checkpointStep": before.checkpoint_step}
    document = kept | {key: value for key, value in fields.items() if value is not None}
    seconds = report.remaining_seconds
    now = now.replace(microsecond=0)
    document |= {
        "step": step.value,
        "percent": percent,
        "remaining": "" if seconds is None or percent == 100 else duration(seconds),
        "estimatedCompletionTime": None if seconds is None else now + timedelta(seconds=seconds),
        "lastUpdateTime": now,
        "lastAdvanceTime": before.last_advance_time if before and same and _stands(before, current) else now,
        "summary": summary(percent, document.get("current"), document.get("total"), document.get("unit")),
    }
    return Progress.model_validate(document)


def _stands(before: Progress, current: int | None) -> bool:
    """Whether nothing more is done than before; a report that does not count says nothing about it."""
    return current is not None and before.current == current


def summary(percent: int, current: int | None, total: int | None, unit: str | None) -> str:
    """The progress column: `21% 120/562`, `43% 1.2/2.7 GB`."""
    if current is None or not total:
        return f"{percent}%"
    if unit != Unit.BYTE:
        return f"{percent}% {current}/{total}"
    for name, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if total >= size:
            return f"{percent}% {current / size:.1f}/{total / size:.1f} {name}"
    return f"{percent}% {current}/{total} B"


def duration(seconds: int) -> str:
    """The remaining-time column: `45s`, `12m`, `3h20m`, `2d4h`."""
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86_400
    if seconds < 60:
        return f"{seconds}s"
    if minutes < 60:
        return f"{minutes}m"
    if hours < 24:
        return f"{hours}h{minutes % 60}m" if minutes % 60 else f"{hours}h"
    return f"{days}d{hours % 24}h" if hours % 24 else f"{days}d"


def _number(value: object) -> float | None:
    """A finite number, also when it is written as a string, as the stock callback does."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value[:64] if isinstance(value, str) else value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _rounded(numbers: dict[str, float], *names: str) -> float | None:
    """To four digits: kubectl's columns print a number with all that it has."""
    return next((float(f"{numbers[name]:.4g}") for name in names if name in numbers), None)


def _count(numbers: dict[str, float], *names: str) -> int | None:
    for name in names:
        if name in numbers and 0 <= numbers[name] <= _MAX_COUNT:
            return int(numbers[name])
    return None
