"""The FineTuneJob spec as a whole, and the fields that are not about tokens, data or training."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field

from finetune.api.schema import (
    NO_DATASET,
    NO_PARENT,
    Model,
    ModelUri,
    Name,
    OutputUri,
    Quantity,
    Revision,
    keyed_by,
    rules,
)
from finetune.api.spec.dataset import Dataset
from finetune.api.spec.tokens import ConfigMapKey, Tokens
from finetune.api.spec.training import Resources, Training


class ChatTemplate(Model):
    """A chat template in the place of the model's own."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("has(self.text) != has(self.configMap)", "chatTemplate takes exactly one of text and configMap")
        )
    )

    text: str | None = Field(None, description="The Jinja template.", min_length=1, max_length=65_536)
    config_map: ConfigMapKey | None = Field(None, description="A ConfigMap's key that holds it.")


class ModelSource(Model):
    """The base model."""

    uri: ModelUri = Field(
        description="Where the base model lies: hf://ORGANISATION/NAME, pvc://CLAIM/PATH, s3://, gs:// or az://.",
        json_schema_extra=rules(NO_PARENT, NO_DATASET),
        examples=["hf://meta-llama/Llama-3.2-1B-Instruct"],
    )
    revision: Revision = Field(
        "main", description="Branch, tag or commit of an hf:// model; resolved to a commit, which status records."
    )
    chat_template: ChatTemplate | None = Field(
        None,
        description="A chat template to use in the place of the model's own, for the data and for samples; it is "
        "published with the model.",
    )


class Credential(Model):
    """A Secret whose keys become environment variables of the pods that talk to stores, never of training."""

    secret_name: Name = Field(
        description="A Secret of this namespace, for example with HF_TOKEN or AWS_ACCESS_KEY_ID as keys."
    )


class Prepare(Model):
    """The CPU pods that prepare model and dataset, and that save the result."""

    resources: Resources = Field(
        default_factory=Resources,
        description="Resources of each of their containers.",
        json_schema_extra={"default": {}},
    )
    node_selector: dict[str, Annotated[str, Field(max_length=63)]] | None = Field(
        None, description="Labels of the nodes that may run them.", json_schema_extra={"maxProperties": 32}
    )


class AccessMode(StrEnum):
    READ_WRITE_ONCE = "ReadWriteOnce"
    READ_WRITE_MANY = "ReadWriteMany"
    READ_WRITE_ONCE_POD = "ReadWriteOncePod"


class Retain(StrEnum):
    ON_FAILURE = "OnFailure"
    ALWAYS = "Always"
    NEVER = "Never"


class Workspace(Model):
    """The volume that carries the job from step to step."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.claimName) || !has(self.storageClassName)",
                "workspace.claimName names a claim that exists; storageClassName is for a new one",
            )
        )
    )

    claim_name: Name | None = Field(None, description="Use this claim instead of creating one for the job.")
    size: Quantity = Field("20Gi", description="Size of the claim that is created.")
    storage_class_name: Name | None = Field(None, description="Its storage class; the cluster's default when absent.")
    access_modes: list[AccessMode] = Field(
        default=[AccessMode.READ_WRITE_ONCE],
        description="Its access modes. Several training pods (training.nodes) need ReadWriteMany, on a storage class "
        "that really shares: a volume of one node only keeps all pods on that node.",
        min_length=1,
        max_length=3,
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    retain: Retain = Field(
        Retain.ON_FAILURE,
        description="When the claim that was created outlives its job. OnFailure: once the job has failed, deleting it "
        "leaves the claim, and with it all checkpoints; a job that is deleted while it runs or is suspended takes its "
        "claim along. Always: in any case. Never: in none. A kept claim has the label finetune.dev/kept and says in "
        "the annotation finetune.dev/kept-from whose it was; another job goes on from it by naming it in claimName.",
    )


class Cache(Model):
    """A claim shared by jobs: a second one with the same base model, or the same tokens too, finds it done."""

    claim_name: Name = Field(
        description="A claim of this namespace, ReadWriteMany if jobs run on several nodes. All jobs that name it "
        "trust each other: entries are keyed by digests of what they are made from, and a model that one job could "
        "download all others can use. Weights are read in place, so the claim must stay for as long as the job."
    )


class OutputFormat(StrEnum):
    MERGED = "Merged"
    ADAPTER = "Adapter"


class Output(Model):
    """Where the trained model goes."""

    uri: OutputUri = Field(
        description="pvc://CLAIM/PATH, hf://ORGANISATION/NAME, s3://, gs:// or az://. The path is created.",
        json_schema_extra=rules(NO_PARENT, NO_DATASET),
    )
    format: OutputFormat = Field(OutputFormat.MERGED, description="A whole model, or only what LoRA added.")


class Retry(Model):
    """What is tolerated before a job counts as failed."""

    limit: int = Field(
        3, description="Failures in a row without a new checkpoint. Preemptions are not failures.", ge=0, le=100
    )
    preemption_limit: int | None = Field(
        None,
        description="The job fails after more preemptions than this, since its start or the last retry; never when "
        "absent.",
        ge=0,
        le=10_000,
    )
    at: str | None = Field(
        None,
        description="Changed to any other text (a time, for example), it starts a Failed job's stage again, with a "
        "budget and deadlines that begin anew, and ends the pause before the next attempt of one that runs. "
        "`kubectl finetune retry NAME` does so.",
        min_length=1,
        max_length=64,
    )


class Layout(StrEnum):
    STAGED = "Staged"
    SINGLE_POD = "SinglePod"


class FineTuneJobSpec(Model):
    """What to fine-tune, on what, how, and where the result goes."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "self.training.nodes == 1 || (has(self.workspace.claimName) || "
                "'ReadWriteMany' in self.workspace.accessModes)",
                "training.nodes above 1 needs workspace.accessModes: [ReadWriteMany] (or a claimName of such a volume)",
            ),
            (
                "!has(self.ttlSecondsAfterFinished) || has(self.output)",
                "ttlSecondsAfterFinished would delete the result, which without an output lies in the job's own "
                "volume: set output.uri",
            ),
            (
                "self.layout == 'Staged' || self.training.nodes == 1",
                "layout SinglePod runs in one pod: training.nodes must be 1",
            ),
            (
                "!has(self.output) || self.output.format != 'Adapter' || self.training.method != 'Full'",
                "output.format Adapter needs training.method LoRA or QLoRA; a full fine-tune has no adapter",
            ),
            (
                "!has(self.training.embeddingWarmup) || has(self.tokens)",
                "training.embeddingWarmup trains new rows only: add tokens, or remove it",
            ),
            (
                "!has(self.training.evaluateEverySteps) || self.dataset.validation.fraction > 0.0 || "
                "has(self.dataset.validation.source)",
                "training.evaluateEverySteps needs held-out rows: set dataset.validation.fraction, for example 0.1, or "
                "dataset.validation.source",
            ),
            (
                "self.training.objective != 'Preference' || (self.dataset.packing == 'Disabled' && "
                "self.dataset.mask == 'Assistant')",
                "training.objective Preference compares whole answers: use dataset.packing Disabled and mask Assistant",
            ),
            (
                "self.training.objective != 'Preference' || (self.dataset.sources.all(s, !has(s.template) && "
                "(!has(s.format) || s.format == 'Preference')) && (!has(self.dataset.validation.source) || "
                "(!has(self.dataset.validation.source.template) && (!has(self.dataset.validation.source.format) || "
                "self.dataset.validation.source.format == 'Preference'))))",
                "training.objective Preference reads the columns prompt, chosen and rejected: remove the template, and "
                "any other format",
            ),
            (
                "self.training.objective == 'Preference' || ("
                "self.dataset.sources.all(s, !has(s.format) || s.format != 'Preference') && "
                "(!has(self.dataset.validation.source) || !has(self.dataset.validation.source.format) || "
                "self.dataset.validation.source.format != 'Preference'))",
                "format Preference goes with training.objective Preference",
            ),
            (
                "!has(self.output) || self.output.uri != self.model.uri",
                "output.uri is the place of the base model, which would be overwritten: choose another",
            ),
        )
    )

    layout: Layout = Field(
        Layout.STAGED, description="Staged: CPU pods prepare and save, GPU pods train. SinglePod: all in one."
    )
    model: ModelSource = Field(description="The base model.")
    credentials: list[Credential] | None = Field(
        None,
        description="Secrets for the stores of model, dataset and output. Training pods never see them.",
        max_length=16,
        json_schema_extra=keyed_by("secretName"),
    )
    tokens: Tokens | None = Field(None, description="New tokens; none when absent.")
    dataset: Dataset = Field(description="What the model learns from.")
    training: Training = Field(description="How the model learns.")
    prepare: Prepare = Field(
        default_factory=Prepare, description="The CPU pods around training.", json_schema_extra={"default": {}}
    )
    workspace: Workspace = Field(
        default_factory=Workspace, description="The job's working volume.", json_schema_extra={"default": {}}
    )
    cache: Cache | None = Field(None, description="A claim that keeps downloads and extended models for further jobs.")
    output: Output | None = Field(
        None, description="Where the result is published; absent, it stays in the workspace volume under output/."
    )
    retry: Retry = Field(
        default_factory=Retry, description="How often to try again.", json_schema_extra={"default": {}}
    )
    start_deadline_seconds: int | None = Field(
        None,
        description="An attempt whose pods have not all started within this is withdrawn, with the scheduler's words "
        "for why, and tried again after a pause; it is no failure. Time in which a queue holds it does not count.",
        ge=1,
        le=31_536_000,
    )
    suspend: bool = Field(False, description="Stop after a checkpoint and keep everything; false goes on from there.")
    active_deadline_seconds: int | None = Field(
        None,
        description="The job fails when its pods have run longer than this in all. Waiting for pods to start, pauses "
        "and suspended time do not count.",
        ge=1,
        le=31_536_000,
    )
    ttl_seconds_after_finished: int | None = Field(
        None,
        description="Delete the job so long after it is complete. A failed job stays until ttlSecondsAfterFailed.",
        ge=0,
        le=31_536_000,
    )
    ttl_seconds_after_failed: int | None = Field(
        None,
        description="Delete the job so long after it failed; never when absent. Its workspace stays, unless "
        "workspace.retain is Never.",
        ge=0,
        le=31_536_000,
    )
