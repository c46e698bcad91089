"""Events: what changed between two statuses, for `kubectl describe`. Only transitions, each with a name of its own.

The name is made of what happened, so telling it twice (after a crash, from two visits) meets itself as a 409.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any, NamedTuple

from finetune.api import API_VERSION, KIND
from finetune.api.conditions import ConditionStatus, ConditionType
from finetune.api.reasons import Reason
from finetune.api.status import AttemptOutcome, FineTuneJobStatus
from finetune.controller.decision import budget
from finetune.controller.decision.observed import Observed

_TEXTS = {
    ConditionType.MODEL_DOWNLOADED: "the base model is downloaded",
    ConditionType.TOKENS_ADDED: "the tokens are added to tokenizer and embeddings",
    ConditionType.MODEL_RELOADED: "the extended model reloads and keeps its promises",
    ConditionType.DATASET_LOADED: "the dataset is turned into token ids",
    ConditionType.TRAINED: "training is done",
    ConditionType.SAVED: "the result is saved",
    ConditionType.COMPLETE: "the job is complete",
    ConditionType.FAILED: "the job failed",
    ConditionType.SUSPENDED: "the job is suspended",
}

_QUIET = (Reason.NOT_NEEDED,)


class Transition(NamedTuple):
    """Something that a person may want to know happened."""

    type: str
    reason: str
    message: str
    identity: str


def transitions(before: FineTuneJobStatus, after: FineTuneJobStatus) -> Iterator[Transition]:
    """What happened between two statuses."""
    known = {condition.type: condition.status for condition in before.conditions or ()}
    for condition in after.conditions or ():
        if condition.status != ConditionStatus.TRUE or known.get(condition.type) == condition.status:
            continue
        if condition.type not in _TEXTS or condition.reason in _QUIET:
            continue
        failed = condition.type == ConditionType.FAILED
        message = condition.message or _TEXTS[condition.type]
        when = condition.last_transition_time.isoformat()
        yield Transition(
            "Warning" if failed else "Normal", condition.reason if failed else condition.type, message, when
        )
    retried = after.attempts.retried_at if after.attempts else None
    if retried and known.get(ConditionType.FAILED) == ConditionStatus.TRUE and after.completion_time is None:
        yield Transition("Normal", Reason.RETRYING, "the job goes on where it failed", retried)
    yield from _attempts(before, after)
    if after.message != before.message and after.message and _TELLING.match(after.message):
        yield Transition("Warning", "Waiting", after.message, "")


def _attempts(before: FineTuneJobStatus, after: FineTuneJobStatus) -> Iterator[Transition]:
    """Which attempts started and ended."""
    known = {(item.stage, item.number): item for item in (before.attempts or budget.NONE).history or ()}
    for item in (after.attempts or budget.NONE).history or ():
        former = known.get((item.stage, item.number))
        name, identity = f"{item.stage} attempt {item.number}", f"{item.stage}-{item.number}"
        if former is None and not budget.is_over(item):
            where = f" on node {item.node}" if item.node else ""
            yield Transition("Normal", "AttemptStarted", f"{name} started{where}", identity)
        if budget.is_over(item) and (former is None or not budget.is_over(former)):
            if item.outcome == AttemptOutcome.SUCCEEDED:
                yield Transition("Normal", "AttemptSucceeded", f"{name} succeeded", identity)
            else:
                yield Transition("Warning", item.outcome, f"{name}: {item.reason}: {item.message}", identity)


_TELLING = re.compile(
    r"(pod \d+ of \d+: )?((the (\S+ ){1,2}|a pod \([^)]*\) )cannot be created: |"
    r"the workspace volume is not provisioned|waits for the claim|held by|NodeLost: |this operator does not know)"
)
"""How messages begin that somebody may have to act on. Others may quote them: the end of the attempt before."""


def event(observed: Observed, transition: Transition, now: datetime, instance: str) -> dict[str, Any]:
    """The Event that tells of a transition."""
    about = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": observed.name,
        "namespace": observed.namespace,
        "uid": observed.uid,
    }
    told = "\0".join((observed.uid, *transition))
    return event_about(about, told, transition.type, transition.reason, transition.message, now, instance)


def event_about(
    about: dict[str, str], told: str, kind: str, reason: str, message: str, now: datetime, instance: str
) -> dict[str, Any]:
    """An Event about an object, beside it; the same text in `told` gives it the same name."""
    time = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{about['name']}.{hashlib.sha256(told.encode()).hexdigest()[:16]}",
            "namespace": about["namespace"],
        },
        "involvedObject": about,
        "type": kind,
        "reason": reason,
        "message": message[:1024],
        "source": {"component": "finetune-operator", "host": instance},
        "reportingComponent": "finetune-operator",
        "reportingInstance": instance,
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
    }
