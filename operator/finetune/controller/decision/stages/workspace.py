"""The workspace: the volume that carries a job from step to step. It goes with the job, unless it is the user's own."""

from __future__ import annotations

from typing import Any

from finetune.controller.decision.observed import Object, Observed
from finetune.controller.decision.stages import pod

STAGE = "workspace"


def manifest(observed: Observed) -> dict[str, Any] | None:
    """The claim to create; None when the user brings one."""
    workspace = observed.spec.workspace
    if workspace.claim_name:
        return None
    storage_class = {"storageClassName": workspace.storage_class_name} if workspace.storage_class_name else {}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {
            "name": pod.workspace_claim(observed.name, observed.spec),
            "namespace": observed.namespace,
            "labels": pod.labels(observed, STAGE),
            "ownerReferences": pod.owned_by(observed),
        },
        "spec": {
            "accessModes": [mode.value for mode in workspace.access_modes],
            "resources": {"requests": {"storage": workspace.size}},
            **storage_class,
        },
    }


def exists(observed: Observed) -> bool:
    """Whether the job has the volume it needs, bound or not."""
    if observed.spec.workspace.claim_name:
        return True
    return any("deletionTimestamp" not in claim["metadata"] for claim in _own(observed))


def waits_for(observed: Observed) -> str:
    """Why the volume is not there yet, in the provisioner's words; empty when nobody complained."""
    for claim in _own(observed):
        warned = observed.warning(claim, "PersistentVolumeClaim")
        if warned and (claim.get("status") or {}).get("phase") == "Pending":
            return f"the workspace volume is not provisioned: {warned.reason}: {warned.message}"
    return ""


def _own(observed: Observed) -> tuple[Object, ...]:
    name = pod.workspace_claim(observed.name, observed.spec)
    return tuple(claim for claim in observed.owned(observed.claims) if claim["metadata"]["name"] == name)
