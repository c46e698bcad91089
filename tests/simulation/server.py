"""A model of the API server with the Job controller, the garbage collector and kubelets, as far as jobs meet them.

It keeps the rules that the design relies on: names are unique, UIDs and resourceVersions are checked, deletion takes
its time, suspended Jobs lose their pods without counting them, one terminal pod decides a Job. Time is a counter.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

from finetune.api import API_VERSION, KIND
from finetune.api.contract import CONTAINERS, OPERATOR_LABEL, ExitCode, Step
from finetune.api.crd import structural
from finetune.api.status import FineTuneJobStatus
from finetune.controller.cluster.apply import PROGRESS_MANAGER
from finetune.controller.cluster.client import ApiError
from finetune.controller.cluster.resources import EVENTS, SERVICES, WATCHED
from finetune.controller.decision.observed import index_of, stage_of
from tests.builders import INDEX_LABEL, NOW, STEPS, FineTuneJob, stamp
from tests.merge_patch import merged

TOTAL_STEPS = 4
Fate = Callable[[dict[str, Any], Step], str]
"""What becomes of a pod's step: ok, crash, unavailable, user-error, oom, preempt, evict or lost."""

_CODES = {"crash": 1, "unavailable": 69, "user-error": 65, "oom": 137, "preempt": 75, "evict": 75, "lost": 137}
DEFINITION = structural(FineTuneJobStatus)
_KINDS = {resource.plural: resource.kind for resource in (*WATCHED, SERVICES, EVENTS)}


class Server:
    """Objects, and what the cluster does to them by itself."""

    def __init__(self, fate: Fate = lambda pod, step: "ok") -> None:
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.changes: list[tuple[str, dict[str, Any]]] = []
        """Watch events since the start, in order."""

        self.absent: set[str] = set()
        """Claims that users have still to make; all others that pods mount are there."""

        self.silent: set[str] = set()
        """Pods whose machines do not answer any more: what they do is not known, and nobody tells them anything."""
        self.definition = DEFINITION
        """The schema of a FineTuneJob's status, as it is served."""

        self.now = NOW
        self.fate = fate
        self.checkpoints: dict[str, int] = {}
        self.started: list[tuple[str, str, str]] = []
        self.succeeded: list[tuple[str, str]] = []
        self._serial = 0

    # --- the API

    async def get(self, path: str) -> dict[str, Any]:
        kind, name, _ = _place(path)
        return copy.deepcopy(self._found(kind, name))

    async def create(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        kind = body["kind"]
        key = (kind, body["metadata"]["name"])
        if key in self.objects:
            raise ApiError(409, "AlreadyExists", f"{key} already exists")
        return copy.deepcopy(self._add(copy.deepcopy(dict(body))))

    async def merge(self, path: str, body: Mapping[str, Any], manager: str) -> dict[str, Any]:
        kind, name, subresource = _place(path)
        item = self._found(kind, name)
        preconditions = {key: body["metadata"][key] for key in ("uid", "resourceVersion") if key in body["metadata"]}
        if not preconditions.items() <= item["metadata"].items():
            raise ApiError(409, "Conflict", "the object has been modified")
        part = subresource or "spec"
        assert set(body) <= {"metadata", part}
        if kind == KIND:
            assert "resourceVersion" in preconditions, "a successor of the job would inherit its status"
            assert (set(body["status"]) == {"progress"}) == (manager == PROGRESS_MANAGER), "two writers, one status"
        before = copy.deepcopy(item)
        if part in body:
            item[part] = merged(item.get(part, {}), json.loads(json.dumps(body[part])))
        if (kind, part) == (KIND, "status"):
            item[part] = known(item[part], self.definition)
        item["metadata"] = merged(item["metadata"], body["metadata"])
        return copy.deepcopy(item if item == before else self._changed(item))

    async def delete(self, path: str, uid: str, grace_seconds: int | None = None) -> None:
        """A pod that is deleted by force stays until the Job controller has counted it: see `_kubelet`."""
        kind, name, _ = _place(path)
        item = self.objects.get((kind, name))
        if item is not None and item["metadata"]["uid"] == uid and (kind != "Pod" or grace_seconds is None):
            self._delete(item)

    # --- the user

    def submit(self, job: FineTuneJob) -> dict[str, Any]:
        return self._add({**job.build()})

    def edit(self, name: str, **spec: Any) -> None:
        item = self._found(KIND, name)
        item["spec"] |= spec
        item["metadata"]["generation"] += 1
        self._changed(item)

    def relabel(self, name: str, operator: str) -> None:
        item = self._found(KIND, name)
        item["metadata"].setdefault("labels", {})[OPERATOR_LABEL] = operator
        self._changed(item)

    def hold(self, name: str, *, suspend: bool) -> None:
        """Suspend a child Job, or resume it, as a queue does."""
        job = self._found("Job", name)
        job["spec"]["suspend"] = suspend
        field = {"manager": "queue", "time": stamp(self.now), "fieldsV1": {"f:spec": {"f:suspend": {}}}}
        job["metadata"]["managedFields"] = [field]
        self._changed(job)

    def lose_the_machine_of(self, name: str) -> None:
        """The machine of a pod falls silent, and Kubernetes evicts the pod for that."""
        self.silent.add(name)
        pod = self._found("Pod", name)
        condition = {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "DeletionByTaintManager",
            "message": "silent",
        }
        pod["status"]["conditions"] = [condition | {"lastTransitionTime": stamp(self.now)}]
        self._terminate(pod)

    def remove(self, name: str) -> None:
        self._delete(self._found(KIND, name))

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [item for (which, _), item in self.objects.items() if which == kind]

    # --- the cluster

    def tick(self) -> None:
        """A second passes; whatever the cluster does by itself, it does."""
        self.now += timedelta(seconds=1)
        for job in list(self.all("Job")):
            self._job_controller(job)
        for pod in list(self.all("Pod")):
            self._kubelet(pod)
        self._collect_garbage()

    def _job_controller(self, job: dict[str, Any]) -> None:
        uid = job["metadata"]["uid"]
        pods = [pod for pod in self.all("Pod") if pod["metadata"]["ownerReferences"][0]["uid"] == uid]
        status = job.setdefault("status", {})
        if "deletionTimestamp" in job["metadata"] or _over(status):
            return
        alive = [pod for pod in pods if pod["status"]["phase"] in ("Pending", "Running")]
        well = {index_of(pod) for pod in pods if pod["status"]["phase"] == "Succeeded"}
        failed = [pod for pod in pods if pod["status"]["phase"] == "Failed" and not pod["metadata"].get("uncounted")]
        if failed:
            self._fail(job, failed[0], alive)
        elif len(well) == job["spec"]["completions"]:
            self._count(job)
            status["conditions"] = [{"type": "Complete", "status": "True", "lastTransitionTime": stamp(self.now)}]
            self.succeeded.append((job["metadata"]["labels"]["finetune.dev/job-uid"], stage_of(job)))
            self._changed(job)
        elif job["spec"].get("suspend"):
            for pod in alive:
                pod["metadata"]["uncounted"] = True
                self._terminate(pod)
        elif not any("deletionTimestamp" in pod["metadata"] for pod in pods):
            for index in sorted(set(range(job["spec"]["completions"])) - well - {index_of(pod) for pod in alive}):
                self._new_pod(job, index)
        if self._count(job):
            self._changed(job)

    def _count(self, job: dict[str, Any]) -> bool:
        """Count the pods that run and those that are told to stop, as the Job's status does; whether that is news."""
        mine = [
            pod for pod in self.all("Pod") if pod["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]
        ]
        alive = [pod for pod in mine if pod["status"]["phase"] in ("Pending", "Running")]
        terminating = sum("deletionTimestamp" in pod["metadata"] for pod in alive)
        counts = {"active": len(alive) - terminating, "terminating": terminating}
        news = any(job["status"].get(key, 0) != count for key, count in counts.items())
        job["status"] |= counts
        return news

    def _fail(self, job: dict[str, Any], pod: dict[str, Any], alive: list[dict[str, Any]]) -> None:
        """One pod that failed is the end of the Job: the others are deleted, and when the last has ended it says so."""
        status = job["status"]
        if not status.get("target"):
            status["target"] = {"status": "True", **_policy(job, pod)}
        for other in alive:
            self._terminate(other)
        kind = "FailureTarget" if alive else "Failed"
        if (status.get("conditions") or [{}])[-1].get("type") != kind:
            self._count(job)
            status.setdefault("conditions", []).append(
                {"type": kind, **status["target"], "lastTransitionTime": stamp(self.now)}
            )
            self._changed(job)

    def _new_pod(self, job: dict[str, Any], index: int) -> None:
        template = job["spec"]["template"]
        volumes = [
            item["persistentVolumeClaim"] for item in template["spec"]["volumes"] if "persistentVolumeClaim" in item
        ]
        claims = [volume["claimName"] for volume in volumes]
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job["metadata"]["name"], "controller": True}
        self._serial += 1
        self._add(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": f"{job['metadata']['name']}-{self._serial}",
                    "namespace": job["metadata"]["namespace"],
                    "labels": template["metadata"]["labels"] | ({INDEX_LABEL: str(index)} if _indexed(job) else {}),
                    "ownerReferences": [{**owner, "uid": job["metadata"]["uid"]}],
                },
                "spec": {"claim": claims[0], "claims": claims, "pods": job["spec"]["completions"]},
                "status": {"phase": "Pending"},
            }
        )

    def _kubelet(self, pod: dict[str, Any]) -> None:
        status, metadata = pod["status"], pod["metadata"]
        steps = STEPS[stage_of(pod)]
        if status["phase"] in ("Succeeded", "Failed"):
            if "deletionTimestamp" in metadata:
                self._drop(pod)
            return
        if metadata["name"] in self.silent:
            return
        states = status.setdefault("states", {})
        running = next((step for step in steps if "running" in states.get(step, {})), None)
        if "deletionTimestamp" in metadata:
            if self.now >= datetime.fromisoformat(metadata["deletionTimestamp"]):
                self._end(pod, running or steps[0], "preempt" if running else "crash")
                if metadata.get("uncounted"):
                    self._drop(pod)
            return
        if ("PersistentVolumeClaim", pod["spec"]["claim"]) not in self.objects:
            return
        if missing := next((claim for claim in pod["spec"]["claims"] if claim in self.absent), None):
            said = f'persistentvolumeclaim "{missing}" not found'
            status["conditions"] = [{"type": "PodScheduled", "status": "False", "message": said}]
            self._changed(pod)
            return
        if running == Step.TRAIN and not self._together(pod):
            return
        if running is None:
            step = next(step for step in steps if step not in states)
            states[step] = {"running": {}}
            status |= {"phase": "Running", "conditions": []}
            self.started.append((metadata["labels"]["finetune.dev/job-uid"], stage_of(pod), metadata["name"]))
            self._show(pod)
            return
        fate = self.fate(pod, running)
        if fate == "ok" and running == Step.TRAIN:
            claim = self.objects["PersistentVolumeClaim", pod["spec"]["claim"]]["metadata"]["uid"]
            if index_of(pod) == 0:
                self.checkpoints[claim] = min(TOTAL_STEPS, self.checkpoints.get(claim, 0) + 1)
            if self.checkpoints.get(claim, 0) < TOTAL_STEPS:
                return
        self._end(pod, running, fate)

    def _together(self, pod: dict[str, Any]) -> bool:
        """Whether all pods of the attempt train; one whose peer has failed falls with it, one that is missing is
        waited for."""
        labels = pod["metadata"]["labels"]
        peers = [other for other in self.all("Pod") if other["metadata"]["ownerReferences"] == _owners(pod)]
        for peer in peers:
            if peer["status"]["phase"] == "Failed" and not peer["metadata"].get("uncounted"):
                stopped = peer["status"]["states"][Step.TRAIN]["terminated"]["exitCode"] == ExitCode.PREEMPTED
                self._end(pod, Step.TRAIN, "preempt" if stopped else "unavailable")
                return False
        busy = [peer for peer in peers if Step.TRAIN in peer["status"].get("states", {}) and not _uncounted(peer)]
        named = pod["spec"]["pods"] == 1 or ("Service", f"{labels['finetune.dev/job-name']}-train") in self.objects
        return named and len({index_of(peer) for peer in busy}) == pod["spec"]["pods"]

    def _end(self, pod: dict[str, Any], step: Step, fate: str) -> None:
        status = pod["status"]
        stage = stage_of(pod)
        code = _CODES.get(fate, 0)
        report: dict[str, Any] = {"step": step.value}
        if fate == "user-error":
            report["error"] = {"reason": "BadRow", "message": "column x is missing", "hint": "name another"}
        elif step == Step.TRAIN:
            claim = self.objects.get(("PersistentVolumeClaim", pod["spec"]["claim"]))
            done = self.checkpoints.get(claim["metadata"]["uid"], 0) if claim else 0
            report |= {"result": {"steps": done, "checkpoint": {"step": done}}}
        else:
            report["result"] = {}
        terminated: dict[str, Any] = {"exitCode": code, "finishedAt": stamp(self.now)}
        terminated["message"] = "" if fate in ("crash", "oom", "lost") else json.dumps(report)
        if fate == "oom":
            terminated["reason"] = "OOMKilled"
        status["states"][step] = {"terminated": terminated}
        if code:
            status["phase"] = "Failed"
        elif step == STEPS[stage][-1]:
            status["phase"] = "Succeeded"
        if fate in ("evict", "lost"):
            reason = "EvictionByEvictionAPI" if fate == "evict" else "DeletionByTaintManager"
            condition = {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": fate}
            status["conditions"] = [condition | {"lastTransitionTime": stamp(self.now)}]
        self._show(pod)

    def _show(self, pod: dict[str, Any]) -> None:
        steps = STEPS[stage_of(pod)]
        shown = [
            {"name": CONTAINERS[step], "state": pod["status"]["states"].get(step, {"waiting": {"reason": "Waiting"}})}
            for step in steps
        ]
        pod["status"] |= {"initContainerStatuses": shown[:-1], "containerStatuses": shown[-1:]}
        self._changed(pod)

    def _terminate(self, pod: dict[str, Any]) -> None:
        if "deletionTimestamp" not in pod["metadata"]:
            pod["metadata"]["deletionTimestamp"] = stamp(self.now + timedelta(seconds=3))
            self._changed(pod)

    def _collect_garbage(self) -> None:
        uids = {item["metadata"]["uid"] for item in self.objects.values()}
        for item in list(self.objects.values()):
            owners = item["metadata"].get("ownerReferences")
            if owners and owners[0]["uid"] not in uids:
                self._delete(item)
        used = {pod["spec"]["claim"] for pod in self.all("Pod") if pod["status"]["phase"] in ("Pending", "Running")}
        for claim in self.all("PersistentVolumeClaim"):
            if "deletionTimestamp" in claim["metadata"] and claim["metadata"]["name"] not in used:
                self._drop(claim)

    def _delete(self, item: dict[str, Any]) -> None:
        if item["kind"] == "Pod":
            if item["status"]["phase"] in ("Succeeded", "Failed"):
                self._drop(item)
            else:
                self._terminate(item)
        elif item["kind"] == "PersistentVolumeClaim":
            if "deletionTimestamp" not in item["metadata"]:
                item["metadata"]["deletionTimestamp"] = stamp(self.now)
                self._changed(item)
        else:
            self._drop(item)

    def _found(self, kind: str, name: str) -> dict[str, Any]:
        if (kind, name) not in self.objects:
            raise ApiError(404, "NotFound", f"{kind} {name} not found")
        return self.objects[kind, name]

    def _add(self, item: dict[str, Any]) -> dict[str, Any]:
        self._serial += 1
        metadata = item["metadata"]
        metadata.setdefault("uid", f"uid-{self._serial}")
        metadata["creationTimestamp"] = stamp(self.now)
        self.objects[item["kind"], metadata["name"]] = item
        return self._changed(item)

    def _changed(self, item: dict[str, Any]) -> dict[str, Any]:
        self._serial += 1
        item["metadata"]["resourceVersion"] = str(self._serial)
        self.changes.append(("MODIFIED", copy.deepcopy(item)))
        return item

    def _drop(self, item: dict[str, Any]) -> None:
        self.objects.pop((item["kind"], item["metadata"]["name"]), None)
        self._serial += 1
        gone = copy.deepcopy(item)
        gone["metadata"]["resourceVersion"] = str(self._serial)
        self.changes.append(("DELETED", gone))


def _over(status: dict[str, Any]) -> bool:
    return any(condition["type"] in ("Complete", "Failed") for condition in status.get("conditions", ()))


def _indexed(job: dict[str, Any]) -> bool:
    return bool(job["spec"]["completionMode"] == "Indexed")


def _owners(item: dict[str, Any]) -> Any:
    return item["metadata"]["ownerReferences"]


def _uncounted(pod: dict[str, Any]) -> bool:
    return bool(pod["metadata"].get("uncounted"))


def _policy(job: dict[str, Any], pod: dict[str, Any]) -> dict[str, str]:
    """What the Job controller writes about a pod that failed, by the Job's podFailurePolicy."""
    ended = [
        (status["name"], status["state"]["terminated"]["exitCode"])
        for status in (*pod["status"].get("initContainerStatuses", ()), *pod["status"].get("containerStatuses", ()))
        if status["state"].get("terminated", {}).get("exitCode")
    ]
    name = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
    disrupted = any(condition["type"] == "DisruptionTarget" for condition in pod["status"].get("conditions", ()))
    for index, rule in enumerate(job["spec"]["podFailurePolicy"]["rules"]):
        if "onPodConditions" in rule and disrupted:
            message = f"Pod {name} has condition DisruptionTarget matching FailJob rule at index {index}"
            return {"reason": "PodFailurePolicy", "message": message}
        for container, code in ended:
            if code in rule.get("onExitCodes", {}).get("values", ()):
                message = (
                    f"Container {container} for pod {name} failed with exit code {code} matching FailJob rule at index"
                )
                return {"reason": "PodFailurePolicy", "message": f"{message} {index}"}
    return {"reason": "BackoffLimitExceeded", "message": "Job has reached the specified backoff limit"}


def known(value: Any, schema: Mapping[str, Any]) -> Any:
    """The value without unknown fields, which the server drops in silence; an unknown word it refuses."""
    if value not in schema.get("enum", (value,)):
        raise ApiError(422, "Invalid", f"Unsupported value: {value!r}")
    if isinstance(value, list):
        return [known(item, schema.get("items", {})) for item in value]
    if isinstance(value, dict) and "properties" in schema:
        fields = schema["properties"]
        return {key: known(item, fields[key]) for key, item in value.items() if key in fields}
    return value


def _place(path: str) -> tuple[str, str, str]:
    parts = path.split("/")
    rest = parts[parts.index("namespaces") + 2 :]
    return _KINDS[rest[0]], rest[1] if len(rest) > 1 else "", rest[2] if len(rest) > 2 else ""


def random_fates(random: random.Random, bad: float) -> Fate:
    """Fates that go wrong with a probability, never as a user error."""
    kinds = ("crash", "unavailable", "oom", "preempt", "evict", "lost")

    def fate(pod: dict[str, Any], step: Step) -> str:
        return random.choice(kinds) if random.random() < bad else "ok"

    return fate


__all__ = ["API_VERSION", "Fate", "Server", "random_fates"]
