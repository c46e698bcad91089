"""What somebody else wrote is read as far as it can be read: a newer operator's status, a foreign trainer's report."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.api.conditions import ConditionStatus, ConditionType, is_true, with_condition, word
from finetune.api.contract import Step, StepReport
from finetune.api.crd import crd
from finetune.api.reading import read, readable, storable, unknown_fields
from finetune.api.spec import FineTuneJobSpec
from finetune.api.status import DatasetStatus, FineTuneJobStatus, TrainingStatus
from tests.builders import NOW, SPEC, stamp

CONDITION = {"type": "Trained", "status": "True", "reason": "Succeeded", "lastTransitionTime": stamp(NOW)}
ATTEMPT = {"stage": "train", "number": 1, "outcome": "Crashed", "reason": "", "message": ""}
STATUS = {
    "phase": "Training",
    "startTime": stamp(NOW),
    "specDigest": "sha256:1",
    "conditions": [CONDITION],
    "attempts": {"count": 2, "failures": 1, "history": [ATTEMPT]},
}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("newer",), {"deep": [1, {"x": "y"}]}),
        (("attempts", "goodput"), 0.75),
        (("attempts", "history", 0, "lostSteps"), 12),
        (("conditions", 0, "severity"), "Info"),
    ],
    ids=str,
)
def test_a_newer_operators_field_is_kept_at_any_depth(place, value):
    document = json.loads(json.dumps(STATUS))
    found = document
    for part in place[:-1]:
        found = found[part]
    found[place[-1]] = value
    status = read(FineTuneJobStatus, document)
    assert (status.start_time, status.attempts.failures) == (NOW, 1)
    found = status.wire()
    for part in place:
        found = found[part]
    assert found == value


def test_a_newer_operators_words_are_kept_and_no_attempt_is_forgotten():
    attempts = STATUS["attempts"] | {"history": [ATTEMPT | {"outcome": "Hung"}]}
    status = read(FineTuneJobStatus, STATUS | {"phase": "Queued", "attempts": attempts})
    assert (status.phase, status.attempts.history[0].outcome) == ("Queued", "Hung")
    assert status.wire()["attempts"]["history"][0]["outcome"] == "Hung"


def test_a_newer_operators_condition_stands_beside_ours():
    ready = CONDITION | {"type": "Ready"}
    status = read(FineTuneJobStatus, STATUS | {"conditions": [ready, CONDITION]})
    conditions = with_condition(
        status.conditions, ConditionType.SAVED, ConditionStatus.TRUE, "Succeeded", now=NOW, generation=1
    )
    assert [item.type for item in conditions] == ["Trained", "Saved", "Ready"]
    assert is_true(conditions, ConditionType.TRAINED)


def test_what_cannot_be_read_is_left_out_by_itself():
    attempts = {"count": "many", "failures": 1, "history": [ATTEMPT, ATTEMPT | {"number": "x"}, {}, "y"]}
    document = STATUS | {"message": 5, "attempts": attempts, "conditions": [{"type": "Saved"}, CONDITION]}
    status = read(FineTuneJobStatus, document)
    assert status.start_time == NOW
    assert (status.attempts.count, status.attempts.failures, len(status.attempts.history)) == (0, 1, 1)
    assert [item.type for item in status.conditions] == ["Trained"]


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
FIELDS = st.sampled_from(
    [*STATUS, "progress", "training", "history", "step", "type", "status", "outcome", "number", "x"]
)
JSON = st.recursive(LEAVES, lambda item: st.lists(item, max_size=3) | st.dictionaries(FIELDS, item, max_size=4))


@given(st.dictionaries(FIELDS, JSON, max_size=6))
def test_reading_a_status_never_fails(document):
    read(FineTuneJobStatus, document).wire()


def test_the_unknown_fields_of_a_spec_have_their_paths():
    spec = SPEC | {"newer": 1, "training": SPEC["training"] | {"speed": "high"}}
    assert unknown_fields(FineTuneJobSpec, spec) == ("training.speed", "newer")
    assert unknown_fields(FineTuneJobSpec, SPEC) == ()


@pytest.mark.parametrize("number", [2**63, -(2**64), 10**400, float("nan"), float("inf")])
def test_a_number_that_no_server_stores_is_left_out_and_the_rest_of_the_report_counts(number):
    found = {"loss": 1.5, "steps": number, "checkpoint": {"step": number, "time": None}, "warnings": ["a", number]}
    report = StepReport.from_json(json.dumps({"step": "train", "result": found, "resumed_from_step": number}))
    assert report.result == {"loss": 1.5, "checkpoint": {"time": None}, "warnings": ["a"]}
    assert report.resumed_from_step is None


@pytest.mark.parametrize(
    ("reason", "kept"),
    [
        ("404NotFound", "Code404NotFound"),
        ("no space: left", "nospaceleft"),
        ("!!", ""),
        ("Ä", ""),
        ("x" * 500, "x" * 128),
    ],
)
def test_whatever_a_foreign_trainer_gives_as_its_reason_a_condition_takes_it(reason, kept):
    report = StepReport.from_json(json.dumps({"step": "train", "error": {"reason": reason, "message": "m"}}))
    assert report.error.reason == kept
    (failed,) = with_condition([], ConditionType.FAILED, ConditionStatus.TRUE, reason, now=NOW, generation=1)
    assert failed.reason == (kept or "Unknown")


@given(st.text(max_size=200))
def test_every_text_makes_a_reason_that_the_definition_allows(text):
    with_condition([], ConditionType.FAILED, ConditionStatus.TRUE, word(text), now=NOW, generation=1)


def test_unknown_parts_of_a_report_cost_nothing_but_themselves():
    text = json.dumps({"step": "train", "colour": "red", "result": {"steps": 4}, "error": {"message": "no reason"}})
    assert StepReport.from_json(text) == StepReport(step=Step.TRAIN, result={"steps": 4})


def test_of_a_report_only_what_the_definition_has_comes_into_status():
    found = {"steps": 4, "colour": "red", "checkpoint": {"step": 3, "size": 1}, "warnings": ["a", 5, "x" * 5000]}
    assert readable(TrainingStatus, found) == {"steps": 4, "checkpoint": {"step": 3}, "warnings": ["a"]}
    assert readable(DatasetStatus, {"droppedBy": {"TooLong": -1, "NothingToLearn": 2}, "rows": 1}) == {
        "droppedBy": {"NothingToLearn": 2}
    }


def test_storable_keeps_what_is_sound():
    assert storable({"a": [1, 2.5, True, None, "x", {"b": -(2**63)}]}) == {
        "a": [1, 2.5, True, None, "x", {"b": -(2**63)}]
    }


def test_the_definition_is_as_closed_as_ever():
    assert "'additionalProperties': True" not in str(crd())
    assert "x-kubernetes-preserve-unknown-fields" not in str(crd())
