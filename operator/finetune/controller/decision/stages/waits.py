"""Why a pod does not run yet, in the words of whoever knows: scheduler, kubelet, image registry, volume plugin."""

from __future__ import annotations

import re
from datetime import timedelta

from finetune.controller.decision.observed import Object, Observed, condition_of, container_statuses

_ORDINARY = ("ContainerCreating", "PodInitializing")
_MISSING_CLAIM = re.compile(r'persistentvolumeclaim "([^"]+)" not found')
LOST_AFTER = timedelta(minutes=1)
"""So long after a pod should have stopped its machine counts as lost."""

FORCED_AFTER = timedelta(minutes=5)
"""So long after a pod should have stopped it is removed by force, where job and administrator allow it."""

NOT_ALLOWED = (
    "spec.training.onNodeLost is ForceDelete, but this operator may not: its administrator allows it with the chart's "
    "value nodeLost.forceDelete"
)
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
MANAGER = "finetune-operator"
"""What the API server calls this operator where it says who wrote a field."""

_HINTS = {
    "ImagePullBackOff": "check the operator's image settings and imagePullSecrets",
    "ErrImagePull": "check the operator's image settings and imagePullSecrets",
    "InvalidImageName": "check the operator's image settings",
    "CreateContainerConfigError": "create what is missing; the pod goes on by itself",
}


def waits_for(observed: Observed, pod: Object) -> str:
    """The sentence for status.message; empty when the pod runs, or starts without trouble."""
    return _unscheduled(pod) or _stuck_container(pod) or _stuck_volume(observed, pod)


def lost(pod: Object) -> str:
    """The sentence for a pod whose machine did not confirm within LOST_AFTER that it stopped.

    Deleting it by force is no remedy: the Job's tracking finalizer keeps it, because the Job controller waits for a
    phase Failed that only the kubelet, or whoever knows the machine to be off, may write.
    """
    node = node_of(pod)
    return (
        f"NodeLost: pod {pod['metadata']['name']} was told to stop, but node {node} does not confirm it, so nothing "
        f"new may start; when that machine is certainly off: kubectl taint nodes {node} "
        "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute (and remove the taint when it is back)"
    )


def unreachable(pod: Object) -> bool:
    """Whether Kubernetes itself says that the pod's machine does not answer: it evicted the pod for that, or set Ready
    to False while the kubelet's last word is that all containers are ready."""
    disrupted = condition_of(pod, "DisruptionTarget")
    ready = condition_of(pod, "ContainersReady") and not condition_of(pod, "Ready")
    return bool(ready or (disrupted and disrupted.get("reason") == "DeletionByTaintManager"))


def node_of(pod: Object) -> str:
    return str((pod.get("spec") or {}).get("nodeName", "?"))


def held(child: Object) -> str:
    """The sentence for a Job that was suspended by somebody else, who alone may resume it."""
    name = child["metadata"]["name"]
    queue = (child["metadata"].get("labels") or {}).get(QUEUE_LABEL)
    manager = child.get("suspendedBy")
    if queue:
        by = f"the queue {queue} (Kueue)"
    elif manager == MANAGER:  # a webhook's changes count as those of whoever sent the request
        by = "whoever changes new Jobs at admission"
    else:
        by = manager or "somebody else"
    return f"held by {by}: the Job {name} was suspended, not by this operator, and goes on when it is resumed there"


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
