"""What is left of a report that the kubelet cut, and what is said about it."""

from __future__ import annotations

import json

import pytest

from finetune.api.contract import Step
from finetune.controller.decision.stages.reports import read

REPORT = {"step": "train", "result": {"steps": 1234, "loss": 0.5, "adapted": ["x" * 5000]}, "resumedFromStep": 12}
KEPT_END = json.dumps(REPORT)[-4096:]
"""What the kubelet keeps of a container's file."""

KEPT_BEGINNING = json.dumps(REPORT)[:3072]
"""What it keeps of that among four containers."""


def test_a_whole_report_is_read_without_a_word():
    report, note = read('{"step": "train", "result": {"steps": 4}}', Step.TRAIN, 0, 1)
    assert (report.result, note) == ({"steps": 4}, "")


def test_of_a_report_without_its_end_the_whole_values_are_read():
    report, note = read(KEPT_BEGINNING, Step.TRAIN, 0, 4)
    assert report.result == {"steps": 1234, "loss": 0.5}
    assert note == (
        "the report was cut by the kubelet, and only its whole parts could be read: keep it below 3072 bytes"
    )


def test_a_number_that_was_cut_through_is_not_believed():
    text = '{"step": "train", "pad": "' + "x" * 4040 + '", "result": {"loss": 0.5, "steps": 1234}}'
    cut = text[: text.index("1234") + 2]
    report, note = read(cut, Step.TRAIN, 0, 3)
    assert report is None or report.result in (None, {"loss": 0.5})
    assert "cut by the kubelet" in note


def test_of_a_report_without_its_beginning_only_its_own_fields_are_read_not_those_of_what_was_cut():
    report, note = read(KEPT_END, Step.TRAIN, 0, 1)
    assert (report.result, report.resumed_from_step) == (None, 12)
    assert "keep it below 4096 bytes" in note


@pytest.mark.parametrize(
    ("message", "code"), [("Traceback: x", 1), ("x" * 4096, 1), ("saved", 0), ('{"step": "save"}', 0), ("", 0)]
)
def test_what_is_no_report_or_was_not_cut_is_passed_over(message, code):
    assert read(message, Step.TRAIN, code, 1) == (None, "")


def test_nothing_sound_may_be_left():
    report, note = read("x" * 4096, Step.TRAIN, 0, 1)
    assert report is None
    assert "nothing of it could be read" in note
