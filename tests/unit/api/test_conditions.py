from datetime import UTC, datetime, timedelta

from finetune.api.conditions import ConditionStatus, ConditionType, find, initial, is_true, shortened, with_condition

START = datetime(2026, 1, 1, tzinfo=UTC)
LATER = START + timedelta(minutes=5)


def test_every_condition_is_unknown_from_the_first_visit():
    conditions = initial(START, generation=3)
    assert [condition.type for condition in conditions] == list(ConditionType)
    assert {condition.status for condition in conditions} == {ConditionStatus.UNKNOWN}
    assert {condition.observed_generation for condition in conditions} == {3}


def test_transition_time_moves_with_the_status_only():
    conditions = with_condition(
        initial(START, 1), ConditionType.TRAINED, ConditionStatus.FALSE, "Running", now=START, generation=1
    )
    same = with_condition(conditions, ConditionType.TRAINED, ConditionStatus.FALSE, "Retrying", now=LATER, generation=1)
    other = with_condition(same, ConditionType.TRAINED, ConditionStatus.TRUE, "Trained", now=LATER, generation=1)
    assert find(same, ConditionType.TRAINED).last_transition_time == START
    assert find(same, ConditionType.TRAINED).reason == "Retrying"
    assert find(other, ConditionType.TRAINED).last_transition_time == LATER
    assert is_true(other, ConditionType.TRAINED)


def test_conditions_keep_one_order_whatever_is_set_first():
    conditions = initial(START, 1)
    for kind in (ConditionType.FAILED, ConditionType.MODEL_DOWNLOADED):
        conditions = with_condition(conditions, kind, ConditionStatus.TRUE, "Because", now=LATER, generation=1)
    assert [condition.type for condition in conditions] == list(ConditionType)


def test_a_long_message_keeps_its_beginning_and_end():
    text = shortened("begin" + "x" * 10_000 + "end", 100)
    assert len(text) == 100
    assert text.startswith("begin")
    assert text.endswith("end")
