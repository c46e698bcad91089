"""What the pods of all stages share: identity, security, volumes, environment, and the Job around them.

The pods run under the restricted Pod Security profile, hold no token of the API server, and learn everything about
their job from one file that a projected volume makes of an annotation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.api import API_VERSION, KIND
from finetune.api.contract import (
    ATTEMPT_LABEL,
    CA_ANNOTATION,
    CACHE,
    CONTAINERS,
    JOB_ANNOTATION,
    JOB_LABEL,
    JOB_UID_LABEL,
    NEVER_RETRIED,
    OPERATOR_LABEL,
    PROGRESS_CA,
    PROGRESS_TOKEN,
    PROGRESS_URL,
    SPEC_LABEL,
    STAGE_LABEL,
    TOKEN_AUDIENCE,
    ExitCode,
    Layout,
    Step,
    StepJob,
)
from finetune.api.crd import MENDABLE
from finetune.api.spec import FineTuneJobSpec, Resources
from finetune.controller.decision.observed import Observed, child_name

USER = 65532
MAX_JOB_BYTES = 200 * 1024
"""Annotations of an object hold 256 KiB together; the rest is for the CA and for what others add."""

DISRUPTED_RULE, PREEMPTED_RULE, NEVER_RETRIED_RULE = range(3)
"""Positions in the podFailurePolicy: the Job's condition names them when pod and report are gone."""

FAILURE_POLICY: dict[str, Any] = {
    "rules": [
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [int(ExitCode.PREEMPTED)]}},
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": sorted(int(code) for code in NEVER_RETRIED)}},
    ]
}

_LAYOUT = Layout()
_CACHE = "/cache"
_CA_FILE = "progress-ca.crt"
_TOKEN_FILE = "token"  # noqa: S105 - a path


@dataclass(frozen=True)
class PodSettings:
    """What the administrator decides about jobs' pods."""

    steps_image: str
    train_image: str
    image_pull_policy: str = "IfNotPresent"
    image_pull_secrets: tuple[str, ...] = ()
    hf_endpoint: str = ""
    force_delete: bool = False
    """Whether pods of lost machines may be removed by force; the rights for it come with the chart's value."""

    progress_url: str = ""
    progress_ca: str = ""
    """The certificates that pods trust the progress service by, PEM."""


def labels(observed: Observed, stage: str, attempt: int = 0) -> dict[str, str]:
    """The labels that children are watched and told apart by."""
    operator = (observed.job["metadata"].get("labels") or {}).get(OPERATOR_LABEL)
    return {
        "app.kubernetes.io/managed-by": "finetune-operator",
        JOB_LABEL: observed.name,
        JOB_UID_LABEL: observed.uid,
        STAGE_LABEL: stage,
        **({ATTEMPT_LABEL: str(attempt)} if attempt else {}),
        **({OPERATOR_LABEL: operator} if operator else {}),
    }


def owned_by(observed: Observed) -> list[dict[str, Any]]:
    """The ownerReferences of every child: deletion is the garbage collector's work."""
    owner = {"apiVersion": API_VERSION, "kind": KIND, "name": observed.name, "uid": observed.uid, "controller": True}
    return [owner]


def step_job(observed: Observed, attempt: int) -> str:
    """The resolved job as the steps read it."""
    return StepJob(
        name=observed.name,
        namespace=observed.namespace,
        uid=observed.uid,
        created=observed.created,
        attempt=attempt,
        spec=observed.spec,
    ).model_dump_json(by_alias=True, exclude_none=True)


def spec_digest(spec: FineTuneJobSpec) -> str:
    """A digest of what may change before an attempt that was suspended goes on, short enough for a label."""
    document = spec.wire()

    def value(path: str) -> Any:
        part: Any = document
        for name in path.split("."):
            part = (part or {}).get(name)
        return part

    text = json.dumps([value(path) for path in MENDABLE], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def job_manifest(
    observed: Observed, settings: PodSettings, stage: str, attempt: int, pod: dict[str, Any], *, pods: int | None = None
) -> dict[str, Any]:
    """One attempt of a stage: a Job that never retries by itself, around the pod spec. With `pods` it has so many,
    each with an index."""
    annotations = {JOB_ANNOTATION: step_job(observed, attempt)}
    if settings.progress_ca:
        annotations[CA_ANNOTATION] = settings.progress_ca
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": child_name(observed.name, stage, attempt),
            "namespace": observed.namespace,
            "labels": labels(observed, stage, attempt) | {SPEC_LABEL: spec_digest(observed.spec)},
            "ownerReferences": owned_by(observed),
        },
        "spec": {
            "backoffLimit": 0,
            "completions": pods or 1,
            "parallelism": pods or 1,
            "completionMode": "Indexed" if pods else "NonIndexed",
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": FAILURE_POLICY,
            "template": {
                "metadata": {"labels": labels(observed, stage, attempt), "annotations": annotations},
                "spec": pod,
            },
        },
    }


def pod_spec(
    settings: PodSettings,
    containers: list[dict[str, Any]],
    volumes: list[dict[str, Any]],
    *,
    init_containers: list[dict[str, Any]] | None = None,
    node_selector: Mapping[str, str] | None = None,
    grace_seconds: int = 60,
) -> dict[str, Any]:
    """The pod around the containers."""
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **({"initContainers": init_containers} if init_containers else {}),
        "containers": containers,
        "volumes": volumes,
        **({"nodeSelector": dict(node_selector)} if node_selector else {}),
        **(
            {"imagePullSecrets": [{"name": name} for name in secrets]}
            if (secrets := settings.image_pull_secrets)
            else {}
        ),
    }


def container(
    settings: PodSettings,
    step: Step,
    *,
    training_image: bool = False,
    resources: Resources,
    mounts: Iterable[dict[str, Any]] = (),
    env: Mapping[str, str] | None = None,
    credentials: Iterable[str] = (),
) -> dict[str, Any]:
    """The container that runs one step; `credentials` names the Secrets whose keys become its environment."""
    secrets = [{"secretRef": {"name": name}} for name in credentials]
    environment = {**_environment(settings), **(env or {})}
    variables = [{"name": name, "value": value} for name, value in environment.items()]
    return {
        "name": CONTAINERS[step],
        "image": settings.train_image if training_image else settings.steps_image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["finetune-step", step.value],
        **({"env": variables} if variables else {}),
        **({"envFrom": secrets} if secrets else {}),
        "resources": _requests_and_limits(resources),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "workspace", "mountPath": str(_LAYOUT.workspace)},
            {"name": "job", "mountPath": str(_LAYOUT.job_file.parent), "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - an emptyDir of the pod's own
            *mounts,
        ],
    }


def volumes(observed: Observed, settings: PodSettings, further: Iterable[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """The volumes of every pod: workspace, /tmp, and one for job.json and what progress is reported with."""
    items = [{"path": _LAYOUT.job_file.name, "fieldRef": {"fieldPath": f"metadata.annotations['{JOB_ANNOTATION}']"}}]
    if _reports(settings):
        items.append({"path": _CA_FILE, "fieldRef": {"fieldPath": f"metadata.annotations['{CA_ANNOTATION}']"}})
    token = {"serviceAccountToken": {"audience": TOKEN_AUDIENCE, "expirationSeconds": 3600, "path": _TOKEN_FILE}}
    sources = [{"downwardAPI": {"items": items}}, *([token] if _reports(settings) else [])]
    return [
        {"name": "workspace", "persistentVolumeClaim": {"claimName": workspace_claim(observed.name, observed.spec)}},
        {"name": "job", "projected": {"sources": sources}},
        {"name": "tmp", "emptyDir": {}},
        *further,
    ]


def workspace_claim(job: str, spec: FineTuneJobSpec) -> str:
    """The claim that carries the job from step to step."""
    return spec.workspace.claim_name or f"{job}-work"


def claim_volumes(claims: Iterable[str]) -> list[dict[str, Any]]:
    """Volumes for the claims that pvc:// URIs name."""
    return [
        {"name": f"claim-{index}", "persistentVolumeClaim": {"claimName": claim}} for index, claim in enumerate(claims)
    ]


def claim_mounts(claims: tuple[str, ...], wanted: Iterable[str], *, read_only: bool) -> list[dict[str, Any]]:
    """Mounts of the wanted ones among the claims that the pod has as volumes."""
    return [
        {"name": f"claim-{claims.index(claim)}", "mountPath": str(_LAYOUT.claims / claim), "readOnly": read_only}
        for claim in wanted
    ]


def cache_claims(spec: FineTuneJobSpec) -> tuple[str, ...]:
    """The claim of the shared cache, if the job has one."""
    return (spec.cache.claim_name,) if spec.cache else ()


def cache_mounts(claims: tuple[str, ...], spec: FineTuneJobSpec, *, read_only: bool) -> list[dict[str, Any]]:
    """Its mount, at the same place in all pods: a workspace may link to it."""
    return [
        {"name": f"claim-{claims.index(claim)}", "mountPath": _CACHE, "readOnly": read_only}
        for claim in cache_claims(spec)
    ]


def cache_environment(spec: FineTuneJobSpec) -> dict[str, str]:
    """Where containers that fill the shared cache find it."""
    return {CACHE: _CACHE} if spec.cache else {}


def hub_environment(settings: PodSettings) -> dict[str, str]:
    """Where containers that talk to the Hugging Face hub find it."""
    return {"HF_ENDPOINT": settings.hf_endpoint} if settings.hf_endpoint else {}


def _environment(settings: PodSettings) -> dict[str, str]:
    """What differs from job to job or from cluster to cluster; the rest is set in the images.

    Each entry costs the API server as much as a field does: in the Job, in its pod, and at every change of either.
    """
    if not _reports(settings):
        return {}
    return {
        PROGRESS_URL: settings.progress_url,
        PROGRESS_CA: str(_LAYOUT.job_file.parent / _CA_FILE),
        PROGRESS_TOKEN: str(_LAYOUT.job_file.parent / _TOKEN_FILE),
    }


def _reports(settings: PodSettings) -> bool:
    return bool(settings.progress_url and settings.progress_ca)


def _requests_and_limits(resources: Resources) -> dict[str, Any]:
    limits, requests = dict(resources.limits or {}), dict(resources.requests or {})
    return {
        **({"limits": limits} if limits else {}),
        **({"requests": {**limits, **requests}} if limits or requests else {}),
    }
