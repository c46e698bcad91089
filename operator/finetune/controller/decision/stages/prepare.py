"""Prepare: one CPU pod downloads the model, adds the tokens, proves the result and loads the dataset.

Every claim that the job will need is mounted here already, the output's too: a claim that does not exist keeps this
pod waiting, in the scheduler's words, before any GPU was spent.
"""

from __future__ import annotations

from typing import Any

from finetune.api.contract import Layout, Step, claims_of
from finetune.api.spec import ConfigMapKey
from finetune.controller.decision.observed import Object, Observed
from finetune.controller.decision.stages import pod
from finetune.controller.decision.stages.attempt import Outcome, judge

STAGE = "prepare"
LEARNING = {"TOKENIZERS_PARALLELISM": "true"}
"""The images switch it off. Learning a vocabulary is the tokenizers library's work, and nothing forks after it."""

STEPS: tuple[Step, ...] = (Step.DOWNLOAD, Step.ADD_TOKENS, Step.RELOAD, Step.LOAD_DATASET)


def manifest(observed: Observed, settings: pod.PodSettings, attempt: int) -> dict[str, Any]:
    """The Job of one attempt."""
    spec = observed.spec
    resources = spec.prepare.resources
    secrets = [credential.secret_name for credential in spec.credentials or ()]
    model, dataset = claims_of(spec.model.uri), claims_of(*spec.dataset.uris)
    source = spec.tokens.add_from if spec.tokens else None
    learn = spec.tokens.learn if spec.tokens else None
    tokens = claims_of(source.uri if source else None, *(learn.uris if learn else ()))
    output = claims_of(spec.output.uri if spec.output else None)
    claims = tuple(dict.fromkeys((*model, *dataset, *tokens, *output, *pod.cache_claims(spec))))
    hub, cache = pod.hub_environment(settings), pod.cache_environment(spec)
    fill_cache, read_cache = (pod.cache_mounts(claims, spec, read_only=read_only) for read_only in (False, True))
    further = pod.claim_volumes(claims)

    def mount(wanted: ConfigMapKey, name: str, file: str, mounts: list[dict[str, Any]]) -> None:
        folder, _, path = file.rpartition("/")
        items = [{"key": wanted.key, "path": path}]
        further.append({"name": name, "configMap": {"name": wanted.name, "items": items}})
        mounts.append({"name": name, "mountPath": folder, "readOnly": True})

    model_mounts = [*pod.claim_mounts(claims, model, read_only=True), *fill_cache]
    if spec.model.chat_template and spec.model.chat_template.config_map:
        mount(spec.model.chat_template.config_map, "chat-template", str(Layout().chat_template_file), model_mounts)
    init = [
        pod.container(
            settings,
            Step.DOWNLOAD,
            resources=resources,
            env={**hub, **cache},
            credentials=secrets,
            mounts=model_mounts,
        )
    ]
    if spec.tokens:
        mounts = [*pod.claim_mounts(claims, tokens, read_only=True), *fill_cache]
        if source and source.config_map:
            mount(source.config_map, "tokens", str(Layout().tokens_file), mounts)
        # Its own image knows the usual architectures; transformers, whose image reload needs anyway, knows the others.
        init.append(
            pod.container(
                settings,
                Step.ADD_TOKENS,
                training_image=True,
                resources=resources,
                env={**cache, **({**hub, **LEARNING} if learn else {})},
                credentials=secrets if learn else (),
                mounts=mounts,
            )
        )
    init.append(pod.container(settings, Step.RELOAD, training_image=True, resources=resources, mounts=read_cache))
    load = pod.container(
        settings,
        Step.LOAD_DATASET,
        resources=resources,
        env=hub,
        credentials=secrets,
        mounts=[*pod.claim_mounts(claims, dataset, read_only=True), *read_cache],
    )
    spec_of_pod = pod.pod_spec(
        settings,
        [load],
        pod.volumes(observed, settings, further),
        init_containers=init,
        node_selector=spec.prepare.node_selector,
    )
    return pod.job_manifest(observed, settings, STAGE, attempt, spec_of_pod)


def outcome(observed: Observed, child: Object | None, number: int, pods: tuple[Object, ...]) -> Outcome:
    """How the attempt goes."""
    steps = tuple(step for step in STEPS if step != Step.ADD_TOKENS or observed.spec.tokens)
    return judge(observed, STAGE, steps, child, number, pods)
