"""The decision: from the whole state of one job to what shall be written. Pure; it reads like the flow itself.

    being deleted? nothing. finished? perhaps delete it, or try again. not runnable? say why.
    prepare -> train (attempt n) -> save -> complete

It is made anew at every visit, from what exists and never from what happened, so a crash between any two writes, a
missed event or a second visit changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from pydantic import ValidationError

from finetune.api import KIND
from finetune.api.conditions import ConditionStatus, ConditionType, find, shortened
from finetune.api.contract import CONDITIONS, JOB_UID_LABEL, OPERATOR_LABEL, SPEC_LABEL, Step
from finetune.api.implemented import not_implemented
from finetune.api.reasons import Reason
from finetune.api.spec import NodeLostPolicy
from finetune.api.status import Attempt, AttemptOutcome, FineTuneJobStatus, Phase, Progress
from finetune.controller.decision import budget, deadlines
from finetune.controller.decision.draft import PHASES, Draft
from finetune.controller.decision.observed import (
    Object,
    Observed,
    condition_of,
    finished,
    moment,
    suspended_here,
    terminal,
)
from finetune.controller.decision.stages import foreign, pod, prepare, save, train, waits, workspace
from finetune.controller.decision.stages.attempt import Outcome, State
from finetune.controller.decision.stages.stage import Stage

_LATE = timedelta(seconds=15)
"""So much later than its Job's end a pod's may be seen, before it counts as gone."""

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
    keep: tuple[tuple[Child, dict[str, Any]], ...] = ()
    """Changes of claims' metadata, for the time after the job. They come before the status: as soon as that says that
    the job failed, somebody may delete it."""

    suspend: tuple[tuple[Child, bool], ...] = ()
    create: tuple[dict[str, Any], ...] = ()
    delete: tuple[Child, ...] = ()
    force: tuple[Child, ...] = ()
    """Pods of machines that are certainly off: to be said to have failed, and removed without waiting for anybody."""

    again_at: datetime | None = None
    """When to look again although nothing happens; never in the past, which would be a visit after the other."""


def decide(observed: Observed, now: datetime, settings: pod.PodSettings) -> Decision:
    """What to do about the job as it stands."""
    if observed.deleting or observed.lost_latch:
        return Decision()
    flow = _Flow(observed, now.replace(microsecond=0), settings)
    flow.heed_retry()
    if flow.draft.status.completion_time is not None:
        decision = flow.after_the_end()
    else:
        flow.go_on()
        decision = flow.decision()
    assert decision.again_at is None or decision.again_at > now, f"{decision.again_at} is past at {now}"
    return decision


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
    force: list[Child] = field(default_factory=list)
    times: list[datetime] = field(default_factory=list)
    """When something changes by itself; what is past already has changed."""

    def __post_init__(self) -> None:
        self.draft = Draft(self.observed.status, self.observed.generation, self.now)

    def go_on(self) -> None:
        """From wherever the job stands to the next thing to wait for."""
        if self.draft.holds(ConditionType.FAILURE_TARGET):
            if self._held_here():
                self._stop()
        elif self._understood() and self._taken_up() and self._held_here() and not self._past_deadline():
            self._go_through_stages()
            if (deadline := deadlines.active(self.observed.spec, self.draft.status)) is not None:
                self.times.append(deadline)

    def _go_through_stages(self) -> None:
        for stage in STAGES:
            if not self._done(stage):
                return
        self.draft.complete()
        self._progress_at_the_end()

    def heed_retry(self) -> None:
        """Take up what spec.retry.at asks for: a budget that begins anew, and a failed job goes on."""
        at = (self.observed.job["spec"].get("retry") or {}).get("at")
        if (
            self._stops_first()
            or at is None
            or at == self.draft.attempts.retried_at
            or self.draft.holds(ConditionType.COMPLETE)
        ):
            return
        self.draft.update(attempts=budget.renewed(self.draft.attempts, at), active_seconds=None)
        if self.draft.holds(ConditionType.FAILED):
            self.draft.retry()

    def _stops_first(self) -> bool:
        """Whether the job is to fail, and has not yet: a retry is for afterwards."""
        return self.draft.holds(ConditionType.FAILURE_TARGET) and not self.draft.holds(ConditionType.FAILED)

    def after_the_end(self) -> Decision:
        """A finished job: stop what still runs of a failed one; delete the job when its time has come."""
        self.draft.say(self.observed.status.message or "")
        if self.draft.holds(ConditionType.FAILED):
            self._stop_children()
        expiry = self._expiry()
        if expiry is not None and expiry <= self.now:
            keep = self._retention()
            return Decision(keep=keep, delete=(Child(KIND, self.observed.name, self.observed.uid),))
        return self.decision()

    def _retention(self) -> tuple[tuple[Child, dict[str, Any]], ...]:
        failed = any(map(self.draft.holds, (ConditionType.FAILURE_TARGET, ConditionType.FAILED)))
        claim, change = workspace.claim_of(self.observed), workspace.retention(self.observed, failed=failed)
        if claim is None or change is None:
            return ()
        return ((Child(claim["kind"], claim["metadata"]["name"], claim["metadata"]["uid"]), change),)

    def _expiry(self) -> datetime | None:
        """When a finished job is to be deleted."""
        failed = self.draft.holds(ConditionType.FAILED)
        ttl = self.observed.job["spec"].get("ttlSecondsAfterFailed" if failed else "ttlSecondsAfterFinished")
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
                draft.fail(Reason.INVALID_SPEC, f"this operator cannot read the spec; apply the job anew: {error}")
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
            draft.fail(Reason.NOT_IMPLEMENTED, ". ".join(item.sentence() for item in missing))
            return False
        size = len(pod.step_job(self.observed, 1).encode())
        if size > pod.MAX_JOB_BYTES:
            draft.fail(
                Reason.SPEC_TOO_LARGE,
                f"the spec takes {size // 1024} KiB, and a pod can carry {pod.MAX_JOB_BYTES // 1024} KiB of it: "
                "move spec.tokens.add into a ConfigMap and name it in spec.tokens.addFrom",
            )
            return False
        if spec.suspend:
            draft.update(phase=Phase.SUSPENDED)
            draft.set(ConditionType.SUSPENDED, ConditionStatus.TRUE, Reason.SUSPENDED, "not started yet")
            return False
        digest = hashlib.sha256(spec.model_dump_json(by_alias=True, exclude_none=True).encode()).hexdigest()
        draft.update(
            phase=Phase.PENDING,
            start_time=self.now,
            spec_digest=f"sha256:{digest}",
            operator=self.observed.operator,
        )
        draft.set(ConditionType.SUSPENDED, ConditionStatus.FALSE, Reason.NOT_SUSPENDED)
        if not spec.tokens:
            draft.set(ConditionType.TOKENS_ADDED, ConditionStatus.TRUE, Reason.NOT_NEEDED, "the spec names no tokens")
        return True

    def _held_here(self) -> bool:
        """Whether it is this operator that took the job up. The children of another one's are not even seen here."""
        draft, label = self.draft, self.observed.operator
        if draft.status.operator is None:
            draft.update(operator=label)
        holder = draft.status.operator or ""
        if holder == label:
            return True
        whose = f"the operator {holder}" if holder else "the operator without a name"
        back = f"{OPERATOR_LABEL}={holder} --overwrite" if holder else f"{OPERATOR_LABEL}-"
        draft.say(
            f"held by {whose}, which took the job up and alone goes on with it; put its label back: "
            f"kubectl label finetunejob {self.observed.name} {back}"
        )
        return False

    def _past_deadline(self) -> bool:
        deadline = deadlines.active(self.observed.spec, self.draft.status)
        if deadline is None or deadline > self.now:
            return False
        seconds = self.observed.spec.active_deadline_seconds
        self._fail(Reason.DEADLINE_EXCEEDED, f"the job ran longer than spec.activeDeadlineSeconds, {seconds} s")
        return True

    def _fail(self, reason: str, message: str) -> None:
        """The job fails: now, or when what still runs of it has stopped."""
        self.draft.doom(reason, message)
        self._stop()

    def _stop(self) -> None:
        """Stop everything; when nothing runs any more, the job has failed."""
        self._stop_children()
        target = find(self.draft.status.conditions or (), ConditionType.FAILURE_TARGET)
        assert target is not None
        live = [
            item for item in self.observed.running if item["metadata"]["labels"].get(JOB_UID_LABEL) == self.observed.uid
        ]
        if live or self.delete or any(map(_going, self._children())):
            self.draft.say(f"stopping, because {target.message}")
            self._progress_pauses()
            self._await_end(live)
        else:
            self.draft.fail(target.reason, target.message)
            self.heed_retry()
            if not self.draft.holds(ConditionType.FAILED):
                self.go_on()

    def _await_end(self, pods: Iterable[Object]) -> None:
        """Say what pods that were told to stop do, and look again when one should have stopped."""
        for item in pods:
            if not terminal(item) and "deletionTimestamp" in item["metadata"]:
                self._stops(item)

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
        over = outcome.over and not self._pods_may_come(outcome)
        for state in outcome.steps:
            draft.take_in(state, settled=over or state.step != stage.STEPS[-1])
        if stage is train:
            draft.update(attempts=draft.attempts.model_copy(update={"count": max(draft.attempts.count, number)}))
        if not over:
            if withdrawn := budget.withdrawn(draft.attempts, stage.STAGE, number):
                self._is_withdrawn(child, withdrawn)
            else:
                self._still_runs(stage, child, outcome)
            return False
        self._progress_pauses()
        draft.runs(False, training=stage is train)
        attempt = self._with_times(outcome)
        if outcome.succeeded:
            done = budget.recorded(draft.attempts, attempt)
            draft.update(attempts=done.model_copy(update={"failures": 0, "retry_after": None}))
            for step in stage.STEPS:
                if not draft.holds(CONDITIONS[step]):
                    draft.set(CONDITIONS[step], ConditionStatus.TRUE, Reason.SUCCEEDED)
            if stage is train:
                draft.reckon_goodput()
            return True
        attempts = budget.charged(draft.attempts, attempt, self.now)
        draft.update(attempts=attempts)
        step = outcome.failed_step or next((s for s in stage.STEPS if not draft.holds(CONDITIONS[s])), stage.STEPS[-1])
        hint = outcome.error.hint if outcome.error else ""
        message = f"{step}: {attempt.message or 'no reason was given'}" + (f". {hint}" if hint else "")
        limit = self.observed.spec.retry.limit
        if not draft.holds(CONDITIONS[step]):  # what is done stays so, also where doing it again has failed
            draft.set(CONDITIONS[step], ConditionStatus.FALSE, attempt.reason or Reason.FAILED, message)
        if attempt.outcome == AttemptOutcome.USER_ERROR:
            self._fail(attempt.reason or Reason.USER_ERROR, message)
        elif attempt.outcome in budget.PREEMPTIONS and budget.too_often(attempts, self.observed.spec.retry):
            often = f"preempted {attempts.preemptions} times, spec.retry.preemptionLimit is"
            said = f"{often} {self.observed.spec.retry.preemption_limit} (the last time: {message})"
            self._fail(Reason.PREEMPTION_LIMIT_EXCEEDED, said)
        elif attempt.outcome not in budget.FREE and attempts.failures > limit:
            tries = f"{attempts.failures} failures in a row without a new checkpoint, spec.retry.limit is {limit}"
            self._fail(attempt.reason or Reason.FAILED, f"{message} ({tries})")
        return not draft.holds(ConditionType.FAILURE_TARGET)

    def _pods_may_come(self, outcome: Outcome) -> bool:
        """Whether the pods that explain the end of an attempt may only be late: Jobs and pods are watched apart."""
        if outcome.unseen_since is None:
            return False
        until = outcome.unseen_since + _LATE
        self.times.append(until)
        return self.now < until

    def _still_runs(self, stage: Stage, child: Object | None, outcome: Outcome) -> None:
        """The attempt goes on: show where it is and what it waits for; suspend or resume it."""
        draft = self.draft
        step = outcome.running_step
        if child is not None and self._mended(child, outcome):
            self._withdraw(child, outcome, *_MENDED)
            return
        pods = self.observed.pods_of(stage.STAGE, outcome.attempt.number)
        draft.runs(any(map(deadlines.runs, pods)), training=stage is train)
        for limit in deadlines.of_attempt(self.observed, stage, child, pods, outcome.waits_for):
            self.times.append(limit.time)
            if limit.time <= self.now:
                self._withdraw(child, outcome, limit.reason, limit.message)
                return
        self._show_where(stage, outcome)
        self._await_end(self.observed.pods_of(stage.STAGE, outcome.attempt.number))
        if step:
            self._progress_of(step)
        else:
            self._progress_pauses()
        if strangers := foreign.holding_up(outcome, self.observed.pods_of(stage.STAGE, outcome.attempt.number)):
            self._next_step(stage, Reason.SIDECAR_RUNS)
            draft.say(strangers)
        suspended = self._suspended(stage, child, outcome)
        if outcome.started:
            kind = AttemptOutcome.SUSPENDED if suspended else AttemptOutcome.RUNNING
            open_ = {"outcome": kind, "reason": "", "message": "", "exit_code": None, "end_time": None}
            attempt = outcome.attempt.model_copy(update=open_)
            draft.update(attempts=budget.recorded(draft.attempts, attempt))
        draft.update(attempts=draft.attempts.model_copy(update={"retry_after": None}))

    def _withdraw(self, child: Object | None, outcome: Outcome, reason: str, message: str) -> None:
        """End an attempt, and go on when its pods are gone. The reason goes into the open attempt, so that it is known
        when the Job is not there any more."""
        attempt = outcome.attempt.model_copy(update={"reason": reason, "message": shortened(message, 1024)})
        self.draft.update(attempts=budget.recorded(self.draft.attempts, attempt))
        self._is_withdrawn(child, attempt)

    def _is_withdrawn(self, child: Object | None, attempt: Attempt) -> None:
        """Have a withdrawn attempt end."""
        self.draft.say(attempt.message)
        if child is not None and "deletionTimestamp" not in child["metadata"] and not finished(child):
            self.delete.append(_named(child))
        self._progress_pauses()
        self._await_end(self.observed.pods_of(attempt.stage, attempt.number))

    def _stops(self, item: Object) -> None:
        """A pod was told to stop: say so, and what to do when its machine never confirms it."""
        lost_at = moment(item["metadata"]["deletionTimestamp"]) + waits.LOST_AFTER
        self.times.append(lost_at)
        if self.now < lost_at:
            self.draft.say("the pod was told to stop: it writes its checkpoint")
            return
        said = waits.lost(item)
        training = self.observed.job["spec"].get("training") or {}  # also of a spec that cannot be read pods stop
        if training.get("onNodeLost") == NodeLostPolicy.FORCE_DELETE:
            force_at = moment(item["metadata"]["deletionTimestamp"]) + waits.FORCED_AFTER
            if not self.settings.force_delete:
                said += f". {waits.NOT_ALLOWED}"
            elif not waits.unreachable(item):
                said += ". Kubernetes does not count the machine as unreachable, so the pod is not removed by force"
            elif self.now < force_at:
                said += f". It is removed by force at {force_at:%H:%M:%S} UTC"
                self.times.append(force_at)
            else:
                said = f"pod {item['metadata']['name']} of the lost node {waits.node_of(item)} is removed by force"
                self.force.append(_named(item))
        self.draft.say(said)

    def _suspended(self, stage: Stage, child: Object | None, outcome: Outcome) -> bool:
        """Make the child Job's suspension what the spec says; whether it now stands still by our doing.

        Only what was suspended here is resumed here, and nothing is done twice against somebody else's will: a Job
        that a queue holds stays held, and one that a queue resumes although the spec says suspend is deleted.
        """
        draft, wanted = self.draft, self.observed.spec.suspend
        held = False
        if child is not None and "deletionTimestamp" not in child["metadata"] and not finished(child):
            stands = bool(child["spec"].get("suspend"))
            here = suspended_here(child) or outcome.attempt.job_uid in budget.suspended(draft.attempts)
            if wanted and not stands and here:
                self.delete.append(_named(child))
            elif stands != wanted and (wanted or here):
                self.suspend.append((_named(child), wanted))
            held = stands and not here
        if not wanted:
            self._resumed()
            if held:
                draft.say(waits.held(child or {}))
                self._progress_pauses()
            return False
        if outcome.live:
            draft.say("suspending: the pod writes its checkpoint and stops")
            return False
        self._stands_still(stage)
        return not held

    def _mended(self, child: Object, outcome: Outcome) -> bool:
        """Whether a suspended child that is to go on was made from a spec that has changed since."""
        made_from = (child["metadata"].get("labels") or {}).get(SPEC_LABEL)
        resumes = bool(child["spec"].get("suspend")) and not self.observed.spec.suspend and not outcome.live
        return resumes and made_from is not None and made_from != pod.spec_digest(self.observed.spec)

    def _stands_still(self, stage: Stage) -> None:
        self._next_step(stage, Reason.SUSPENDED)
        self.draft.update(phase=Phase.SUSPENDED)
        self.draft.say("suspended; set spec.suspend to false to go on")
        self.draft.set(ConditionType.SUSPENDED, ConditionStatus.TRUE, Reason.SUSPENDED, "everything is kept")
        self._progress_pauses()

    def _resumed(self) -> None:
        if self.draft.holds(ConditionType.SUSPENDED):
            self.draft.set(ConditionType.SUSPENDED, ConditionStatus.FALSE, Reason.RESUMED)

    def _start(self, stage: Stage, number: int) -> None:
        """Start an attempt, unless something stands in its way."""
        draft = self.draft
        if self.observed.spec.suspend:
            self._stands_still(stage)
            return
        self._resumed()
        draft.idles()
        retry_after = draft.attempts.retry_after
        if retry_after is not None and retry_after > self.now:
            last = draft.attempts.history[-1] if draft.attempts.history else None
            said = f" ({last.reason}: {last.message})" if last and last.reason else ""
            draft.say(f"{stage.STAGE} attempt {number} starts at {retry_after:%H:%M:%S} UTC{said}")
            self.times.append(retry_after)
            return
        if obstacle := _in_the_way(self.observed, self.now):
            draft.say(obstacle)
            self.times.append(self.now + timedelta(seconds=15))
            return
        if self.observed.conflicts:  # they stand, also while it is tried again: no message that one write takes back
            draft.say(self.observed.conflicts[0])
            if self.observed.again_at is None or self.observed.again_at > self.now:
                self.times.extend([self.observed.again_at] if self.observed.again_at else [])
                return
        if self.observed.refused:
            self._fail(Reason.INVALID_SPEC, self.observed.refused)
            return
        if not workspace.exists(self.observed):
            claim = workspace.manifest(self.observed)
            if claim and draft.holds(ConditionType.MODEL_DOWNLOADED):
                lost = f"somebody deleted the claim {claim['metadata']['name']}, and with it the job's work"
                self._fail(Reason.WORKSPACE_LOST, f"{lost}; delete the job and apply it again")
                return
            self.create.extend([claim] if claim else [])
        update: dict[str, Any] = {"retry_after": None}
        if stage is train:
            update["count"] = number
            if service := train.service(self.observed):
                self.create.append(service)
        self.create.append(stage.manifest(self.observed, self.settings, number))
        self._next_step(stage, Reason.WAITING)
        draft.update(attempts=draft.attempts.model_copy(update=update))

    def _next_step(self, stage: Stage, reason: Reason) -> None:
        """Why the step that is next does not run."""
        step = next((step for step in stage.STEPS if not self.draft.holds(CONDITIONS[step])), None)
        if step is not None:
            self.draft.set(CONDITIONS[step], ConditionStatus.FALSE, reason)

    def _show_where(self, stage: Stage, outcome: Outcome) -> None:
        """The phase by the step that runs, and what the attempt waits for."""
        self.draft.say(outcome.waits_for or workspace.waits_for(self.observed))
        ahead = next((state for state in outcome.steps if state.state != State.DONE), None)
        if ahead is None or ahead.state == State.FAILED:
            return
        if ahead.state == State.RUNNING or ahead is not outcome.steps[0]:
            self.draft.update(phase=PHASES[ahead.step])
        else:
            self.draft.idles()
            self._next_step(stage, Reason.WAITING)

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
        if budget.withdrawn(self.draft.attempts, attempt.stage, attempt.number) and before and not outcome.succeeded:
            update |= {"outcome": budget.WITHDRAWN[before.reason], "reason": before.reason, "message": before.message}
        for name in ("job_uid", "pod", "node", "start_time", "resumed_from_step", "checkpoint_step"):
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
        elif shown.last_update_time and (shown.remaining or shown.estimated_completion_time):
            silent_at = shown.last_update_time + _SILENT
            self.times.append(silent_at)
            if silent_at <= self.now:
                self._progress_pauses()

    def _progress_pauses(self) -> None:
        """Nothing runs: what is shown must not promise a time."""
        shown = self.observed.status.progress
        if shown and (shown.remaining or shown.estimated_completion_time):
            self.progress = shown.model_copy(update={"remaining": "", "estimated_completion_time": None})

    def _progress_at_the_end(self) -> None:
        shown = self.observed.status.progress
        self.progress = _kept(shown, Step.SAVE).model_copy(update={"percent": 100, "summary": "100%"})

    def _stop_children(self) -> None:
        for child in self._children():
            if _going(child) and "deletionTimestamp" not in child["metadata"]:
                self.delete.append(_named(child))

    def _children(self) -> Iterator[Object]:
        for stage in STAGES:
            yield from self.observed.attempts(stage.STAGE).values()

    def decision(self) -> Decision:
        if self.observed.unknown_fields and not self.draft.status.message:
            self.draft.say(f"{_not_known(self.observed)}, and goes on without")
        status = self.draft.finished()
        if expiry := self._expiry():  # nothing else need happen to a finished job before that
            self.times = [expiry]
        return Decision(
            status=status if document(status) != document(self.observed.status) else None,
            progress=self.progress if self.progress != self.observed.status.progress else None,
            keep=self._retention(),
            suspend=tuple(self.suspend),
            create=tuple(self.create),
            delete=tuple(self.delete),
            force=tuple(self.force),
            again_at=min((time for time in self.times if time > self.now), default=None),
        )


def _named(child: Object) -> Child:
    return Child(child["kind"], child["metadata"]["name"], child["metadata"]["uid"])


def document(status: FineTuneJobStatus) -> dict[str, Any]:
    """The controller's part of the status, as it is written: everything but the live progress."""
    return {key: value for key, value in status.wire().items() if key != "progress"}


_SILENT = timedelta(minutes=5)
"""Without a report for so long, nobody can say how much time is left."""

_MENDED = (Reason.SPEC_CHANGED, "the spec changed while the job was suspended, so another attempt goes on in its place")


def _going(child: Object) -> bool:
    """Whether a child Job may still start pods."""
    return not any(condition_of(child, kind) for kind in ("Complete", "Failed", "FailureTarget"))


def _not_known(observed: Observed) -> str:
    return f"this operator does not know {', '.join(observed.unknown_fields)}"


def _in_the_way(observed: Observed, now: datetime) -> str:
    """What must be gone before anything may start, as a sentence: remains of a former job, foreign objects."""
    for running in observed.running:
        told = running["metadata"].get("deletionTimestamp")
        if told and now >= moment(told) + waits.LOST_AFTER:
            return waits.lost(running)
        former = (running["metadata"].get("labels") or {}).get(JOB_UID_LABEL) != observed.uid
        whose = "the former job of this name" if former else "an earlier attempt"
        return f"waiting for pod {running['metadata']['name']} of {whose} to be gone"
    if jobs := observed.former(observed.jobs):
        return f"waiting for Job {jobs[0]['metadata']['name']} of the former job of this name to be gone"
    if claim := workspace.in_the_way(observed):
        return claim
    if observed.claim_held_by:
        brought = observed.spec.workspace.claim_name
        return f"waits for the claim {brought}, in which the job {observed.claim_held_by} works"
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
