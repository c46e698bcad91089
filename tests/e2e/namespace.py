"""A fresh namespace of a real cluster, and what a test does in it: apply, wait, look, kill."""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster import Cluster
from tests.cluster.api import Api, ApiError

Object = dict[str, Any]
JOBS = "/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs"
POLL = 0.2
"""Seconds between two looks; what is waited for is a state, never a time."""


class NotSeen(AssertionError):
    """What a test waited for did not come; says what was there instead."""


@dataclass(frozen=True)
class Namespace:
    """One test's own namespace, under restricted Pod Security."""

    cluster: Cluster
    api: Api
    name: str

    @classmethod
    def create(cls, cluster: Cluster, prefix: str) -> Namespace:
        namespace = cls(cluster, Api(cluster.layout, timeout=30), f"{prefix}-{uuid.uuid4().hex[:6]}")
        labels = {"pod-security.kubernetes.io/enforce": "restricted", "finetune.dev/test": "e2e"}
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace.name, "labels": labels}}
        namespace.api.request("POST", "/api/v1/namespaces", body)
        return namespace

    def delete(self) -> None:
        self.api.request("DELETE", f"/api/v1/namespaces/{self.name}")

    # --- objects

    def apply(self, *documents: Object) -> None:
        """As a user does: kubectl apply."""
        text = "\n---\n".join(json.dumps(document) for document in documents)
        self.cluster.kubectl("apply", "-f", "-", namespace=self.name, input=text)

    def claim(self, name: str) -> Object:
        """A claim for a model, a dataset or a result."""
        return {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": name},
            "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}},
        }

    def job(self, name: str) -> Object:
        """The FineTuneJob as it is now."""
        found = self.api.request("GET", f"{JOBS.format(namespace=self.name)}/{name}")
        assert isinstance(found, dict)
        return found

    def delete_job(self, name: str) -> None:
        self.cluster.kubectl("delete", "ftj", name, "--wait=false", namespace=self.name)

    def list(self, kind: str, job: str | None = None) -> list[Object]:
        """Jobs, pods, claims or events; with `job`, those of one FineTuneJob."""
        path = {
            "jobs": f"/apis/batch/v1/namespaces/{self.name}/jobs",
            "pods": f"/api/v1/namespaces/{self.name}/pods",
            "persistentvolumeclaims": f"/api/v1/namespaces/{self.name}/persistentvolumeclaims",
            "events": f"/api/v1/namespaces/{self.name}/events",
        }[kind]
        selector = f"?labelSelector=finetune.dev/job-name%3D{job}" if job else ""
        items = self.api.request("GET", path + selector)["items"]
        assert isinstance(items, list)
        return items

    def owned(self, job: str) -> list[str]:
        """Everything that belongs to a FineTuneJob, by kind and name."""
        return [
            f"{kind}/{item['metadata']['name']}"
            for kind in ("jobs", "pods", "persistentvolumeclaims")
            for item in self.list(kind, job)
        ]

    def pod(self, job: str, stage: str) -> Object:
        """The newest pod of a stage that has not ended."""
        pods = [
            pod
            for pod in self.list("pods", job)
            if pod["metadata"]["labels"].get("finetune.dev/stage") == stage
            and pod["status"]["phase"] not in ("Succeeded", "Failed")
        ]
        assert pods, f"no pod of stage {stage} runs"
        return max(pods, key=lambda pod: pod["metadata"]["creationTimestamp"])

    # --- waiting

    def until(self, name: str, wanted: Callable[[Object], object], what: str, seconds: float = 240) -> Object:
        """Wait until the FineTuneJob is as wanted."""
        deadline = time.monotonic() + seconds
        seen: list[str] = []
        while time.monotonic() < deadline:
            job = self.job(name)
            status = job.get("status", {})
            line = f"{status.get('phase')} {status.get('progress', {}).get('summary', '')} {status.get('message', '')}"
            if not seen or seen[-1] != line:
                seen.append(line)
            if wanted(job):
                return job
            time.sleep(POLL)
        raise NotSeen(
            f"{name} was not {what} within {seconds:.0f} s. Seen:\n  " + "\n  ".join(seen) + self.described(name)
        )

    def until_phase(self, name: str, *phases: str, seconds: float = 240) -> Object:
        """Wait until the phase is one of these; a job that failed meanwhile fails the test at once, with its words."""

        def wanted(job: Object) -> bool:
            phase = job.get("status", {}).get("phase")
            if phase == "Failed" and "Failed" not in phases:
                raise NotSeen(f"{name} failed instead of reaching {phases}:{self.described(name)}")
            return phase in phases

        return self.until(name, wanted, " or ".join(phases), seconds)

    def until_true(self, check: Callable[[], object], what: str, seconds: float = 120) -> None:
        """Wait until the check holds."""
        deadline = time.monotonic() + seconds
        while not check():
            if time.monotonic() > deadline:
                raise NotSeen(f"not seen within {seconds:.0f} s: {what}")
            time.sleep(POLL)

    def described(self, name: str) -> str:
        """All that helps to understand a failed test."""
        try:
            status = json.dumps(self.job(name).get("status", {}), indent=1, ensure_ascii=False)
        except ApiError as error:
            status = str(error)
        pods = self.cluster.kubectl("get", "jobs,pods,pvc", "-o", "wide", namespace=self.name, check=False).stdout
        events = self.cluster.kubectl("get", "events", namespace=self.name, check=False).stdout[-3000:]
        logs = "".join(
            f"\n--- {pod['metadata']['name']}\n"
            + self.cluster.kubectl(
                "logs", pod["metadata"]["name"], "--all-containers", "--tail=15", namespace=self.name, check=False
            ).stdout
            for pod in self.list("pods")
        )
        return f"\n--- status\n{status}\n--- objects\n{pods}\n--- events\n{events}{logs}"

    # --- violence

    def kill(self, pod: Object) -> None:
        """SIGKILL every process of the pod's containers at once, as the kernel's OOM killer or a power cut does."""
        uid = pod["metadata"]["uid"]
        for process in _processes_of(uid):
            os.kill(process, signal.SIGKILL)

    def evict(self, pod: Object) -> None:
        """Through the eviction API, as a drain or a preempting autoscaler does."""
        name = pod["metadata"]["name"]
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": self.name}}
        self.api.request("POST", f"/api/v1/namespaces/{self.name}/pods/{name}/eviction", body)

    # --- files

    def volume(self, claim: str) -> Path:
        """Where the claim's files lie on this machine."""
        bound = self.api.request("GET", f"/api/v1/namespaces/{self.name}/persistentvolumeclaims/{claim}")
        volume = self.api.request("GET", f"/api/v1/persistentvolumes/{bound['spec']['volumeName']}")
        return Path(volume["spec"]["local"]["path"])


def _processes_of(pod_uid: str) -> Iterable[int]:
    """Processes in the pod's cgroups that run a container's command (not the sandbox's pause)."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                mine = pod_uid in (entry / "cgroup").read_text()
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if mine and b"sleep" not in command:
                yield int(entry.name)
