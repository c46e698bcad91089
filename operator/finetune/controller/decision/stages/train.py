"""Train: the pods that hold the GPUs. They see no credentials.

Several pods are one Indexed Job: one end for all of them. They find each other through a headless Service, which
answers for pods that are not ready yet; the one of index 0 is where the others go.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.api.contract import (
    DEVICES,
    JOB_UID_LABEL,
    NODES,
    RENDEZVOUS,
    RENDEZVOUS_PORT,
    STAGE_LABEL,
    Layout,
    Step,
    foreign_environment,
)
from finetune.api.spec import TrainerContainer, Training
from finetune.controller.decision.observed import Object, Observed, child_name
from finetune.controller.decision.stages import pod
from finetune.controller.decision.stages.attempt import Outcome, judge

STAGE = "train"
STEPS: tuple[Step, ...] = (Step.TRAIN,)
SCRIPTS = "/scripts"
INDEX = "metadata.labels['batch.kubernetes.io/job-completion-index']"


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
        env=_environment(observed, attempt),
        mounts=[
            {"name": "dshm", "mountPath": "/dev/shm"},  # noqa: S108 - where NCCL and data loaders share memory
            *pod.cache_mounts(claims, spec, read_only=True),
        ],
    )
    volumes = pod.volumes(observed, settings, [shared_memory, *pod.claim_volumes(claims)])
    if training.container:
        _make_foreign(train, volumes, training.container, observed)
    spec_of_pod = pod.pod_spec(
        settings,
        [train],
        volumes,
        node_selector=training.node_selector,
        grace_seconds=training.termination_grace_period_seconds,
    )
    if training.tolerations:
        spec_of_pod["tolerations"] = [toleration.wire() for toleration in training.tolerations]
    if training.priority_class_name:
        spec_of_pod["priorityClassName"] = training.priority_class_name
    if training.nodes > 1:
        spec_of_pod["subdomain"] = service_name(observed)
    return pod.job_manifest(observed, settings, STAGE, attempt, spec_of_pod, pods=training.nodes)


def service(observed: Observed) -> dict[str, Any] | None:
    """The headless Service that gives the pods of all attempts their names; None for a single pod."""
    if observed.spec.training.nodes == 1:
        return None
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": service_name(observed),
            "namespace": observed.namespace,
            "labels": pod.labels(observed, STAGE),
            "ownerReferences": pod.owned_by(observed),
        },
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # they meet before they are ready
            "selector": {JOB_UID_LABEL: observed.uid, STAGE_LABEL: STAGE},
        },
    }


def service_name(observed: Observed) -> str:
    return f"{observed.name}-{STAGE}"


def outcome(observed: Observed, child: Object | None, number: int, pods: tuple[Object, ...]) -> Outcome:
    """How the attempt goes."""
    return judge(observed, STAGE, STEPS, child, number, pods, expected=observed.spec.training.nodes)


def _environment(observed: Observed, attempt: int) -> dict[str, str]:
    training = observed.spec.training
    found = {DEVICES: str(training.devices)}
    if training.nodes > 1:
        first = f"{child_name(observed.name, STAGE, attempt)}-0.{service_name(observed)}"
        found |= {NODES: str(training.nodes), RENDEZVOUS: f"{first}:{RENDEZVOUS_PORT}"}
    return found


def _torchrun(training: Training, variables: Mapping[str, str]) -> dict[str, str]:
    """torchrun's own defaults (PET_*, as Kubeflow's trainer sets them), so that `torchrun train.py` spans all pods."""
    found = {"PET_NPROC_PER_NODE": str(training.devices), "PET_NNODES": str(training.nodes)}
    if training.nodes > 1:
        host, _, port = variables[RENDEZVOUS].rpartition(":")
        found |= {"PET_MASTER_ADDR": host, "PET_MASTER_PORT": port}
    return found


def _make_foreign(
    container: dict[str, Any], volumes: list[dict[str, Any]], wanted: TrainerContainer, observed: Observed
) -> None:
    """Have the container run what the user brings, and tell it in its environment where everything is."""
    if wanted.image:
        container["image"] = wanted.image
    container.pop("command")
    if wanted.command:
        container["command"] = list(wanted.command)
    variables = {item["name"]: item["value"] for item in container["env"]}
    variables |= foreign_environment(observed.spec, Layout()) | _torchrun(observed.spec.training, variables)
    variables |= {item.name: item.value for item in wanted.env or ()}
    container["env"] = [{"name": name, "value": value} for name, value in variables.items()]
    if observed.spec.training.nodes > 1:
        container["env"].append({"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": INDEX}}})
    if wanted.scripts:
        volumes.append({"name": "scripts", "configMap": {"name": wanted.scripts.config_map}})
        container["volumeMounts"].append({"name": "scripts", "mountPath": SCRIPTS, "readOnly": True})
