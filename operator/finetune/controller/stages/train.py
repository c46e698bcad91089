"""Train: the pod that holds the GPUs. It sees no credentials."""

from __future__ import annotations

from typing import Any

from finetune.api.contract import DEVICES, Step
from finetune.controller.observed import Object, Observed
from finetune.controller.stages import pod
from finetune.controller.stages.attempt import Outcome, judge

STAGE = "train"
STEPS = (Step.TRAIN,)


def manifest(observed: Observed, settings: pod.PodSettings, attempt: int) -> dict[str, Any]:
    """The Job of one attempt."""
    spec = observed.spec
    training = spec.training
    shared_memory = {"name": "dshm", "emptyDir": {"medium": "Memory"}}
    claims = pod.cache_claims(spec)
    train = pod.container(
        settings,
        Step.TRAIN,
        training_image=True,
        resources=training.resources,
        env={DEVICES: str(pod.devices_of(spec))},
        mounts=[
            {"name": "dshm", "mountPath": "/dev/shm"},  # noqa: S108 - where NCCL and data loaders share memory
            *pod.cache_mounts(claims, spec, read_only=True),
        ],
    )
    spec_of_pod = pod.pod_spec(
        settings,
        [train],
        pod.volumes(observed, settings, [shared_memory, *pod.claim_volumes(claims)]),
        node_selector=training.node_selector,
        grace_seconds=training.termination_grace_period_seconds,
    )
    if training.tolerations:
        spec_of_pod["tolerations"] = [toleration.wire() for toleration in training.tolerations]
    if training.priority_class_name:
        spec_of_pod["priorityClassName"] = training.priority_class_name
    return pod.job_manifest(observed, settings, STAGE, attempt, spec_of_pod, indexed=True)


def outcome(observed: Observed, child: Object | None, number: int, pods: tuple[Object, ...]) -> Outcome:
    """How the attempt goes."""
    return judge(observed, STAGE, STEPS, child, number, pods)
