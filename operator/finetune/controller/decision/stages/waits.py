"""Why a pod does not run yet, in the words of whoever knows: scheduler, kubelet, image registry, volume plugin."""

from __future__ import annotations

import re
from datetime import datetime

from finetune.controller.decision.observed import Object, Observed, container_statuses, moment

_ORDINARY = ("ContainerCreating", "PodInitializing")
_MISSING_CLAIM = re.compile(r'persistentvolumeclaim "([^"]+)" not found')
LOST_AFTER_SECONDS = 60

_HINTS = {
    "ImagePullBackOff": "check the operator's image settings and imagePullSecrets",
    "ErrImagePull": "check the operator's image settings and imagePullSecrets",
    "InvalidImageName": "check the operator's image settings",
    "CreateContainerConfigError": "create what is missing; the pod goes on by itself",
}


def waits_for(observed: Observed, pod: Object) -> str:
    """The sentence for status.message; empty when the pod runs, or starts without trouble."""
    return _unscheduled(pod) or _stuck_container(pod) or _stuck_volume(observed, pod)


def lost(pod: Object, now: datetime) -> str:
    """The sentence for a pod that was told to stop and does not; empty when it still has time."""
    deadline = pod["metadata"].get("deletionTimestamp")
    if deadline is None or (now - moment(deadline)).total_seconds() < LOST_AFTER_SECONDS:
        return ""
    name, node = pod["metadata"]["name"], (pod.get("spec") or {}).get("nodeName", "?")
    return (
        f"pod {name} was told to stop but node {node} does not confirm it, so nothing new may start; when that machine "
        f"is certainly off: kubectl delete pod {name} --force (or taint the node node.kubernetes.io/out-of-service)"
    )


def _unscheduled(pod: Object) -> str:
    for condition in (pod.get("status") or {}).get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            said = str(condition.get("message", ""))
            if missing := _MISSING_CLAIM.search(said):
                return f"waits for the claim {missing[1]}, which does not exist: create it and the job goes on ({said})"
            return f"{condition.get('reason', 'Unschedulable')}: {said}"
    return ""


def _stuck_container(pod: Object) -> str:
    for container in container_statuses(pod):
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason = waiting.get("reason")
        if reason and reason not in _ORDINARY:
            hint = f"; {_HINTS[reason]}" if reason in _HINTS else ""
            return f"container {container['name']}: {reason}: {waiting.get('message', '')}{hint}"
    return ""


def _stuck_volume(observed: Observed, pod: Object) -> str:
    begun = any("waiting" not in (container.get("state") or {"waiting": {}}) for container in container_statuses(pod))
    warned = observed.warning(pod, "Pod")
    if begun or warned is None or not warned.reason.startswith(("Failed", "InvalidDiskCapacity")):
        return ""
    if warned.reason == "FailedScheduling":
        return ""
    return f"{warned.reason}: {warned.message}"
