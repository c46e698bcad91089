"""The retry budget: what an attempt's end costs, and when the next one starts.

A failure costs one; a new checkpoint clears what went before it. A preemption costs nothing and is followed at once,
unless preemptions come in a row without any progress: then they, too, back off, so that a pod that is evicted as soon
as it starts does not keep a whole cluster busy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from finetune.api.reasons import Reason
from finetune.api.spec import Retry
from finetune.api.status import MAX_ATTEMPTS, Attempt, AttemptOutcome, Attempts

PREEMPTIONS = (AttemptOutcome.PREEMPTED, AttemptOutcome.NODE_LOST)
FREE = (*PREEMPTIONS, AttemptOutcome.SUSPENDED, AttemptOutcome.STOPPED, AttemptOutcome.NEVER_STARTED)
WITHDRAWN: Mapping[str, AttemptOutcome] = {
    Reason.SPEC_CHANGED: AttemptOutcome.STOPPED,
    Reason.START_DEADLINE_EXCEEDED: AttemptOutcome.NEVER_STARTED,
    Reason.HUNG: AttemptOutcome.CRASHED,
}
"""Why the operator ends an attempt, and what its end then is."""

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


def withdrawn(attempts: Attempts, stage: str, number: int) -> Attempt | None:
    """The attempt, if the operator has decided to end it and it has not ended yet: its reason then says why."""
    for item in attempts.history or ():
        if (item.stage, item.number) == (stage, number) and not is_over(item) and item.reason in WITHDRAWN:
            return item
    return None


def stopped(attempts: Attempts, reason: str, message: str, now: datetime) -> Attempts:
    """The attempts after all that were open have been ended by the operator."""
    update = {"outcome": AttemptOutcome.STOPPED, "reason": reason, "message": message[:1024], "end_time": now}
    history = [item if is_over(item) else item.model_copy(update=update) for item in attempts.history or ()]
    return attempts.model_copy(update={"history": history or None, "retry_after": None})


def renewed(attempts: Attempts, at: str) -> Attempts:
    """The attempts with a budget that begins anew, because somebody asked for that."""
    update = {"failures": 0, "preemptions": 0, "retry_after": None, "retried_at": at}
    return attempts.model_copy(update=update)


def too_often(attempts: Attempts, retry: Retry) -> bool:
    """Whether there were more preemptions than the spec allows."""
    return retry.preemption_limit is not None and attempts.preemptions > retry.preemption_limit


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
    if attempt.outcome == AttemptOutcome.NEVER_STARTED:
        retry_after = now + back_off(1 + _never_started_in_a_row(before))
    elif attempt.outcome in PREEMPTIONS:
        preemptions += 1
        idle = 0 if advanced else 1 + _free_in_a_row(before)
        if idle > _FREE_IN_A_ROW:
            retry_after = now + back_off(idle - _FREE_IN_A_ROW)
    elif attempt.outcome not in FREE:
        failures += 1
        retry_after = now + back_off(failures)
    update = {"failures": failures, "preemptions": preemptions, "retry_after": retry_after}
    return recorded(attempts, attempt).model_copy(update=update)


def _advanced(before: Sequence[Attempt], attempt: Attempt) -> bool:
    """Whether the attempt left a newer checkpoint than it found: where it does not say what it found, than any before
    it left."""
    if attempt.checkpoint_step is None:
        return False
    known = [item.checkpoint_step for item in before if item.checkpoint_step is not None]
    start = attempt.resumed_from_step if attempt.resumed_from_step is not None else max(known, default=0)
    return attempt.checkpoint_step > start


def _free_in_a_row(before: Sequence[Attempt]) -> int:
    """How many of the last attempts ended free of charge and without a newer checkpoint."""
    count = 0
    for place in reversed(range(len(before))):
        if before[place].outcome not in FREE or _advanced(before[:place], before[place]):
            break
        count += 1
    return count


def _never_started_in_a_row(before: Sequence[Attempt]) -> int:
    others = (count for count, item in enumerate(reversed(before)) if item.outcome != AttemptOutcome.NEVER_STARTED)
    return next(others, len(before))
