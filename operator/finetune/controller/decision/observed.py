"""What a decision looks at: one FineTuneJob and everything that carries its name, as last seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from finetune.api import API_VERSION, KIND
from finetune.api.contract import ATTEMPT_LABEL, JOB_UID_LABEL, STAGE_LABEL
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


@dataclass(frozen=True)
class Observed:
    """The whole state that a decision is made from."""

    job: Object
    jobs: tuple[Object, ...] = ()
    pods: tuple[Object, ...] = ()
    claims: tuple[Object, ...] = ()
    warnings: tuple[Warned, ...] = ()
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
    def lost_latch(self) -> str:
        """The time in status that is there and cannot be read: without it the job would begin, or end, anew."""
        raw = self.job.get("status") or {}
        times = {"startTime": self.status.start_time, "completionTime": self.status.completion_time}
        return next((name for name, time in times.items() if time is None and raw.get(name) is not None), "")

    def owned(self, objects: tuple[Object, ...]) -> tuple[Object, ...]:
        """Those that belong to this very job."""
        return tuple(item for item in objects if owner_uid(item) == self.uid)

    def former(self, objects: tuple[Object, ...]) -> tuple[Object, ...]:
        """Those that belong to another job that had, or has, this name."""
        return tuple(item for item in objects if owner_uid(item) not in (self.uid, None))

    def attempts(self, stage: str) -> dict[int, Object]:
        """This job's child Jobs of a stage, by attempt number, lowest first."""
        found = {attempt_of(item): item for item in self.owned(self.jobs) if stage_of(item) == stage}
        return dict(sorted(found.items()))

    def pods_of(self, stage: str, attempt: int) -> tuple[Object, ...]:
        """This job's pods of one attempt."""
        return tuple(pod for pod in self.owned(self.pods) if stage_of(pod) == stage and attempt_of(pod) == attempt)

    def warning(self, item: Object, kind: str) -> Warned | None:
        """The newest warning about that object."""
        uid = item["metadata"]["uid"]
        return next((warned for warned in self.warnings if warned.uid == uid and warned.kind == kind), None)


def status_of(job: Object) -> FineTuneJobStatus:
    """The status that a FineTuneJob carries, as far as it can be read; what only a newer operator knows is kept."""
    return read(FineTuneJobStatus, job.get("status") or {})


def owner_uid(item: Object) -> str | None:
    """The UID of the FineTuneJob that a child belongs to: its controller, or for a pod the label that its Job gave."""
    metadata = item["metadata"]
    for owner in metadata.get("ownerReferences") or ():
        if owner.get("controller") and owner.get("kind") == KIND and owner.get("apiVersion") == API_VERSION:
            return str(owner["uid"])
    label = (metadata.get("labels") or {}).get(JOB_UID_LABEL)
    return str(label) if label else None


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
