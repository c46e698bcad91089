"""Conditions: the one door through which their status changes.

Ready, Reconciling and Stalled, which tools that know nothing of fine-tuning read (kstatus: Argo CD, Flux, Helm), say
what the others come to. Only here are they derived, and transition times and observed generations set, so that a
condition's time always means "since when has this been so".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import datetime

from pydantic import Field

from finetune.api.reasons import Reason
from finetune.api.schema import OpenEnum, StatusModel

MAX_REASON = 128
MAX_MESSAGE = 4096
"""Characters of a condition's message; longer ones keep their beginning and end."""


class ConditionType(OpenEnum):
    MODEL_DOWNLOADED = "ModelDownloaded"
    TOKENS_ADDED = "TokensAdded"
    MODEL_RELOADED = "ModelReloaded"
    DATASET_LOADED = "DatasetLoaded"
    TRAINED = "Trained"
    SAVED = "Saved"
    COMPLETE = "Complete"
    FAILURE_TARGET = "FailureTarget"
    """That the job will fail, once its pods have stopped, and why: as batch/v1 Jobs have it."""

    FAILED = "Failed"
    SUSPENDED = "Suspended"
    READY = "Ready"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"


SUMMARIES = (ConditionType.READY, ConditionType.RECONCILING, ConditionType.STALLED)
"""What follows from the others."""


MEANINGS: Mapping[ConditionType, str] = {
    ConditionType.MODEL_DOWNLOADED: "the base model is in the workspace",
    ConditionType.TOKENS_ADDED: "the tokens are in tokenizer and embeddings, or the spec names none",
    ConditionType.MODEL_RELOADED: "the extended model was loaded and keeps every old byte",
    ConditionType.DATASET_LOADED: "the rows are token ids and labels",
    ConditionType.TRAINED: "training is done",
    ConditionType.SAVED: "the result lies where the spec says",
    ConditionType.COMPLETE: "all of that is so",
    ConditionType.FAILURE_TARGET: "the job is to fail; pods of it may still run",
    ConditionType.FAILED: "the job failed, and nothing of it runs",
    ConditionType.SUSPENDED: "the job is suspended, and nothing of it runs",
    ConditionType.READY: "the job is complete",
    ConditionType.RECONCILING: "the job is on its way",
    ConditionType.STALLED: "the job failed: nothing goes on unless somebody does something",
}


class ConditionStatus(OpenEnum):
    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class Condition(StatusModel):
    """One observation of the job, as every Kubernetes tool reads it (`kubectl wait --for=condition=Complete`)."""

    type: ConditionType = Field(description="What is observed.")
    status: ConditionStatus = Field(description="Whether it holds.")
    reason: str = Field(
        description="Why, in one word.",
        min_length=1,
        max_length=MAX_REASON,
        pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$",
    )
    message: str = Field("", description="Why and what to do, in sentences.", max_length=MAX_MESSAGE)
    last_transition_time: datetime = Field(description="Since when the status is what it is.")
    observed_generation: int | None = Field(None, description="The generation of the spec that this is about.", ge=0)


def initial(now: datetime, generation: int) -> tuple[Condition, ...]:
    """All conditions as they stand at the first visit: nothing is known yet."""
    return tuple(
        Condition(
            type=kind,
            status=ConditionStatus.UNKNOWN,
            reason=Reason.PENDING,
            last_transition_time=now,
            observed_generation=generation,
        )
        for kind in ConditionType
    )


def with_condition(
    conditions: Iterable[Condition],
    kind: ConditionType,
    status: ConditionStatus,
    reason: str,
    message: str = "",
    *,
    now: datetime,
    generation: int,
) -> tuple[Condition, ...]:
    """The conditions with one of them set; its transition time moves only with its status."""
    kept = []
    since = now
    for condition in conditions:
        if condition.type != kind:
            kept.append(condition)
        elif condition.status == status:
            since = condition.last_transition_time
    changed = Condition(
        type=kind,
        status=status,
        reason=word(reason) or "Unknown",
        message=shortened(message, MAX_MESSAGE),
        last_transition_time=since,
        observed_generation=generation,
    )
    order = {kind: place for place, kind in enumerate(ConditionType)}  # those of a newer operator come last
    return tuple(sorted([*kept, changed], key=lambda condition: order.get(condition.type, len(order))))


def summarised(conditions: Iterable[Condition], *, now: datetime, generation: int) -> tuple[Condition, ...]:
    """The conditions with Ready, Reconciling and Stalled as they follow from the others, all of them about the spec of
    that generation."""
    conditions = tuple(conditions)
    failed = find(conditions, ConditionType.FAILED)
    reason, message = Reason.IN_PROGRESS.value, ""
    if is_true(conditions, ConditionType.COMPLETE):
        reason = Reason.SUCCEEDED
    elif failed is not None and failed.status == ConditionStatus.TRUE:
        reason, message = failed.reason, failed.message
    elif is_true(conditions, ConditionType.FAILURE_TARGET):
        reason = Reason.STOPPING
    elif is_true(conditions, ConditionType.SUSPENDED):
        reason = Reason.SUSPENDED
    holds = {
        ConditionType.READY: reason == Reason.SUCCEEDED,
        ConditionType.RECONCILING: reason in (Reason.IN_PROGRESS, Reason.STOPPING),
        ConditionType.STALLED: is_true(conditions, ConditionType.FAILED),
    }
    for kind, held in holds.items():
        status = ConditionStatus.TRUE if held else ConditionStatus.FALSE
        said = message if kind == ConditionType.STALLED else ""
        conditions = with_condition(conditions, kind, status, reason, said, now=now, generation=generation)
    return tuple(item.model_copy(update={"observed_generation": generation}) for item in conditions)


def find(conditions: Iterable[Condition], kind: ConditionType) -> Condition | None:
    """The condition of that type, if it was ever set."""
    return next((condition for condition in conditions if condition.type == kind), None)


def is_true(conditions: Iterable[Condition], kind: ConditionType) -> bool:
    """Whether the condition of that type holds."""
    condition = find(conditions, kind)
    return condition is not None and condition.status == ConditionStatus.TRUE


def word(text: str) -> str:
    """Whatever somebody gave as a reason, as a condition takes it: letters and digits, a letter first; empty where
    nothing of it is left."""
    kept = re.sub(r"[^A-Za-z0-9]", "", text)
    return (kept if not kept[:1].isdigit() else f"Code{kept}")[:MAX_REASON]


def shortened(text: str, limit: int) -> str:
    """The text within `limit` characters: what is cut is cut from the middle, where the least is said."""
    if len(text) <= limit:
        return text
    head = (limit - 5) * 2 // 3
    return f"{text[:head]} ... {text[len(text) - (limit - 5 - head) :]}"
