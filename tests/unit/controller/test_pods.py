"""What the pods of a job may and may not do."""

from __future__ import annotations

import json

import pytest

from finetune.api.contract import CA_ANNOTATION, JOB_ANNOTATION, OPERATOR_LABEL, StepJob
from finetune.controller.cluster.resources import watched
from finetune.controller.decision.observed import Observed
from finetune.controller.decision.stages import pod, prepare, save, train, workspace
from tests.builders import FineTuneJob

SETTINGS = pod.PodSettings(
    steps_image="steps:1",
    train_image="train:1",
    image_pull_secrets=("registry",),
    hf_endpoint="http://hub",
    progress_url="https://operator:8443/",
    progress_ca="-----BEGIN CERTIFICATE-----",
)
STAGES = (prepare, train, save)


def observed(job: FineTuneJob | None = None) -> Observed:
    return Observed(job=(job or FineTuneJob()).build())


def pod_of(stage, job: FineTuneJob | None = None) -> dict:
    return stage.manifest(observed(job), SETTINGS, 1)["spec"]["template"]["spec"]


def containers(spec: dict) -> dict[str, dict]:
    return {item["name"]: item for item in (*spec.get("initContainers", ()), *spec["containers"])}


def env(container: dict) -> dict[str, str]:
    return {item["name"]: item["value"] for item in container.get("env", ())}


def mounts(container: dict) -> dict[str, bool]:
    return {item["mountPath"]: item.get("readOnly", False) for item in container["volumeMounts"]}


@pytest.mark.parametrize("stage", STAGES)
def test_every_pod_keeps_the_restricted_profile(stage):
    spec = pod_of(stage)
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    for container in containers(spec).values():
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("stage", STAGES)
def test_every_attempt_is_a_job_that_never_retries_by_itself(stage):
    job = stage.manifest(observed(), SETTINGS, 3)
    assert job["metadata"]["name"] == f"tune-{stage.STAGE}-3"
    assert job["spec"]["backoffLimit"] == 0
    assert job["spec"]["podReplacementPolicy"] == "Failed"
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    assert [rule["action"] for rule in job["spec"]["podFailurePolicy"]["rules"]] == ["FailJob"] * 3
    (owner,) = job["metadata"]["ownerReferences"]
    assert owner["controller"]
    assert "blockOwnerDeletion" not in owner


@pytest.mark.parametrize("stage", STAGES)
def test_every_pod_reads_the_resolved_job(stage):
    annotations = stage.manifest(observed(), SETTINGS, 2)["spec"]["template"]["metadata"]["annotations"]
    job = StepJob.model_validate_json(annotations[JOB_ANNOTATION])
    assert (job.name, job.namespace, job.uid, job.attempt) == ("tune", "team", "job-1", 2)
    assert annotations[CA_ANNOTATION] == SETTINGS.progress_ca


def test_the_prepare_pod_runs_its_steps_in_order():
    spec = pod_of(prepare)
    assert [item["name"] for item in spec["initContainers"]] == ["download-model", "add-tokens", "reload-model"]
    assert [item["image"] for item in spec["initContainers"]] == ["steps:1", "train:1", "train:1"]
    assert [item["name"] for item in spec["containers"]] == ["load-dataset"]
    assert "add-tokens" not in containers(pod_of(prepare, FineTuneJob().with_spec(tokens=None)))


def test_only_containers_that_talk_to_stores_see_credentials():
    job = FineTuneJob().with_spec(credentials=[{"secretName": "token"}])
    found = {}
    for stage in STAGES:
        found |= {name: "envFrom" in item for name, item in containers(pod_of(stage, job)).items()}
    assert {name for name, sees in found.items() if sees} == {"download-model", "load-dataset", "save-model"}


def test_claims_are_read_only_but_for_the_output_of_the_saving_pod():
    job = FineTuneJob().with_spec(
        model={"uri": "pvc://models/base"},
        dataset={
            "sources": [{"uri": "pvc://data/rows.jsonl"}, {"uri": "pvc://more"}],
            "validation": {"source": {"uri": "pvc://held-out/rows.jsonl"}},
        },
        output={"uri": "pvc://models/out"},
    )
    steps = containers(pod_of(prepare, job))
    assert mounts(steps["download-model"])["/claims/models"] is True
    assert "/claims/data" not in mounts(steps["download-model"])
    for claim in ("data", "more", "held-out"):
        assert mounts(steps["load-dataset"])[f"/claims/{claim}"] is True
    assert mounts(containers(pod_of(save, job))["save-model"])["/claims/models"] is False
    assert not any(path.startswith("/claims") for path in mounts(containers(pod_of(train, job))["train"]))


def test_a_missing_output_claim_holds_up_the_prepare_pod_before_any_gpu_is_spent():
    job = FineTuneJob().with_spec(output={"uri": "pvc://later/out"})
    claims = [volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod_of(prepare, job)["volumes"]]
    assert "later" in claims


CACHED = FineTuneJob().with_spec(cache={"claimName": "shared"}, output={"uri": "pvc://shared/out"})


def test_every_container_sees_the_cache_at_one_place_and_only_those_that_fill_it_may_write():
    found = {}
    for stage in STAGES:
        spec = pod_of(stage, CACHED)
        claims = [volume.get("persistentVolumeClaim", {}).get("claimName") for volume in spec["volumes"]]
        assert claims.count("shared") == 1
        found |= containers(spec)
    assert all("/cache" in mounts(item) for item in found.values())
    assert {name for name, item in found.items() if not mounts(item)["/cache"]} == {"download-model", "add-tokens"}
    assert {name for name, item in found.items() if "FINETUNE_CACHE" in env(item)} == {"download-model", "add-tokens"}
    assert mounts(found["save-model"])["/claims/shared"] is False


def test_without_a_cache_nothing_of_it_is_in_the_pods():
    for stage in STAGES:
        assert not any("/cache" in mounts(item) for item in containers(pod_of(stage)).values())


def test_tokens_of_a_configmap_are_mounted_where_the_steps_look():
    job = FineTuneJob().with_spec(tokens={"addFrom": {"configMap": {"name": "terms", "key": "terms.jsonl"}}})
    spec = pod_of(prepare, job)
    (volume,) = [item for item in spec["volumes"] if "configMap" in item]
    assert volume["configMap"] == {"name": "terms", "items": [{"key": "terms.jsonl", "path": "tokens"}]}
    assert mounts(containers(spec)["add-tokens"])["/etc/finetune-tokens"] is True


def test_a_chat_template_of_a_configmap_is_mounted_where_the_download_looks():
    template = {"configMap": {"name": "templates", "key": "qwen.jinja"}}
    job = FineTuneJob().with_spec(model={"uri": "hf://a/b", "chatTemplate": template})
    spec = pod_of(prepare, job)
    (volume,) = [item for item in spec["volumes"] if "configMap" in item]
    items = [{"key": "qwen.jinja", "path": "chat_template.jinja"}]
    assert volume["configMap"] == {"name": "templates", "items": items}
    assert mounts(containers(spec)["download-model"])["/etc/finetune-chat-template"] is True


def test_tokens_of_a_claim_are_mounted_in_the_container_that_reads_them():
    spec = pod_of(prepare, FineTuneJob().with_spec(tokens={"addFrom": {"uri": "pvc://corpus/terms.txt"}}))
    assert mounts(containers(spec)["add-tokens"])["/claims/corpus"] is True
    assert not any("configMap" in item for item in spec["volumes"])
    assert [item["persistentVolumeClaim"]["claimName"] for item in spec["volumes"] if item["name"] == "claim-0"] == [
        "corpus"
    ]


def test_a_corpus_to_learn_from_is_read_by_add_tokens_with_the_credentials_of_stores():
    corpora = {"source": {"uri": "pvc://corpus/poems"}, "protect": {"uri": "hf://datasets/some/text"}}
    job = FineTuneJob().with_spec(tokens={"learn": {**corpora, "size": 10}}, credentials=[{"secretName": "token"}])
    spec = pod_of(prepare, job)
    add_tokens = containers(spec)["add-tokens"]
    assert mounts(add_tokens)["/claims/corpus"] is True
    assert "corpus" in [item.get("persistentVolumeClaim", {}).get("claimName") for item in spec["volumes"]]
    assert add_tokens["envFrom"] == [{"secretRef": {"name": "token"}}]
    assert "/claims/corpus" not in mounts(containers(spec)["load-dataset"])


def test_the_training_pod_gets_what_the_spec_asks_for():
    job = FineTuneJob().training(
        resources={"limits": {"nvidia.com/gpu": "2", "cpu": "8", "memory": "64Gi"}, "requests": {"cpu": "4"}},
        batchSize=2,
        nodeSelector={"gpu": "h100"},
        tolerations=[{"key": "gpu", "operator": "Exists"}],
        priorityClassName="low",
        terminationGracePeriodSeconds=77,
    )
    spec = pod_of(train, job)
    container = containers(spec)["train"]
    assert container["resources"]["requests"] == {"nvidia.com/gpu": "2", "cpu": "4", "memory": "64Gi"}
    assert spec["nodeSelector"] == {"gpu": "h100"}
    assert spec["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert (spec["priorityClassName"], spec["terminationGracePeriodSeconds"]) == ("low", 77)
    assert env(container)["FINETUNE_DEVICES"] == "2"
    assert "/dev/shm" in mounts(container)


def test_every_container_reports_progress_with_a_token_for_nothing_else():
    for stage in STAGES:
        spec = pod_of(stage)
        (volume,) = [item for item in spec["volumes"] if "projected" in item]
        _, token = volume["projected"]["sources"]
        assert token["serviceAccountToken"]["audience"] == "finetune.dev"
        for container in containers(spec).values():
            assert env(container)["KUBEFLOW_TRAINER_SERVER_URL"] == SETTINGS.progress_url


def test_without_a_progress_service_nothing_of_it_is_in_the_pods():
    settings = pod.PodSettings(steps_image="s", train_image="t")
    text = json.dumps(train.manifest(observed(), settings, 1))
    assert "KUBEFLOW" not in text
    assert "serviceAccountToken" not in text


def test_the_hubs_mirror_is_known_to_those_who_download():
    steps = containers(pod_of(prepare))
    assert env(steps["download-model"])["HF_ENDPOINT"] == "http://hub"
    assert "HF_ENDPOINT" not in env(steps["reload-model"])


def test_children_of_a_job_for_another_operator_are_left_to_that_one():
    job = FineTuneJob().build()
    job["metadata"]["labels"] = {OPERATOR_LABEL: "canary"}
    child = train.manifest(Observed(job=job), SETTINGS, 1)
    assert child["metadata"]["labels"][OPERATOR_LABEL] == "canary"
    assert [item.selector for item in watched("canary")] == [
        "finetune.dev/operator=canary",
        *["finetune.dev/job-name,finetune.dev/operator=canary"] * 3,
    ]
    assert watched("")[0].selector == "!finetune.dev/operator"


def test_the_workspace_is_what_the_spec_says():
    job = FineTuneJob().with_spec(
        workspace={"size": "5Gi", "storageClassName": "fast", "accessModes": ["ReadWriteMany"]}
    )
    spec = workspace.manifest(observed(job))["spec"]
    assert spec == {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": "5Gi"}},
        "storageClassName": "fast",
    }


def several(nodes: int = 2, **training) -> FineTuneJob:
    workspace = {"accessModes": ["ReadWriteMany"]}
    return FineTuneJob().training(nodes=nodes, batchSize=nodes, **training).with_spec(workspace=workspace)


def test_several_pods_are_one_indexed_job_and_meet_at_the_first():
    job = train.manifest(observed(several(3)), SETTINGS, 2)
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (3, 3)
    assert job["spec"]["completionMode"] == "Indexed"
    spec = job["spec"]["template"]["spec"]
    service = train.service(observed(several(3)))
    assert spec["subdomain"] == service["metadata"]["name"] == "tune-train"
    variables = env(containers(spec)["train"])
    assert variables["FINETUNE_NODES"] == "3"
    assert variables["FINETUNE_RENDEZVOUS"] == "tune-train-2-0.tune-train:29400"


def test_the_service_is_headless_owned_and_answers_for_pods_that_are_not_ready():
    service = train.service(observed(several()))
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    (owner,) = service["metadata"]["ownerReferences"]
    assert owner["uid"] == "job-1"
    labels = train.manifest(observed(several()), SETTINGS, 1)["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()


def test_a_single_pod_needs_no_service():
    assert train.service(observed()) is None
    assert "subdomain" not in pod_of(train)
    assert "FINETUNE_RENDEZVOUS" not in env(containers(pod_of(train))["train"])


def test_your_own_trainer_is_told_where_everything_is():
    own = {
        "image": "mine:1",
        "command": ["python", "/scripts/train.py"],
        "scripts": {"configMap": "mine"},
        "env": [{"name": "EXTRA", "value": "1"}],
    }
    spec = pod_of(train, FineTuneJob().training(container=own))
    container = containers(spec)["train"]
    assert (container["image"], container["command"]) == ("mine:1", ["python", "/scripts/train.py"])
    assert env(container) == {
        "KUBEFLOW_TRAINER_SERVER_URL": SETTINGS.progress_url,
        "KUBEFLOW_TRAINER_SERVER_CA_CERT": "/etc/finetune/progress-ca.crt",
        "KUBEFLOW_TRAINER_SERVER_TOKEN": "/etc/finetune/token",
        "FINETUNE_DEVICES": "1",
        "FINETUNE_JOB": "/etc/finetune/job.json",
        "FINETUNE_WORKSPACE": "/workspace",
        "FINETUNE_MODEL": "/workspace/prepared",
        "FINETUNE_DATASET": "/workspace/dataset/train",
        "FINETUNE_CHECKPOINTS": "/workspace/checkpoints",
        "FINETUNE_OUTPUT": "/workspace/trained",
        "FINETUNE_REPORT": "/dev/termination-log",
        "PET_NPROC_PER_NODE": "1",
        "PET_NNODES": "1",
        "EXTRA": "1",
    }
    assert mounts(container)["/scripts"] is True
    (volume,) = [item for item in spec["volumes"] if item["name"] == "scripts"]
    assert volume["configMap"] == {"name": "mine"}


def test_your_own_trainer_runs_under_the_same_profile_without_credentials():
    job = FineTuneJob().training(container={"image": "mine:1"}).with_spec(credentials=[{"secretName": "token"}])
    container = containers(pod_of(train, job))["train"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert "command" not in container
    assert "envFrom" not in container


def test_without_an_image_your_command_runs_in_the_operators_training_image():
    container = containers(pod_of(train, FineTuneJob().training(container={"command": ["python", "-c", "1"]})))["train"]
    assert container["image"] == SETTINGS.train_image


def test_torchrun_in_your_own_image_spans_all_pods_without_an_argument():
    own = {"image": "mine:1", "command": ["torchrun", "train.py"]}
    job = several(2, container=own, resources={"limits": {"nvidia.com/gpu": "2"}})
    variables = {item["name"]: item for item in containers(pod_of(train, job))["train"]["env"]}
    assert variables["PET_NPROC_PER_NODE"]["value"] == variables["PET_NNODES"]["value"] == "2"
    assert variables["PET_MASTER_ADDR"]["value"] == "tune-train-1-0.tune-train"
    assert variables["PET_MASTER_PORT"]["value"] == "29400"
    path = variables["PET_NODE_RANK"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.labels['batch.kubernetes.io/job-completion-index']"
