"""Containers in our pods that are not ours: meshes and log shippers that an admission webhook injects."""

from __future__ import annotations

from finetune.api.contract import CONTAINERS
from finetune.controller.decision.observed import Object, terminal
from finetune.controller.decision.stages.attempt import Outcome, State


def holding_up(outcome: Outcome, pods: tuple[Object, ...]) -> str:
    """The sentence for an attempt whose steps have ended while its pods have not, because of others' containers.

    Native sidecars are not meant: the kubelet ends them with the pod.
    """
    if not all(state.state in (State.DONE, State.FAILED) for state in outcome.steps[-1:]):
        return ""
    for item in pods:
        for container in (item.get("status") or {}).get("containerStatuses") or ():
            if not terminal(item) and container["name"] not in _OURS and "running" in (container.get("state") or {}):
                return (
                    f"the step has ended, and the pod {item['metadata']['name']} will when the container "
                    f"{container['name']} does, which is not this operator's and still runs: have it injected as a "
                    "native sidecar, or not at all"
                )
    return ""


_OURS = frozenset(CONTAINERS.values())
