"""What a decision looks at: one FineTuneJob and everything that carries its name, as last seen."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, NamedTuple

from pydantic import ValidationError

from finetune.api import API_VERSION, KIND
from finetune.api.contract import ATTEMPT_LABEL, OPERATOR_LABEL, STAGE_LABEL, SUSPENDED_LABEL
from finetune.api.reading import read, unknown_fields
from finetune.api.spec import FineTuneJobSpec
from finetune.api.status import FineTuneJobStatus

Object = Mapping[str, Any]
"""A Kubernetes object as JSON."""


@dataclass(frozen=True)
class Warned:
    """The newest warning Event about a child: quota, Pod Security and storage speak in no other way."""

    kind: str
    name: str
    uid: str
    reason: str
    message: str


class Owner(NamedTuple):
    """The controller of an object, as the object's ownerReferences name it."""

    name: str
    uid: str


@dataclass(frozen=True)
class Observed:
    """The whole state that a decision is made from. What is whose is told by the UID of its controller: labels say
    only what to look at, and a copy of them makes nothing a child."""

    job: Object
    jobs: tuple[Object, ...] = ()
    pods: tuple[Object, ...] = ()
    claims: tuple[Object, ...] = ()
    departed: tuple[Object, ...] = ()
    """Jobs and pods as they were when they vanished after their end: what they came to still counts."""

    warnings: tuple[Warned, ...] = ()
    claim_held_by: str = ""
    """The job that works in the same claim of the user's own, if there is one before this."""

    conflicts: tuple[str, ...] = ()
    """What the server said against creating a child, as sentences: names that are taken, quotas. It may pass."""

    again_at: datetime | None = None
    """When the server is asked again, where there are conflicts."""

    refused: str = ""
    """The server's words when it will never create a child as this spec wants it."""

    @property
    def name(self) -> str:
        return str(self.job["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.job["metadata"]["namespace"])

    @property
    def uid(self) -> str:
        return str(self.job["metadata"]["uid"])

    @property
    def generation(self) -> int:
        return int(self.job["metadata"].get("generation", 1))

    @property
    def created(self) -> datetime:
        return moment(self.job["metadata"]["creationTimestamp"])

    @property
    def deleting(self) -> bool:
        return "deletionTimestamp" in self.job["metadata"]

    @cached_property
    def spec(self) -> FineTuneJobSpec:
        """The spec, without `unknown_fields`; raises pydantic.ValidationError for a value that cannot be read."""
        return self._spec or FineTuneJobSpec.model_validate(self.job["spec"], extra="ignore")

    @cached_property
    def unknown_fields(self) -> tuple[str, ...]:
        """The fields of the spec that only a newer operator knows, as paths."""
        found = () if self._spec else unknown_fields(FineTuneJobSpec, self.job["spec"])
        return tuple(f"spec.{path}" for path in found)

    @cached_property
    def _spec(self) -> FineTuneJobSpec | None:
        """The spec, where all of it is known and can be read."""
        try:
            return FineTuneJobSpec.model_validate(self.job["spec"])
        except ValidationError:
            return None

    @cached_property
    def status(self) -> FineTuneJobStatus:
        """The status as last seen, as far as it can be read."""
        return status_of(self.job)

    @property
    def operator(self) -> str:
        """The operator that the job is for; empty for the one without a name."""
        return str((self.job["metadata"].get("labels") or {}).get(OPERATOR_LABEL, ""))

    @property
    def lost_latch(self) -> str:
        """The time in status that is there and cannot be read: without it the job would begin, or end, anew."""
        raw = self.job.get("status") or {}
        times = {"startTime": self.status.start_time, "completionTime": self.status.completion_time}
        return next((name for name, time in times.items() if time is None and raw.get(name) is not None), "")

    def owned(self, objects: tuple[Object, ...]) -> tuple[Object, ...]:
        """Those that this very job controls."""
        return tuple(item for item in objects if owner_uid(item) == self.uid)

    def former(self, objects: tuple[Object, ...]) -> tuple[Object, ...]:
        """Those that another job controls, which had this name."""
        return tuple(item for item in objects if owner_uid(item) not in (self.uid, None))

    def attempts(self, stage: str) -> dict[int, Object]:
        """This job's child Jobs of a stage, by attempt number, lowest first; those that vanished after their end, too,
        unless there is another one."""
        found = {
            attempt_of(item): item
            for item in (*self.departed, *self.jobs)
            if stage_of(item) == stage and (owner := parent_of(item)) and owner.uid == self.uid
        }
        return dict(sorted(found.items()))

    def pods_of(self, stage: str, attempt: int) -> tuple[Object, ...]:
        """The pods of one attempt: those whose controller is its Job, the one that is there or the one in status."""
        child = self.attempts(stage).get(attempt)
        history = (self.status.attempts.history if self.status.attempts else None) or ()
        uids = {item.job_uid for item in history if (item.stage, item.number) == (stage, attempt)} - {None}
        uids |= {str(child["metadata"]["uid"])} if child else set()
        return tuple(pod for pod in (*self.departed, *self.pods) if (job := job_of_pod(pod)) and job.uid in uids)

    @property
    def running(self) -> tuple[Object, ...]:
        """Every pod that may still run for a job of this name: this one's, a former one's, or of a Job that is gone.
        Believed by its controller's name alone, because the Job may be gone: it holds up what is new, no more."""
        names = re.compile(rf"{re.escape(self.name)}-[a-z]+-[0-9]+")
        alive = (pod for pod in self.pods if not terminal(pod))
        return tuple(pod for pod in alive if (job := job_of_pod(pod)) and names.fullmatch(job.name))

    def warning(self, item: Object, kind: str) -> Warned | None:
        """The newest warning about that object."""
        uid = item["metadata"]["uid"]
        return next((warned for warned in self.warnings if warned.uid == uid and warned.kind == kind), None)


def status_of(job: Object) -> FineTuneJobStatus:
    """The status that a FineTuneJob carries, as far as it can be read; what only a newer operator knows is kept."""
    return read(FineTuneJobStatus, job.get("status") or {})


def child_name(job: str, stage: str, attempt: int) -> str:
    """The name of an attempt's Job: deterministic, so that a repeated creation meets itself as a 409."""
    return f"{job}-{stage}-{attempt}"


def controller_of(item: Object, kind: str, version: str) -> Owner | None:
    """The controller of an object, if it is of that kind: the one way by which anything is said to belong to it."""
    for owner in item["metadata"].get("ownerReferences") or ():
        if owner.get("controller") and owner.get("kind") == kind and owner.get("apiVersion") == version:
            return Owner(str(owner["name"]), str(owner["uid"]))
    return None


def owner_uid(item: Object) -> str | None:
    """The UID of the FineTuneJob that controls a child; None when none does."""
    owner = controller_of(item, KIND, API_VERSION)
    return owner.uid if owner else None


def parent_of(job: Object) -> Owner | None:
    """The FineTuneJob that a Job is an attempt of. A copy of one, ownerReferences and all, has another name."""
    owner = controller_of(job, KIND, API_VERSION) if job["kind"] == "Job" else None
    named = owner and child_name(owner.name, stage_of(job), attempt_of(job))
    return owner if job["metadata"]["name"] == named else None


def job_of_pod(pod: Object) -> Owner | None:
    """The Job that controls a pod."""
    return controller_of(pod, "Job", "batch/v1") if pod["kind"] == "Pod" else None


def stage_of(item: Object) -> str:
    return str((item["metadata"].get("labels") or {}).get(STAGE_LABEL, ""))


def attempt_of(item: Object) -> int:
    """The attempt that a child belongs to; 0 when its label says nothing sensible."""
    label = str((item["metadata"].get("labels") or {}).get(ATTEMPT_LABEL, ""))
    return int(label) if label.isdecimal() else 0


def index_of(pod: Object) -> int:
    """Which pod of its attempt this is, from 0."""
    label = str((pod["metadata"].get("labels") or {}).get("batch.kubernetes.io/job-completion-index", ""))
    return int(label) if label.isdecimal() else 0


def terminal(pod: Object) -> bool:
    """Whether no container of the pod runs or will ever run again."""
    return (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")


def over(item: Object) -> bool:
    """Whether a child is at its end, which is what the next thing to do waits for."""
    if item["kind"] == "Job":
        return any(condition_of(item, kind) for kind in ("Complete", "Failed", "FailureTarget", "SuccessCriteriaMet"))
    return terminal(item)


def container_statuses(pod: Object | None) -> tuple[Object, ...]:
    """The statuses of all containers, init containers first."""
    status = (pod or {}).get("status") or {}
    return (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ()))


def condition_of(item: Object, kind: str) -> Object | None:
    """The condition of that type, if it holds."""
    for condition in (item.get("status") or {}).get("conditions") or ():
        if condition.get("type") == kind and condition.get("status") == "True":
            return dict(condition)
    return None


def moment(text: str) -> datetime:
    """An API timestamp."""
    return datetime.fromisoformat(text).astimezone(UTC)


def finished(child: Object) -> bool:
    """Whether a Job has ended, and no pod of it runs or will.

    FailureTarget and SuccessCriteriaMet come before the end: pods may still be writing. Its status says how many are;
    a server that does not count those that are told to stop has to say Failed or Complete."""
    if any(condition_of(child, kind) for kind in ("Complete", "Failed")):
        return True
    status = child.get("status") or {}
    decided = any(condition_of(child, kind) for kind in ("FailureTarget", "SuccessCriteriaMet"))
    return decided and not status.get("active") and status.get("terminating") == 0


def busy(child: Object) -> bool:
    """Whether the Job counts pods that run or are told to stop."""
    status = child.get("status") or {}
    return not finished(child) and bool(status.get("active") or status.get("terminating"))


def suspended_here(child: Object) -> bool:
    """Whether it was this operator that suspended the Job."""
    return SUSPENDED_LABEL in (child["metadata"].get("labels") or {})
