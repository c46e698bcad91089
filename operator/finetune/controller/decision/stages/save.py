"""Save: one CPU pod publishes the trained model at the place that the job names, or leaves it in the workspace."""

from __future__ import annotations

from typing import Any

from finetune.api.contract import Step, claims_of
from finetune.controller.decision.observed import Object, Observed
from finetune.controller.decision.stages import pod
from finetune.controller.decision.stages.attempt import Outcome, judge

STAGE = "save"
STEPS: tuple[Step, ...] = (Step.SAVE,)


def manifest(observed: Observed, settings: pod.PodSettings, attempt: int) -> dict[str, Any]:
    """The Job of one attempt."""
    spec = observed.spec
    output = claims_of(spec.output.uri if spec.output else None)
    claims = tuple(dict.fromkeys((*output, *pod.cache_claims(spec))))
    save = pod.container(
        settings,
        Step.SAVE,
        training_image=True,
        resources=spec.prepare.resources,
        env=pod.hub_environment(settings),
        credentials=[credential.secret_name for credential in spec.credentials or ()],
        mounts=[
            *pod.claim_mounts(claims, output, read_only=False),
            *pod.cache_mounts(claims, spec, read_only=True),
        ],
    )
    spec_of_pod = pod.pod_spec(
        settings,
        [save],
        pod.volumes(observed, settings, pod.claim_volumes(claims)),
        node_selector=spec.prepare.node_selector,
    )
    return pod.job_manifest(observed, settings, STAGE, attempt, spec_of_pod)


def outcome(observed: Observed, child: Object | None, number: int, pods: tuple[Object, ...]) -> Outcome:
    """How the attempt goes."""
    return judge(observed, STAGE, STEPS, child, number, pods)
