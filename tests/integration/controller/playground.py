"""A namespace under restricted Pod Security, an operator that serves it, and a hand that acts as the kubelets.

Everything else is real: API server, scheduler, Job controller, garbage collector. Pods cannot be scheduled, so that a
test says second by second what becomes of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from finetune.api import API_VERSION, KIND
from finetune.api.contract import ATTEMPT_LABEL, CONTAINERS, JOB_LABEL, OPERATOR_LABEL, STAGE_LABEL, Step
from tests.builders import STEPS
from tests.cluster.api import Api, ApiError
from tests.integration.controller.process import OperatorProcess

NOWHERE = {"finetune.dev/test": "no-such-node"}
MERGE = "application/merge-patch+json"
PLURALS = {
    KIND: "/apis/finetune.dev/v1alpha1/namespaces/{}/finetunejobs",
    "Job": "/apis/batch/v1/namespaces/{}/jobs",
    "Pod": "/api/v1/namespaces/{}/pods",
    "PersistentVolumeClaim": "/api/v1/namespaces/{}/persistentvolumeclaims",
    "Event": "/api/v1/namespaces/{}/events",
    "ResourceQuota": "/api/v1/namespaces/{}/resourcequotas",
    "Secret": "/api/v1/namespaces/{}/secrets",
    "Lease": "/apis/coordination.k8s.io/v1/namespaces/{}/leases",
}


class Playground:
    def __init__(self, api: Api, namespace: str, operator: OperatorProcess) -> None:
        self.api, self.namespace, self.operator = api, namespace, operator

    # --- objects

    def path(self, kind: str, name: str = "", subresource: str = "") -> str:
        return "/".join(part for part in (PLURALS[kind].format(self.namespace), name, subresource) if part)

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        return dict(self.api.request("POST", self.path(body["kind"]), body))

    def get(self, kind: str, name: str) -> dict[str, Any] | None:
        try:
            return dict(self.api.request("GET", self.path(kind, name)))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def list(self, kind: str) -> list[dict[str, Any]]:
        return list(self.api.request("GET", self.path(kind))["items"])

    def patch(self, kind: str, name: str, body: dict[str, Any], subresource: str = "") -> None:
        self.api.request("PATCH", self.path(kind, name, subresource), body, MERGE)

    def delete(self, kind: str, name: str) -> None:
        self.api.request("DELETE", self.path(kind, name), {"propagationPolicy": "Background"})

    def submit(self, name: str = "tune", **spec: Any) -> dict[str, Any]:
        """Apply a FineTuneJob whose pods no node takes."""
        wanted: dict[str, Any] = {
            "model": {"uri": "hf://models/tiny"},
            "tokens": {"add": [{"content": "<think>"}]},
            "dataset": {"sources": [{"uri": "hf://datasets/some/rows"}]},
            "training": {"maxSteps": 4, "batchSize": 1, "nodeSelector": NOWHERE},
            "prepare": {"nodeSelector": NOWHERE},
        }
        metadata = {"name": name, "labels": {OPERATOR_LABEL: self.operator.name}}
        body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": wanted | spec}
        return self.create(body)

    def status(self, name: str = "tune") -> dict[str, Any]:
        return dict((self.get(KIND, name) or {}).get("status") or {})

    def condition(self, kind: str, name: str = "tune") -> dict[str, Any]:
        return next((dict(item) for item in self.status(name).get("conditions", ()) if item["type"] == kind), {})

    def children(self, name: str = "tune") -> list[str]:
        return sorted(
            f"{kind}/{item['metadata']['name']}"
            for kind in ("Job", "PersistentVolumeClaim")
            for item in self.list(kind)
            if item["metadata"].get("labels", {}).get(JOB_LABEL) == name
        )

    # --- waiting

    def until(self, what: Callable[[], Any], seconds: float = 30, message: str = "") -> Any:
        """Wait until it holds; its value."""
        deadline = time.monotonic() + seconds
        while not (found := what()):
            if time.monotonic() > deadline:
                states = json.dumps({name: self.status(name) for name in self._names()}, indent=1)
                raise AssertionError(
                    f"{message or 'what was waited for did not come'}\n{states}\n{self.operator.tail()}"
                )
            time.sleep(0.05)
        return found

    def until_phase(self, phase: str, name: str = "tune", seconds: float = 30) -> dict[str, Any]:
        self.until(lambda: self.status(name).get("phase") == phase, seconds, f"{name} is not {phase}")
        return self.status(name)

    def until_says(self, text: str, name: str = "tune", seconds: float = 30) -> str:
        self.until(lambda: text in self.status(name).get("message", ""), seconds, f"{name} does not say {text!r}")
        return str(self.status(name)["message"])

    def pod(self, stage: str, attempt: int = 1, name: str = "tune", seconds: float = 30) -> str:
        """The pod of an attempt, when it is there."""

        def found() -> str | None:
            for item in self.list("Pod"):
                labels = item["metadata"].get("labels", {})
                mine = (labels.get(JOB_LABEL), labels.get(STAGE_LABEL), labels.get(ATTEMPT_LABEL))
                if mine == (name, stage, str(attempt)) and "deletionTimestamp" not in item["metadata"]:
                    return str(item["metadata"]["name"])
            return None

        return str(self.until(found, seconds, f"no pod of {name} {stage} {attempt}"))

    def _names(self) -> list[str]:
        return [item["metadata"]["name"] for item in self.list(KIND)]

    # --- the kubelets' hand

    def run(self, pod: str, stage: str, step: Step, results: dict[Step, dict[str, Any]] | None = None) -> None:
        """That step runs, those before it have ended well."""
        states = {}
        for other in STEPS[stage][: STEPS[stage].index(step)]:
            states[other] = _terminated(0, {"step": other.value, "result": (results or {}).get(other, {})})
        states[step] = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
        self._show(pod, stage, states, "Running")

    def succeed(self, pod: str, stage: str, results: dict[Step, dict[str, Any]] | None = None) -> None:
        states = {
            step: _terminated(0, {"step": step.value, "result": (results or {}).get(step, {})}) for step in STEPS[stage]
        }
        self._show(pod, stage, states, "Succeeded")

    def fail(self, pod: str, stage: str, step: Step, code: int, report: dict[str, Any] | None = None) -> None:
        states = {other: _terminated(0, {"step": other.value}) for other in STEPS[stage][: STEPS[stage].index(step)]}
        states[step] = _terminated(code, report)
        self._show(pod, stage, states, "Failed")

    def _show(self, pod: str, stage: str, states: dict[Step, dict[str, Any]], phase: str) -> None:
        shown = [
            {
                "name": CONTAINERS[step],
                "state": states.get(step, {"waiting": {"reason": "PodInitializing"}}),
                "image": "none",
                "imageID": "",
                "ready": False,
                "restartCount": 0,
            }
            for step in STEPS[stage]
        ]
        status = {"phase": phase, "initContainerStatuses": shown[:-1], "containerStatuses": shown[-1:]}
        self.patch("Pod", pod, {"status": status}, "status")


def _terminated(code: int, report: dict[str, Any] | None) -> dict[str, Any]:
    times = {"startedAt": "2026-01-01T00:00:00Z", "finishedAt": "2026-01-01T00:00:01Z"}
    return {"terminated": {"exitCode": code, "message": json.dumps(report) if report else "", **times}}
