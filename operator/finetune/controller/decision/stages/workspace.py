"""The workspace: the volume that carries a job from step to step, unless it is the user's own.

It goes with the job by its ownerReference, and outlives it without one. Whether it is to is derived at every visit, so
that the garbage collector, which knows of no operator, never takes what somebody may still go on from.
"""

from __future__ import annotations

from typing import Any

from finetune.api.contract import JOB_UID_LABEL, KEPT_ANNOTATION, KEPT_LABEL
from finetune.api.spec import Retain
from finetune.controller.decision.observed import Object, Observed, owner_uid
from finetune.controller.decision.stages import pod

STAGE = "workspace"


def manifest(observed: Observed) -> dict[str, Any] | None:
    """The claim to create; None when the user brings one."""
    workspace = observed.spec.workspace
    if workspace.claim_name:
        return None
    outlives = kept(observed, failed=False)
    storage_class = {"storageClassName": workspace.storage_class_name} if workspace.storage_class_name else {}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {
            "name": _name(observed),
            "namespace": observed.namespace,
            "labels": pod.labels(observed, STAGE) | (_kept_label() if outlives else {}),
            **({"annotations": _kept_from(observed)} if outlives else {"ownerReferences": pod.owned_by(observed)}),
        },
        "spec": {
            "accessModes": [mode.value for mode in workspace.access_modes],
            "resources": {"requests": {"storage": workspace.size}},
            **storage_class,
        },
    }


def claim_of(observed: Observed) -> Object | None:
    """The claim that was made for this very job, whether it goes with it or outlives it."""
    mine = (claim for claim in observed.claims if claim["metadata"]["name"] == _name(observed))
    return next((claim for claim in mine if made_for(claim) == observed.uid), None)


def exists(observed: Observed) -> bool:
    """Whether the job has the volume it needs, bound or not."""
    if observed.spec.workspace.claim_name:
        return True
    claim = claim_of(observed)
    return claim is not None and "deletionTimestamp" not in claim["metadata"]


def waits_for(observed: Observed) -> str:
    """Why the volume is not there yet, in the provisioner's words; empty when nobody complained."""
    if (claim := claim_of(observed)) is not None:
        warned = observed.warning(claim, "PersistentVolumeClaim")
        if warned and (claim.get("status") or {}).get("phase") == "Pending":
            return f"the workspace volume is not provisioned: {warned.reason}: {warned.message}"
    return ""


def in_the_way(observed: Observed) -> str:
    """The claim that has to be gone before the job's own can be made, as a sentence; empty when nothing is."""
    if observed.job["spec"].get("workspace", {}).get("claimName"):
        return ""
    for claim in observed.claims:
        name = claim["metadata"]["name"]
        if made_for(claim) == observed.uid:
            if "deletionTimestamp" in claim["metadata"]:
                return f"waiting for volume claim {name}, which is being deleted, to be gone"
        elif name == _name(observed) and _is_kept(claim) and "deletionTimestamp" not in claim["metadata"]:
            return (
                f"the volume claim {name} was kept from the former job of this name: to go on from its checkpoints, "
                f"apply the job anew with spec.workspace.claimName: {name}; to begin anew, delete the "
                "claim, and the job goes on by itself"
            )
        elif not _is_kept(claim) or name == _name(observed):
            return f"waiting for volume claim {name} of the former job of this name to be gone"
    return ""


def kept(observed: Observed, *, failed: bool) -> bool:
    """Whether the claim is to outlive the job as it stands now."""
    retain = (observed.job["spec"].get("workspace") or {}).get("retain", Retain.ON_FAILURE)
    return retain == Retain.ALWAYS or (failed and retain == Retain.ON_FAILURE)


def retention(observed: Observed, *, failed: bool) -> dict[str, Any] | None:
    """The change of the claim's metadata that makes it go with the job, or outlive it; None when it does so already."""
    claim = claim_of(observed)
    if claim is None or "deletionTimestamp" in claim["metadata"]:
        return None
    wanted = kept(observed, failed=failed)
    if wanted == _is_kept(claim):
        return None
    others = [owner for owner in claim["metadata"].get("ownerReferences") or () if owner.get("uid") != observed.uid]
    owners = others if wanted else [*others, *pod.owned_by(observed)]
    return {
        "ownerReferences": owners or None,
        "labels": _kept_label() if wanted else {KEPT_LABEL: None},
        "annotations": _kept_from(observed) if wanted else {KEPT_ANNOTATION: None},
    }


def _name(observed: Observed) -> str:
    return f"{observed.name}-work"


def _kept_label() -> dict[str, str]:
    return {KEPT_LABEL: "true"}


def _kept_from(observed: Observed) -> dict[str, str]:
    return {KEPT_ANNOTATION: f"{observed.namespace}/{observed.name}/{observed.uid}"}


def _is_kept(claim: Object) -> bool:
    return owner_uid(claim) is None


def made_for(claim: Object) -> str | None:
    """The UID of the job that the claim was made for; one that is kept has its label left."""
    return owner_uid(claim) or (claim["metadata"].get("labels") or {}).get(JOB_UID_LABEL)
