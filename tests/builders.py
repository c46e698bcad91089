"""Fluent builders of the objects that the controller sees, so that a test names only what it is about."""

from __future__ import annotations

import copy
import itertools
import json
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune.api import API_VERSION, KIND
from finetune.api.contract import (
    ATTEMPT_LABEL,
    CONTAINERS,
    JOB_LABEL,
    JOB_UID_LABEL,
    OPERATOR_LABEL,
    STAGE_LABEL,
    SUSPENDED_LABEL,
    Step,
)

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)

SPEC: dict[str, Any] = {
    "model": {"uri": "hf://models/tiny"},
    "tokens": {"add": [{"content": "<think>"}]},
    "dataset": {"sources": [{"uri": "hf://datasets/some/rows"}]},
    "training": {"maxSteps": 4, "batchSize": 1, "resources": {"limits": {"nvidia.com/gpu": "1"}}},
    "output": {"uri": "pvc://models/out"},
}

STEPS = {
    "prepare": (Step.DOWNLOAD, Step.ADD_TOKENS, Step.RELOAD, Step.LOAD_DATASET),
    "train": (Step.TRAIN,),
    "save": (Step.SAVE,),
}

INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
"""What the Job controller labels the pods of an Indexed Job with."""

_versions = itertools.count(1000)


def stamp(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


class _Built:
    """Holds an object under construction."""

    def __init__(self, item: dict[str, Any]) -> None:
        self._item = item

    def build(self) -> dict[str, Any]:
        item = copy.deepcopy(self._item)
        item["metadata"]["resourceVersion"] = str(next(_versions))
        return item

    def deleting(self, when: datetime = NOW) -> Any:
        self._item["metadata"]["deletionTimestamp"] = stamp(when)
        return self

    def labelled(self, **labels: str) -> Any:
        """With further labels; `operator` and `queue` are short for those of that meaning."""
        names = {"operator": OPERATOR_LABEL, "queue": "kueue.x-k8s.io/queue-name"}
        known = self._item["metadata"].setdefault("labels", {})
        known |= {names.get(key, key): value for key, value in labels.items()}
        return self

    def copied(self, name: str, *, owners: bool = False) -> Any:
        """A copy that somebody made: another name and UID, the same labels, and perhaps the ownerReferences."""
        self._item["metadata"] |= {"name": name, "uid": f"uid-of-{name}"}
        if not owners:
            self._item["metadata"].pop("ownerReferences")
        return self


class FineTuneJob(_Built):
    def __init__(self, name: str = "tune", uid: str = "job-1", namespace: str = "team") -> None:
        metadata = {
            "name": name,
            "namespace": namespace,
            "uid": uid,
            "generation": 1,
            "creationTimestamp": stamp(NOW - timedelta(minutes=1)),
        }
        super().__init__({"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": copy.deepcopy(SPEC)})

    def with_spec(self, **fields: Any) -> FineTuneJob:
        """Set fields of the spec, by their wire names; None removes one."""
        for key, value in fields.items():
            if value is None:
                self._item["spec"].pop(key, None)
            else:
                self._item["spec"][key] = value
        return self

    def training(self, **fields: Any) -> FineTuneJob:
        self._item["spec"]["training"] |= fields
        return self

    def edited(self) -> FineTuneJob:
        """The spec was changed once more: the server counts."""
        self._item["metadata"]["generation"] += 1
        return self

    def with_status(self, status: Any) -> FineTuneJob:
        self._item["status"] = status if isinstance(status, dict) else status.wire()
        return self


class Job(_Built):
    """A child Job of one attempt."""

    def __init__(self, stage: str, attempt: int = 1, job: str = "tune", owner: str = "job-1") -> None:
        owners = [{"apiVersion": API_VERSION, "kind": KIND, "name": job, "uid": owner, "controller": True}]
        metadata = {
            "name": f"{job}-{stage}-{attempt}",
            "namespace": "team",
            "uid": f"{owner}-{stage}-{attempt}",
            "creationTimestamp": stamp(NOW),
            "labels": _labels(stage, attempt, job, owner),
            "ownerReferences": owners,
        }
        super().__init__({"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": {}, "status": {}})

    def complete(self) -> Job:
        return self._condition("Complete", "CompletionsReached", "")

    def failed(self, reason: str = "BackoffLimitExceeded", message: str = "Job has reached the limit") -> Job:
        return self._condition("Failed", reason, message)

    def failed_by_rule(self, index: int, container: str = "train", code: int = 0, suffix: str = "x") -> Job:
        pod = f"team/{self._item['metadata']['name']}-{suffix}"
        said = (
            f"Container {container} for pod {pod} failed with exit code {code} matching FailJob rule at index {index}"
        )
        if not code:
            said = f"Pod {pod} has condition DisruptionTarget matching FailJob rule at index {index}"
        return self.failed("PodFailurePolicy", said)

    def started(self, at: datetime = NOW) -> Job:
        """The Job controller took it up, or took it up again after a suspension."""
        self._item["status"]["startTime"] = stamp(at)
        return self

    def suspended(self, by: str = "") -> Job:
        """Suspended by the operator, or by somebody else."""
        self._item["spec"]["suspend"] = True
        if by:
            field = {"manager": by, "time": stamp(NOW), "fieldsV1": {"f:spec": {"f:suspend": {}}}}
            self._item["metadata"]["managedFields"] = [field]
            self._item["suspendedBy"] = by  # as the store shows it
        else:
            self._item["metadata"]["labels"][SUSPENDED_LABEL] = "true"
        return self

    def resumed_elsewhere(self) -> Job:
        """Suspended by the operator, and resumed by somebody else."""
        self._item["metadata"]["labels"][SUSPENDED_LABEL] = "true"
        return self

    def failing(self, terminating: int | None = None, active: int = 0) -> Job:
        """Failed as far as the Job controller is concerned, while pods may still run."""
        counts = {"terminating": terminating} if terminating is not None else {}
        self._item["status"] |= counts | ({"active": active} if active else {})
        return self._condition("FailureTarget", "BackoffLimitExceeded", "Job has reached the limit")

    def ended_at(self, when: datetime) -> Job:
        for condition in self._item["status"]["conditions"]:
            condition["lastTransitionTime"] = stamp(when)
        return self

    def _condition(self, kind: str, reason: str, message: str) -> Job:
        conditions = self._item["status"].setdefault("conditions", [])
        conditions.append({"type": kind, "status": "True", "reason": reason, "message": message})
        return self


class Pod(_Built):
    """A pod of one attempt; its containers follow one another as the kubelet shows them."""

    def __init__(
        self,
        stage: str,
        attempt: int = 1,
        job: str = "tune",
        owner: str = "job-1",
        suffix: str = "x",
        index: int | None = None,
    ) -> None:
        """With `index` it is one of several pods of its attempt, and named after it."""
        suffix = suffix if index is None else f"{index}-x"
        parent = f"{job}-{stage}-{attempt}"
        controller = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "name": parent,
            "uid": f"{owner}-{stage}-{attempt}",
            "controller": True,
        }
        metadata = {
            "name": f"{parent}-{suffix}",
            "namespace": "team",
            "uid": f"{owner}-{parent}-{suffix}",
            "creationTimestamp": stamp(NOW),
            "labels": _labels(stage, attempt, job, owner) | ({INDEX_LABEL: str(index)} if index is not None else {}),
            "ownerReferences": [controller],
        }
        item = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {}, "status": {"phase": "Pending"}}
        super().__init__(item)
        self._steps = STEPS[stage]
        self._states: dict[Step, dict[str, Any]] = {}

    def unschedulable(self, message: str) -> Pod:
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        self._item["status"]["conditions"] = [condition]
        return self

    def on(self, node: str) -> Pod:
        self._item["spec"]["nodeName"] = node
        return self

    def waiting(self, step: Step, reason: str, message: str = "") -> Pod:
        return self._state(step, {"waiting": {"reason": reason, "message": message}})

    def running(self, step: Step, since: datetime | None = None) -> Pod:
        """That step runs, those before it are done."""
        self._item["status"]["phase"] = "Running" if step == self._steps[-1] else "Pending"
        for earlier in self._steps[: self._steps.index(step)]:
            if earlier not in self._states:
                self.done(earlier)
        return self._state(step, {"running": {"startedAt": stamp(since)} if since else {}})

    def done(self, step: Step, **result: Any) -> Pod:
        return self.ended(step, 0, {"step": step.value, "result": result})

    def ended(
        self, step: Step, code: int, report: dict[str, Any] | str = "", reason: str = "", at: datetime = NOW
    ) -> Pod:
        message = report if isinstance(report, str) else json.dumps(report)
        terminated = {"exitCode": code, "reason": reason or ("Completed" if code == 0 else "Error"), "message": message}
        return self._state(step, {"terminated": terminated | {"finishedAt": stamp(at)}})

    def succeeded(self) -> Pod:
        for step in self._steps:
            if step not in self._states:
                self.done(step)
        self._item["status"]["phase"] = "Succeeded"
        return self

    def failed(
        self, step: Step, code: int, report: dict[str, Any] | str = "", reason: str = "", at: datetime = NOW
    ) -> Pod:
        for earlier in self._steps[: self._steps.index(step)]:
            if earlier not in self._states:
                self.done(earlier)
        self.ended(step, code, report, reason, at)
        self._item["status"]["phase"] = "Failed"
        return self

    def disrupted(self, reason: str = "EvictionByEvictionAPI", message: str = "evicted", at: datetime = NOW) -> Pod:
        condition = {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": message}
        condition["lastTransitionTime"] = stamp(at)
        self._item["status"].setdefault("conditions", []).append(condition)
        return self

    def evicted(self, message: str) -> Pod:
        self._item["status"] |= {"phase": "Failed", "reason": "Evicted", "message": message}
        return self

    def refused_by_the_kubelet(self, reason: str, message: str) -> Pod:
        """As the kubelet shows a pod that it does not start, or stops for a reason of its own."""
        self._item["status"] |= {"phase": "Failed", "reason": reason, "message": message}
        return self

    def unreachable(self) -> Pod:
        """As Kubernetes shows a pod whose machine does not answer."""
        found = self._item["status"].setdefault("conditions", [])
        found += [{"type": "ContainersReady", "status": "True"}, {"type": "Ready", "status": "False"}]
        return self

    def _state(self, step: Step, state: dict[str, Any]) -> Pod:
        self._states[step] = state
        return self

    def build(self) -> dict[str, Any]:
        pod = super().build()
        for step in self._steps:
            state = self._states.get(step, {"waiting": {"reason": "PodInitializing"}})
            where = "containerStatuses" if step == self._steps[-1] else "initContainerStatuses"
            if self._states:
                pod["status"].setdefault(where, []).append({"name": CONTAINERS[step], "state": state})
        return pod


class Claim(_Built):
    """The workspace claim."""

    def __init__(self, job: str = "tune", owner: str = "job-1") -> None:
        owners = [{"apiVersion": API_VERSION, "kind": KIND, "name": job, "uid": owner, "controller": True}]
        metadata = {
            "name": f"{job}-work",
            "namespace": "team",
            "uid": f"{owner}-work",
            "creationTimestamp": stamp(NOW),
            "labels": {JOB_LABEL: job, JOB_UID_LABEL: owner, STAGE_LABEL: "workspace"},
            "ownerReferences": owners,
        }
        item = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "status": {"phase": "Bound"}}
        super().__init__(item)

    def kept(self) -> Claim:
        """It has no owner any more, and says so."""
        self._item["metadata"].pop("ownerReferences")
        self._item["metadata"]["labels"]["finetune.dev/kept"] = "true"
        return self

    def pending(self) -> Claim:
        self._item["status"]["phase"] = "Pending"
        return self


def event(kind: str, about: dict[str, Any], reason: str, message: str) -> dict[str, Any]:
    """A warning Event about an object."""
    metadata = about["metadata"]
    return {
        "kind": "Event",
        "metadata": {"name": f"{metadata['name']}.1", "namespace": metadata["namespace"], "resourceVersion": "1"},
        "type": "Warning",
        "reason": reason,
        "message": message,
        "involvedObject": {"kind": kind, **{key: metadata[key] for key in ("name", "namespace", "uid")}},
    }


def error_report(step: Step, reason: str, message: str, hint: str = "") -> dict[str, Any]:
    """What a step that failed leaves in its termination log."""
    return {"step": step.value, "error": {"reason": reason, "message": message, "hint": hint}}


def _labels(stage: str, attempt: int, job: str, owner: str) -> dict[str, str]:
    return {JOB_LABEL: job, JOB_UID_LABEL: owner, STAGE_LABEL: stage, ATTEMPT_LABEL: str(attempt)}
