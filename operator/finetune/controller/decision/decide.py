"""The decision: from the whole state of one job to what shall be written. Pure; it reads like the flow itself.

    being deleted? nothing. finished? perhaps delete it. not runnable? say why.
    prepare -> train (attempt n) -> save -> complete

It is made anew at every visit, from what exists and never from what happened, so a crash between any two writes, a
missed event or a second visit changes nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from pydantic import ValidationError

from finetune.api import KIND
from finetune.api.conditions import ConditionStatus, ConditionType
from finetune.api.contract import CONDITIONS, Step
from finetune.api.implemented import not_implemented
from finetune.api.status import AttemptOutcome, FineTuneJobStatus, Phase, Progress
from finetune.controller.decision import budget
from finetune.controller.decision.draft import PHASES, Draft
from finetune.controller.decision.observed import Object, Observed, condition_of, moment, terminal
from finetune.controller.decision.stages import pod, prepare, save, train, waits, workspace
from finetune.controller.decision.stages.attempt import Outcome, State
from finetune.controller.decision.stages.stage import Stage

STAGES: tuple[Stage, ...] = (prepare, train, save)


@dataclass(frozen=True)
class Child:
    """A child Job, or the FineTuneJob itself, as a write names it: the UID keeps it from hitting a namesake."""

    kind: str
    name: str
    uid: str


@dataclass(frozen=True)
class Decision:
    """What to write, in this order; empty when all is as it should be."""

    status: FineTuneJobStatus | None = None
    progress: Progress | None = None
    suspend: tuple[tuple[Child, bool], ...] = ()
    create: tuple[dict[str, Any], ...] = ()
    delete: tuple[Child, ...] = ()
    again_at: datetime | None = None
    """When to look again although nothing happens."""


def decide(observed: Observed, now: datetime, settings: pod.PodSettings) -> Decision:
    """What to do about the job as it stands."""
    if observed.deleting or observed.lost_latch:
        return Decision()
    flow = _Flow(observed, now.replace(microsecond=0), settings)
    if observed.status.completion_time is not None:
        return flow.after_the_end()
    flow.go_on()
    return flow.decision()


@dataclass
class _Flow:
    """One decision in the making."""

    observed: Observed
    now: datetime
    settings: pod.PodSettings
    progress: Progress | None = None
    suspend: list[tuple[Child, bool]] = field(default_factory=list)
    create: list[dict[str, Any]] = field(default_factory=list)
    delete: list[Child] = field(default_factory=list)
    times: list[datetime] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.draft = Draft(self.observed.status, self.observed.generation, self.now)

    def go_on(self) -> None:
        """From wherever the job stands to the next thing to wait for."""
        if self._understood() and self._taken_up() and not self._past_deadline():
            for stage in STAGES:
                if not self._done(stage):
                    return
            self.draft.complete()
            self._progress_at_the_end()

    def after_the_end(self) -> Decision:
        """A finished job: stop what still runs of a failed one; delete the job when its time has come."""
        if self.observed.status.phase == Phase.FAILED:
            self._stop_children()
        expiry = self._expiry()
        if expiry is not None and expiry <= self.now:
            return Decision(delete=(Child(KIND, self.observed.name, self.observed.uid),))
        return Decision(delete=tuple(self.delete), again_at=expiry)

    def _expiry(self) -> datetime | None:
        """When a finished job is to be deleted."""
        ttl = self.observed.job["spec"].get("ttlSecondsAfterFinished")
        finished = self.draft.status.completion_time
        return None if ttl is None or finished is None else finished + timedelta(seconds=int(ttl))

    def _understood(self) -> bool:
        """Whether this operator can act on the spec. Of one that is older than the API, a job that has begun goes on as
        far as it is understood, and one that has not waits for the newer operator."""
        draft, begun = self.draft, self.observed.status.start_time is not None
        try:
            _ = self.observed.spec
        except ValidationError as error:
            if begun:
                draft.say(f"this operator cannot read the spec and leaves the job as it is; upgrade it: {error}")
            else:
                draft.fail("InvalidSpec", f"this operator cannot read the spec; apply the job anew: {error}")
            return False
        if self.observed.unknown_fields and not begun:
            draft.update(phase=Phase.PENDING)
            draft.say(f"{_not_known(self.observed)}: upgrade the operator, or apply the job without")
            return False
        return True

    def _taken_up(self) -> bool:
        """Take the job up, once; from then on the spec is frozen. False when it cannot run (yet)."""
        draft = self.draft
        if self.observed.status.start_time is not None:
            return True
        spec = self.observed.spec
        if missing := not_implemented(spec):
            draft.fail("NotImplemented", ". ".join(item.sentence() for item in missing))
            return False
        size = len(pod.step_job(self.observed, 1).encode())
        if size > pod.MAX_JOB_BYTES:
            draft.fail(
                "SpecTooLarge",
                f"the spec takes {size // 1024} KiB, and a pod can carry {pod.MAX_JOB_BYTES // 1024} KiB of it: "
                "move spec.tokens.add into a ConfigMap and name it in spec.tokens.addFrom",
            )
            return False
        if spec.suspend:
            draft.update(phase=Phase.SUSPENDED)
            draft.set(ConditionType.SUSPENDED, ConditionStatus.TRUE, "Suspended", "not started yet")
            return False
        digest = hashlib.sha256(spec.model_dump_json(by_alias=True, exclude_none=True).encode()).hexdigest()
        draft.update(phase=Phase.PENDING, start_time=self.now, spec_digest=f"sha256:{digest}")
        draft.set(ConditionType.SUSPENDED, ConditionStatus.FALSE, "NotSuspended")
        if not spec.tokens:
            draft.set(ConditionType.TOKENS_ADDED, ConditionStatus.TRUE, "NotNeeded", "the spec names no tokens")
        return True

    def _past_deadline(self) -> bool:
        seconds = self.observed.spec.active_deadline_seconds
        if seconds is None:
            return False
        assert self.draft.status.start_time is not None
        deadline = self.draft.status.start_time + timedelta(seconds=seconds)
        if deadline > self.now:
            self.times.append(deadline)
            return False
        self.draft.fail("DeadlineExceeded", f"the job ran longer than spec.activeDeadlineSeconds, {seconds} s")
        self._stop_children()
        return True

    def _done(self, stage: Stage) -> bool:
        """Bring one stage forward; True when nothing of it is left to do."""
        if all(self.draft.holds(CONDITIONS[step]) for step in stage.STEPS):
            return True
        children = self.observed.attempts(stage.STAGE)
        first = budget.ended(self.draft.attempts, stage.STAGE) + 1
        for number in sorted({first, *(number for number in children if number > first)}):
            pods = self.observed.pods_of(stage.STAGE, number)
            if number not in children and not pods and not budget.is_open(self.draft.attempts, stage.STAGE, number):
                continue
            outcome = stage.outcome(self.observed, children.get(number), number, pods)
            if not self._over(stage, number, children.get(number), outcome):
                return False
            if outcome.succeeded:
                return True
        if self.draft.status.completion_time is None:
            self._start(stage, budget.ended(self.draft.attempts, stage.STAGE) + 1)
        return False

    def _over(self, stage: Stage, number: int, child: Object | None, outcome: Outcome) -> bool:
        """Take in how an attempt goes; False while it may still run, or when its end is the job's end."""
        draft = self.draft
        for state in outcome.steps:
            draft.take_in(state, settled=outcome.over or state.step != stage.STEPS[-1])
        if stage is train:
            draft.update(attempts=draft.attempts.model_copy(update={"count": max(draft.attempts.count, number)}))
        if not outcome.over:
            self._still_runs(stage, child, outcome)
            return False
        self._progress_pauses()
        attempt = self._with_times(outcome)
        if outcome.succeeded:
            done = budget.recorded(draft.attempts, attempt)
            draft.update(attempts=done.model_copy(update={"failures": 0, "retry_after": None}))
            for step in stage.STEPS:
                if not draft.holds(CONDITIONS[step]):
                    draft.set(CONDITIONS[step], ConditionStatus.TRUE, "Succeeded")
            return True
        attempts = budget.charged(draft.attempts, attempt, self.now)
        draft.update(attempts=attempts)
        step = outcome.failed_step or next((s for s in stage.STEPS if not draft.holds(CONDITIONS[s])), stage.STEPS[-1])
        hint = outcome.error.hint if outcome.error else ""
        message = f"{step}: {attempt.message or 'no reason was given'}" + (f". {hint}" if hint else "")
        limit = self.observed.spec.retry.limit
        if attempt.outcome not in budget.FREE:
            draft.set(CONDITIONS[step], ConditionStatus.FALSE, attempt.reason or "Failed", message)
        if attempt.outcome == AttemptOutcome.USER_ERROR:
            draft.fail(attempt.reason or "UserError", message)
        elif attempt.outcome not in budget.FREE and attempts.failures > limit:
            tries = f"{attempts.failures} failures in a row without a new checkpoint, spec.retry.limit is {limit}"
            draft.fail(attempt.reason or "Failed", f"{message} ({tries})")
        return draft.status.completion_time is None

    def _still_runs(self, stage: Stage, child: Object | None, outcome: Outcome) -> None:
        """The attempt goes on: show where it is and what it waits for; suspend or resume it."""
        draft = self.draft
        step = outcome.running_step
        draft.update(phase=self._phase(outcome))
        draft.say(outcome.waits_for or workspace.waits_for(self.observed))
        for item in self.observed.pods_of(stage.STAGE, outcome.attempt.number):
            if not terminal(item) and (deadline := item["metadata"].get("deletionTimestamp")):
                draft.say(waits.lost(item, self.now) or "the pod was told to stop: it writes its checkpoint")
                self.times.append(moment(deadline) + timedelta(seconds=waits.LOST_AFTER_SECONDS))
        if step:
            self._progress_of(step)
        else:
            self._progress_pauses()
        suspended = self._suspended(child, outcome)
        if outcome.started:
            kind = AttemptOutcome.SUSPENDED if suspended else AttemptOutcome.RUNNING
            attempt = outcome.attempt.model_copy(update={"outcome": kind})
            draft.update(attempts=budget.recorded(draft.attempts, attempt))
        draft.update(attempts=draft.attempts.model_copy(update={"retry_after": None}))

    def _suspended(self, child: Object | None, outcome: Outcome) -> bool:
        """Make the child Job's suspension what the spec says; whether the job now stands still."""
        draft, wanted = self.draft, self.observed.spec.suspend
        if child is not None and "deletionTimestamp" not in child["metadata"]:
            is_suspended = bool(child["spec"].get("suspend"))
            if is_suspended != wanted:
                self.suspend.append((Child("Job", child["metadata"]["name"], child["metadata"]["uid"]), wanted))
        if not wanted:
            self._resumed()
            return False
        if outcome.live:
            draft.say("suspending: the pod writes its checkpoint and stops")
            return False
        self._stands_still()
        return True

    def _stands_still(self) -> None:
        self.draft.update(phase=Phase.SUSPENDED)
        self.draft.say("suspended; set spec.suspend to false to go on")
        self.draft.set(ConditionType.SUSPENDED, ConditionStatus.TRUE, "Suspended", "everything is kept")
        self._progress_pauses()

    def _resumed(self) -> None:
        if self.draft.holds(ConditionType.SUSPENDED):
            self.draft.set(ConditionType.SUSPENDED, ConditionStatus.FALSE, "Resumed")

    def _start(self, stage: Stage, number: int) -> None:
        """Start an attempt, unless something stands in its way."""
        draft = self.draft
        if self.observed.spec.suspend:
            self._stands_still()
            return
        self._resumed()
        draft.update(phase=Phase.PENDING)
        retry_after = draft.attempts.retry_after
        if retry_after is not None and retry_after > self.now:
            last = draft.attempts.history[-1] if draft.attempts.history else None
            said = f" ({last.reason}: {last.message})" if last and last.reason else ""
            draft.say(f"{stage.STAGE} attempt {number} starts at {retry_after:%H:%M:%S} UTC{said}")
            self.times.append(retry_after)
            return
        if obstacle := _in_the_way(self.observed):
            draft.say(obstacle)
            self.times.append(self.now + timedelta(seconds=15))
            return
        if self.observed.conflicts:  # they stand, also while it is tried again: no message that one write takes back
            draft.say(self.observed.conflicts[0])
            if self.observed.again_at is None or self.observed.again_at > self.now:
                self.times.extend([self.observed.again_at] if self.observed.again_at else [])
                return
        if self.observed.refused:
            draft.fail("InvalidSpec", self.observed.refused)
            return
        if not workspace.exists(self.observed):
            claim = workspace.manifest(self.observed)
            if claim and draft.holds(ConditionType.MODEL_DOWNLOADED):
                lost = f"somebody deleted the claim {claim['metadata']['name']}, and with it the job's work"
                draft.fail("WorkspaceLost", f"{lost}; delete the job and apply it again")
                return
            self.create.extend([claim] if claim else [])
        update: dict[str, Any] = {"retry_after": None}
        if stage is train:
            update["count"] = number
            if service := train.service(self.observed):
                self.create.append(service)
        self.create.append(stage.manifest(self.observed, self.settings, number))
        draft.update(attempts=draft.attempts.model_copy(update=update))

    def _phase(self, outcome: Outcome) -> Phase:
        ahead = next((state for state in outcome.steps if state.state != State.DONE), None)
        if ahead is None or ahead.state == State.FAILED:
            return self.draft.status.phase or Phase.PENDING
        begun = ahead.state == State.RUNNING or ahead is not outcome.steps[0]
        return PHASES[ahead.step] if begun else Phase.PENDING

    def _with_times(self, outcome: Outcome) -> Any:
        """The attempt that ended, with what only status remembers when its pod is gone."""
        attempt = outcome.attempt
        before = next(
            (
                item
                for item in self.draft.attempts.history or ()
                if (item.stage, item.number) == (attempt.stage, attempt.number)
            ),
            None,
        )
        update: dict[str, Any] = {"end_time": attempt.end_time or self.now}
        for name in ("pod", "node", "start_time", "resumed_from_step", "checkpoint_step"):
            if getattr(attempt, name) is None and before is not None:
                update[name] = getattr(before, name)
        live = self.observed.status.progress
        if attempt.stage == train.STAGE and attempt.checkpoint_step is None and live and live.step == Step.TRAIN:
            update["checkpoint_step"] = live.checkpoint_step
        return attempt.model_copy(update=update)

    def _progress_of(self, step: Step) -> None:
        """Another step runs than the one whose progress is shown: start anew, but keep the loss."""
        shown = self.observed.status.progress
        if shown is None or shown.step != step:
            self.progress = _kept(shown, step)

    def _progress_pauses(self) -> None:
        """Nothing runs: what is shown must not promise a time."""
        shown = self.observed.status.progress
        if shown and (shown.remaining or shown.estimated_completion_time):
            self.progress = shown.model_copy(update={"remaining": "", "estimated_completion_time": None})

    def _progress_at_the_end(self) -> None:
        shown = self.observed.status.progress
        self.progress = _kept(shown, Step.SAVE).model_copy(update={"percent": 100, "summary": "100%"})

    def _stop_children(self) -> None:
        for child in self.observed.owned(self.observed.jobs):
            ended = any(condition_of(child, kind) for kind in ("Complete", "Failed", "FailureTarget"))
            if not ended and "deletionTimestamp" not in child["metadata"]:
                self.delete.append(Child("Job", child["metadata"]["name"], child["metadata"]["uid"]))

    def decision(self) -> Decision:
        if self.observed.unknown_fields and not self.draft.status.message:
            self.draft.say(f"{_not_known(self.observed)}, and goes on without")
        status = self.draft.status
        if expiry := self._expiry():  # nothing else need happen to a finished job before that
            self.times = [expiry]
        return Decision(
            status=status if document(status) != document(self.observed.status) else None,
            progress=self.progress if self.progress != self.observed.status.progress else None,
            suspend=tuple(self.suspend),
            create=tuple(self.create),
            delete=tuple(self.delete),
            again_at=min(self.times, default=None),
        )


def document(status: FineTuneJobStatus) -> dict[str, Any]:
    """The controller's part of the status, as it is written: everything but the live progress."""
    return {key: value for key, value in status.wire().items() if key != "progress"}


def _not_known(observed: Observed) -> str:
    return f"this operator does not know {', '.join(observed.unknown_fields)}"


def _in_the_way(observed: Observed) -> str:
    """What must be gone before anything may start, as a sentence: remains of a former job, foreign objects."""
    for kind, items in (
        ("pod", tuple(item for item in observed.former(observed.pods) if not terminal(item))),
        ("volume claim", observed.former(observed.claims)),
        ("Job", observed.former(observed.jobs)),
    ):
        if items:
            return f"waiting for {kind} {items[0]['metadata']['name']} of the former job of this name to be gone"
    for claim in observed.owned(observed.claims):
        if "deletionTimestamp" in claim["metadata"]:
            return f"waiting for volume claim {claim['metadata']['name']}, which is being deleted, to be gone"
    return ""


def _kept(shown: Progress | None, step: Step) -> Progress:
    if shown is None:
        return Progress(step=step, summary="0%")
    return Progress(
        step=step,
        summary="0%",
        loss=shown.loss,
        validation_loss=shown.validation_loss,
        checkpoint_step=shown.checkpoint_step,
    )
