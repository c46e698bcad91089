"""The retry budget."""

from __future__ import annotations

from datetime import timedelta

import pytest

from finetune.api.status import Attempt, AttemptOutcome, Attempts
from finetune.controller.decision import budget
from tests.builders import NOW


def attempt(number: int, outcome: AttemptOutcome, resumed: int | None = None, checkpoint: int | None = None) -> Attempt:
    return Attempt(stage="train", number=number, outcome=outcome, resumed_from_step=resumed, checkpoint_step=checkpoint)


def after(*ends: Attempt) -> Attempts:
    attempts = Attempts()
    for end in ends:
        attempts = budget.charged(attempts, end, NOW)
    return attempts


@pytest.mark.parametrize(("failures", "seconds"), [(1, 10), (2, 20), (3, 40), (4, 80), (6, 300), (1000, 300)])
def test_back_off_doubles_up_to_five_minutes(failures, seconds):
    assert budget.back_off(failures) == timedelta(seconds=seconds)


def test_failures_in_a_row_add_up():
    crash = AttemptOutcome.CRASHED
    assert after(attempt(1, crash), attempt(2, crash), attempt(3, crash)).failures == 3


def test_a_new_checkpoint_clears_what_went_before():
    crash = AttemptOutcome.CRASHED
    attempts = after(attempt(1, crash, 0, 0), attempt(2, crash, 0, 0), attempt(3, crash, 0, 50))
    assert attempts.failures == 1


def test_the_same_checkpoint_again_clears_nothing():
    crash = AttemptOutcome.CRASHED
    assert after(attempt(1, crash, 0, 50), attempt(2, crash, 50, 50)).failures == 2


def test_without_a_word_about_resumption_the_former_checkpoint_counts():
    crash = AttemptOutcome.CRASHED
    assert after(attempt(1, crash, 0, 50), attempt(2, crash, None, 50)).failures == 2
    assert after(attempt(1, crash, 0, 50), attempt(2, crash, None, 100)).failures == 1


@pytest.mark.parametrize("outcome", [AttemptOutcome.PREEMPTED, AttemptOutcome.NODE_LOST])
def test_a_preemption_costs_nothing_and_does_not_wait(outcome):
    attempts = after(attempt(1, AttemptOutcome.CRASHED), attempt(2, outcome))
    assert (attempts.failures, attempts.preemptions, attempts.retry_after) == (1, 1, None)


def test_preemptions_without_any_progress_back_off_in_the_end():
    attempts = after(*(attempt(number, AttemptOutcome.PREEMPTED, 0, 0) for number in range(1, 6)))
    assert attempts.failures == 0
    assert attempts.retry_after == NOW + timedelta(seconds=20)


def test_preemptions_with_progress_never_wait():
    attempts = after(*(attempt(n, AttemptOutcome.PREEMPTED, n, n + 1) for n in range(1, 9)))
    assert attempts.retry_after is None


def starts(ends: int, **attempt_fields) -> list[timedelta]:
    """How long after its predecessor's end each attempt starts."""
    attempts, pauses = Attempts(), []
    for number in range(1, ends + 1):
        attempts = budget.charged(attempts, attempt(number, AttemptOutcome.PREEMPTED, **attempt_fields), NOW)
        pauses.append((attempts.retry_after or NOW) - NOW)
    return pauses


@pytest.mark.parametrize(
    "found",
    [{"resumed": None, "checkpoint": 50}, {"resumed": 50, "checkpoint": 50}, {"resumed": None, "checkpoint": None}],
    ids=["a pod that said nothing", "a pod that said where it began", "no checkpoint at all"],
)
def test_one_old_checkpoint_does_not_defeat_the_back_off(found):
    seconds = [pause.total_seconds() for pause in starts(14, **found)]
    first = 4 if found == {"resumed": None, "checkpoint": 50} else 3  # the first one may have written it
    assert seconds[:first] == [0] * first
    assert seconds[first:][:7] == [10, 20, 40, 80, 160, 300, 300]
    assert seconds[-1] == 300


def test_only_the_newest_attempts_are_remembered_and_numbers_go_on():
    attempts = after(*(attempt(number, AttemptOutcome.PREEMPTED, number, number + 1) for number in range(1, 30)))
    assert len(attempts.history) == 10
    assert budget.ended(attempts, "train") == 29
