"""The retry budget: what an attempt's end costs, and when the next one starts.

A failure costs one; a new checkpoint clears what went before it. A preemption costs nothing and is followed at once,
unless preemptions come in a row without any progress: then they, too, back off, so that a pod that is evicted as soon
as it starts does not keep a whole cluster busy.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from finetune.api.status import MAX_ATTEMPTS, Attempt, AttemptOutcome, Attempts

FREE = (AttemptOutcome.PREEMPTED, AttemptOutcome.NODE_LOST, AttemptOutcome.SUSPENDED)
OPEN = (AttemptOutcome.RUNNING, AttemptOutcome.SUSPENDED)
NONE = Attempts()
_FIRST_SECONDS, _LONGEST_SECONDS = 10, 300
_FREE_IN_A_ROW = 3


def back_off(failures: int) -> timedelta:
    """10 s, 20 s, 40 s ... 5 min."""
    return timedelta(seconds=min(_LONGEST_SECONDS, _FIRST_SECONDS * 2 ** min(max(0, failures - 1), 16)))


def ended(attempts: Attempts, stage: str) -> int:
    """The highest number of an attempt of the stage whose end is recorded; 0 before the first."""
    numbers = [item.number for item in attempts.history or () if item.stage == stage and is_over(item)]
    return max(numbers, default=0)


def is_open(attempts: Attempts, stage: str, number: int) -> bool:
    """Whether the attempt is recorded as begun but not as ended."""
    return any(item.stage == stage and item.number == number and not is_over(item) for item in attempts.history or ())


def is_over(attempt: Attempt) -> bool:
    """Whether an attempt as recorded has ended; a suspended one may have, or may go on with its Job."""
    return attempt.outcome not in OPEN or attempt.end_time is not None


def suspended(attempts: Attempts) -> set[str | None]:
    """The UIDs of the Jobs that stand still because the spec said so."""
    items = attempts.history or ()
    return {item.job_uid for item in items if item.outcome == AttemptOutcome.SUSPENDED and item.job_uid}


def recorded(attempts: Attempts, attempt: Attempt) -> Attempts:
    """The attempts with that one added, or replaced by what is known now."""
    kept = [item for item in attempts.history or () if (item.stage, item.number) != (attempt.stage, attempt.number)]
    return attempts.model_copy(update={"history": [*kept, attempt][-MAX_ATTEMPTS:]})


def charged(attempts: Attempts, attempt: Attempt, now: datetime) -> Attempts:
    """The attempts after that one, not recorded as ended before, did so without success."""
    before = [item for item in attempts.history or () if item.stage == attempt.stage and item.number < attempt.number]
    advanced = _advanced(before, attempt)
    failures, preemptions = 0 if advanced else attempts.failures, attempts.preemptions
    retry_after: datetime | None = None
    if attempt.outcome == AttemptOutcome.SUSPENDED:
        pass  # the user's own wish: what comes next starts when the user says so
    elif attempt.outcome in FREE:
        preemptions += 1
        idle = 0 if advanced else 1 + _free_in_a_row(before)
        if idle > _FREE_IN_A_ROW:
            retry_after = now + back_off(idle - _FREE_IN_A_ROW)
    else:
        failures += 1
        retry_after = now + back_off(failures)
    update = {"failures": failures, "preemptions": preemptions, "retry_after": retry_after}
    return recorded(attempts, attempt).model_copy(update=update)


def _advanced(before: Iterable[Attempt], attempt: Attempt) -> bool:
    if attempt.checkpoint_step is None:
        return False
    known = [item.checkpoint_step for item in before if item.checkpoint_step is not None]
    start = attempt.resumed_from_step if attempt.resumed_from_step is not None else max(known, default=0)
    return attempt.checkpoint_step > start


def _free_in_a_row(before: list[Attempt]) -> int:
    count = 0
    for item in reversed(before):
        if item.outcome not in FREE or (item.checkpoint_step or 0) > (item.resumed_from_step or 0):
            break
        count += 1
    return count
