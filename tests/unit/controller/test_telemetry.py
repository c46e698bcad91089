"""Live reports: what is shown, and what hostile ones can do."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.api.contract import Step
from finetune.api.status import Progress
from finetune.controller.serving.telemetry import BadReportError, Report, duration, parse, progress, summary
from tests.builders import NOW


def body(percent=None, seconds=None, **metrics) -> bytes:
    status = {"metrics": [{"name": name, "value": str(value)} for name, value in metrics.items()]}
    if percent is not None:
        status["progressPercentage"] = percent
    if seconds is not None:
        status["estimatedRemainingSeconds"] = seconds
    return json.dumps({"trainerStatus": status}).encode()


def test_a_stock_callbacks_report_fills_the_columns():
    report = parse(body(21, 754, loss=1.5, learning_rate=1e-5, current_step=120, total_steps=562, grad_norm=3))
    shown = progress(report, Step.TRAIN, None, NOW)
    assert shown.summary == "21% 120/562"
    assert shown.remaining == "12m"
    assert (shown.loss, shown.learning_rate, shown.current, shown.total, shown.unit) == (1.5, 1e-5, 120, 562, "step")
    assert shown.estimated_completion_time == NOW + timedelta(seconds=754)


def test_only_a_count_that_changes_is_an_advance_and_a_report_that_does_not_count_is_no_standstill():
    later, latest = NOW + timedelta(seconds=10), NOW + timedelta(seconds=20)
    first = progress(parse(body(current_step=5)), Step.TRAIN, None, NOW)
    same = progress(parse(body(current_step=5, loss=1.0)), Step.TRAIN, first, later)
    assert (same.last_update_time, same.last_advance_time) == (later, NOW)
    assert progress(parse(body(current_step=6)), Step.TRAIN, same, latest).last_advance_time == latest
    assert progress(parse(body(loss=1.0)), Step.TRAIN, same, latest).last_advance_time == latest


def test_bytes_are_shown_as_people_write_them():
    report = parse(body(step="download", current=1_200_000_000, total=2_700_000_000, unit="byte"))
    assert report.step == "download"
    assert progress(report, Step.DOWNLOAD, None, NOW).summary == "44% 1.2/2.7 GB"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((43, 1_200_000_000, 2_700_000_000, "byte"), "43% 1.2/2.7 GB"),
        ((5, 50, 1000, "row"), "5% 50/1000"),
        ((5, 2_000, 40_000, "byte"), "5% 2.0/40.0 kB"),
        ((5, 20, 400, "byte"), "5% 20/400 B"),
        ((7, None, None, None), "7%"),
    ],
)
def test_the_progress_column(arguments, text):
    assert summary(*arguments) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59, "59s"), (60, "1m"), (754, "12m"), (3600, "1h"), (12_000, "3h20m"), (190_000, "2d4h")],
)
def test_the_remaining_column(seconds, text):
    assert duration(seconds) == text


def test_what_a_report_leaves_out_stays_within_the_step():
    before = Progress(step="train", loss=1.0, checkpoint_step=50, tokens_per_second=9.0)
    shown = progress(parse(body(30)), Step.TRAIN, before, NOW)
    assert (shown.loss, shown.checkpoint_step, shown.tokens_per_second) == (1.0, 50, 9.0)


def test_of_an_earlier_step_only_losses_stay():
    before = Progress(step="train", loss=1.0, current=4, total=4, tokens_per_second=9.0)
    shown = progress(parse(body(30)), Step.SAVE, before, NOW)
    assert (shown.loss, shown.current, shown.tokens_per_second) == (1.0, None, None)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", None, True, [], {}, "x" * 10_000])
def test_what_is_no_finite_number_is_dropped(value):
    text = json.dumps({"trainerStatus": {"progressPercentage": value, "metrics": [{"name": "loss", "value": value}]}})
    report = parse(text.encode())
    assert report.percent is None
    assert "loss" not in report.numbers
    assert progress(report, Step.TRAIN, None, NOW).loss is None


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b"null", b'{"trainerStatus": 3}', b'{"trainerStatus": {"metrics": 1}}', b"\xff"]
)
def test_what_is_no_report_is_refused(text):
    with pytest.raises(BadReportError):
        parse(text)


def test_a_report_that_is_too_long_is_refused():
    with pytest.raises(BadReportError):
        parse(b" " * 70_000)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
names = st.sampled_from(
    ["loss", "current", "total", "current_step", "total_steps", "checkpoint_step", "unit", "step", "eval_loss", "x"]
)
reports = st.fixed_dictionaries(
    {
        "progressPercentage": json_values,
        "estimatedRemainingSeconds": json_values,
        "metrics": st.lists(st.fixed_dictionaries({"name": names, "value": json_values}), max_size=8) | json_values,
    }
)


@given(reports, st.sampled_from(list(Step)))
def test_no_report_whatever_breaks_the_status(status, step):
    try:
        report = parse(json.dumps({"trainerStatus": status}).encode())
    except BadReportError:
        return
    shown = progress(report, step, None, NOW)
    assert Progress.model_validate(shown.wire()) == shown
    assert 0 <= shown.percent <= 100


def test_an_empty_report_is_harmless():
    assert progress(Report(), Step.TRAIN, None, NOW).summary == "0%"
