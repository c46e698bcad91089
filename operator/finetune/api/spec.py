"""The FineTuneJob spec: the one document an ML engineer writes.

These models are the source of the CRD (`python -m finetune.api.crd`), of the documentation, and of what the steps read.
Cross-field rules stand beside the fields they bind, as CEL that the API server evaluates on `kubectl apply`.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_camel

MAX_TOKENS = 2_000
"""Tokens that one spec may list; longer lists go into a ConfigMap (`tokens.addFrom`)."""


def rules(*validations: tuple[str, str]) -> Callable[[dict[str, Any]], None]:
    """A schema hook that attaches CEL rules, as (expression, sentence for the user) pairs."""

    def attach(schema: dict[str, Any]) -> None:
        schema["x-kubernetes-validations"] = [{"rule": rule, "message": message} for rule, message in validations]

    return attach


def keyed_by(key: str) -> dict[str, Any]:
    """A list whose items are unique by `key`: the server refuses duplicates without a quadratic CEL rule."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}


class Model(BaseModel):
    """Camel-case on the wire, snake-case in Python; unknown fields are errors, not surprises."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True)

    def wire(self) -> dict[str, Any]:
        """The document as it stands in YAML: camel-case, without absent fields."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def _as_text(value: object) -> object:
    return str(value) if isinstance(value, (int, float)) else value


Quantity = Annotated[
    str, BeforeValidator(_as_text), Field(max_length=32, json_schema_extra={"x-kubernetes-int-or-string": True})
]
"""A Kubernetes quantity: `2`, `"500m"`, `64Gi`."""

Name = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
"""The name of a Kubernetes object."""

MODEL_URI = r"^(hf://[\w.-]+(/[\w.-]+)?|(s3|gs|az)://[^/\s]+/\S+|pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/\S*)?)$"
DATASET_URI = (
    r"^(hf://datasets/[\w.-]+(/[\w.-]+)?|(s3|gs|az)://[^/\s]+/\S+|pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/\S*)?)$"
)
OUTPUT_URI = r"^(hf://[\w.-]+/[\w.-]+|(s3|gs|az)://[^/\s]+/\S+|pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?/\S*[^/\s])$"
NO_PARENT = ("!self.contains('/../') && !self.endsWith('/..')", "the path must not contain '..'")


class Switch(StrEnum):
    ENABLED = "Enabled"
    DISABLED = "Disabled"


class ModelSource(Model):
    """The base model."""

    uri: str = Field(
        description="Where the base model lies: hf://ORGANISATION/NAME, pvc://CLAIM/PATH, s3://, gs:// or az://.",
        max_length=512,
        pattern=MODEL_URI,
        json_schema_extra=rules(NO_PARENT),
        examples=["hf://meta-llama/Llama-3.2-1B-Instruct"],
    )
    revision: str = Field(
        "main",
        description="Branch, tag or commit of an hf:// model; resolved to a commit, which status records.",
        min_length=1,
        max_length=128,
        pattern=r"^[\w./-]+$",
    )


class Credential(Model):
    """A Secret whose keys become environment variables of the pods that talk to stores, never of training."""

    secret_name: Name = Field(
        description="A Secret of this namespace, for example with HF_TOKEN or AWS_ACCESS_KEY_ID as keys."
    )


class MeanOf(StrEnum):
    PIECES = "Pieces"
    VOCABULARY = "Vocabulary"
    DESCRIPTION = "Description"


class Sample(StrEnum):
    NORMAL = "Normal"


class TokenInit(Model):
    """How the new rows of the embedding matrices start. Exactly one of the ways."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "(has(self.copyOf) ? 1 : 0) + (has(self.meanOf) ? 1 : 0) + (has(self.sample) ? 1 : 0) == 1",
                "init takes exactly one of copyOf, meanOf and sample",
            ),
            (
                "has(self.text) == (has(self.meanOf) && self.meanOf == 'Description')",
                "init.text goes with meanOf: Description, and that needs it",
            ),
        )
    )

    copy_of: str | None = Field(
        None,
        description="Copy the row of this existing token. Choose one that is likely where the new token is wanted.",
        min_length=1,
        max_length=512,
    )
    mean_of: MeanOf | None = Field(
        None,
        description="The mean of the rows of: the token's own Pieces before it was added, the whole Vocabulary, "
        "or the pieces of a Description (`text`).",
    )
    text: str | None = Field(
        None, description="The description whose pieces are averaged.", min_length=1, max_length=4096
    )
    sample: Sample | None = Field(
        None, description="Draw each row from a Normal distribution fitted to the old rows, seeded by training.seed."
    )


class NewToken(Model):
    """One word or marker that becomes a single token."""

    content: str = Field(
        description="The text of the token.",
        min_length=1,
        max_length=512,
        json_schema_extra=rules(("self.trim() != ''", "a token must not consist of white space only")),
    )
    init: TokenInit | None = Field(None, description="How its rows start; tokens.init when absent.")
    special: bool = Field(
        False,
        description="Register as a special token: decoding with skip_special_tokens hides it. "
        "Leave false for markers that the model shall emit visibly.",
    )
    lstrip: bool = Field(False, description="The token also swallows white space on its left.")
    rstrip: bool = Field(False, description="The token also swallows white space on its right.")
    single_word: bool = Field(False, description="Match only where no letter or digit adjoins.")
    normalized: bool = Field(False, description="Match after the tokenizer's normalizer instead of before it.")


class ConfigMapKey(Model):
    """One key of a ConfigMap."""

    name: Name = Field(description="A ConfigMap of this namespace.")
    key: str = Field(description="The key in it.", min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")


class TokensFrom(Model):
    """Tokens kept outside the spec."""

    config_map: ConfigMapKey = Field(description='Plain lines, or lines of {"piece": "..."} as vocabulary files have.')


class TokenSource(Model):
    """A corpus to learn pieces from."""

    uri: str = Field(
        description="hf://datasets/..., pvc://CLAIM/PATH, s3://, gs:// or az://.",
        max_length=512,
        pattern=DATASET_URI,
        json_schema_extra=rules(NO_PARENT),
    )


class LearnTokens(Model):
    """Vocabulary expansion: continue the tokenizer's own BPE on a domain corpus."""

    source: TokenSource = Field(description="The domain corpus.")
    protect: TokenSource | None = Field(None, description="General text whose encoding must not change.")
    size: int = Field(description="How many new ids to learn at most.", ge=1, le=200_000)
    minimum_saving: int = Field(
        2, description="Stop when a piece would save fewer tokens than this on the corpus.", ge=1, le=1_000_000
    )


class Tokens(Model):
    """New tokens for tokenizer and embedding matrices."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "has(self.add) || has(self.addFrom) || has(self.learn)",
                "tokens needs at least one of add, addFrom, learn",
            )
        )
    )

    add: list[NewToken] | None = Field(
        None,
        description="Words or markers, each of which becomes one token.",
        min_length=1,
        max_length=MAX_TOKENS,
        json_schema_extra=keyed_by("content"),
    )
    add_from: TokensFrom | None = Field(None, description="A longer list, kept in a ConfigMap.")
    learn: LearnTokens | None = Field(None, description="Learn the tokens from a corpus.")
    init: TokenInit | None = Field(
        None, description="How new rows start where the token does not say; the mean of its pieces when absent."
    )
    pad_to_multiple_of: int = Field(
        64,
        description="Round the number of embedding rows up to a multiple of this (tensor cores like 64).",
        ge=1,
        le=1024,
    )


class Template(Model):
    """Jinja templates over a row's columns, rendered in a sandbox inside the pod."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "has(self.text) != (has(self.user) && has(self.assistant))",
                "a template has either text, or user and assistant (and optionally system)",
            ),
            ("!(has(self.text) && has(self.system))", "template.system goes with user and assistant, not with text"),
        )
    )

    system: str | None = Field(None, description="The system message.", min_length=1, max_length=16_384)
    user: str | None = Field(None, description="The user's message.", min_length=1, max_length=16_384)
    assistant: str | None = Field(
        None, description="The assistant's answer, which carries the loss.", min_length=1, max_length=16_384
    )
    text: str | None = Field(
        None, description="One plain text; all of it carries the loss.", min_length=1, max_length=16_384
    )


class DatasetSource(Model):
    """Rows from one place."""

    uri: str = Field(
        description="hf://datasets/ORGANISATION/NAME, pvc://CLAIM/PATH (a file or folder), s3://, gs:// or az://. "
        "JSONL, JSON, CSV or Parquet.",
        max_length=512,
        pattern=DATASET_URI,
        json_schema_extra=rules(NO_PARENT),
    )
    revision: str = Field(
        "main",
        description="Branch, tag or commit of an hf:// dataset.",
        min_length=1,
        max_length=128,
        pattern=r"^[\w./-]+$",
    )
    subset: str | None = Field(
        None, description="The configuration of an hf:// dataset that has several.", min_length=1, max_length=128
    )
    split: str = Field(
        "train",
        description="Which rows, in the slicing syntax of datasets: train, train[:10000], train[10%:20%].",
        max_length=128,
        pattern=r"^\w+(\[-?\d*%?:-?\d*%?\])?$",
    )
    weight: float = Field(1.0, description="Share of this source in the mixture, relative to the others.", gt=0, le=1e6)
    template: Template | None = Field(
        None, description="How a row becomes a conversation or text; absent: the row's own format is recognised."
    )


class Validation(Model):
    """Which rows are held out."""

    fraction: float = Field(
        0.0, description="Share of the rows held out for validation; 0 holds out none.", ge=0, le=0.5
    )


class Mask(StrEnum):
    ASSISTANT = "Assistant"
    COLOSSAL = "Colossal"


class Dataset(Model):
    """What the model learns from."""

    sources: list[DatasetSource] = Field(description="Where rows come from.", min_length=1, max_length=32)
    validation: Validation = Field(
        default_factory=Validation,
        description="Rows held out to measure the loss on.",
        json_schema_extra={"default": {}},
    )
    max_length: int = Field(
        1024, description="Longest example in tokens; longer conversations lose whole turns.", ge=8, le=1_048_576
    )
    packing: Switch = Field(
        Switch.DISABLED, description="Put several short examples into one row, isolated from one another."
    )
    mask: Mask = Field(
        Mask.ASSISTANT, description="Which tokens carry the loss: the assistant's turns, or ColossalAI's own rule."
    )


class Objective(StrEnum):
    SUPERVISED = "Supervised"
    PRETRAINING = "Pretraining"
    PREFERENCE = "Preference"


class Method(StrEnum):
    FULL = "Full"
    LORA = "LoRA"
    QLORA = "QLoRA"


class Parallelism(StrEnum):
    AUTO = "Auto"
    DDP = "DDP"
    FSDP = "FSDP"
    DEEPSPEED_ZERO = "DeepSpeedZeRO"


class Schedule(StrEnum):
    LINEAR = "Linear"
    COSINE = "Cosine"
    CONSTANT = "Constant"


class Optimizer(StrEnum):
    ADAMW = "AdamW"
    ADAMW_8BIT = "AdamW8bit"


class LoRA(Model):
    """Low-rank adaptation."""

    rank: int = Field(16, description="Rank of the update matrices.", ge=1, le=1024)
    alpha: int = Field(32, description="Scale of the update: alpha / rank.", ge=1, le=4096)
    dropout: float = Field(0.0, description="Dropout before the update matrices.", ge=0, lt=1)
    targets: list[Annotated[str, Field(min_length=1, max_length=128)]] | None = Field(
        None, description="Names of the modules to adapt; all linear layers when absent.", min_length=1, max_length=64
    )


class EmbeddingWarmup(Model):
    """A phase before training proper in which only the new rows learn."""

    steps: int = Field(description="How many optimizer steps it takes.", ge=1, le=1_000_000)
    learning_rate: float | None = Field(
        None, description="Its learning rate; training.learningRate when absent.", gt=0, le=10
    )


class Checkpoint(Model):
    """How often progress is made safe."""

    every_steps: int = Field(
        50, description="Write a checkpoint after every so many optimizer steps.", ge=1, le=1_000_000
    )
    keep: int = Field(2, description="How many complete checkpoints to keep.", ge=1, le=100)


class Resources(Model):
    """Compute resources of a container, as in any pod."""

    limits: dict[str, Quantity] | None = Field(
        None,
        description='Limits by resource name, for example nvidia.com/gpu: "1".',
        json_schema_extra={"maxProperties": 16},
    )
    requests: dict[str, Quantity] | None = Field(
        None,
        description="Requests by resource name; equal to the limits when absent.",
        json_schema_extra={"maxProperties": 16},
    )


class TolerationOperator(StrEnum):
    EXISTS = "Exists"
    EQUAL = "Equal"


class TaintEffect(StrEnum):
    NO_SCHEDULE = "NoSchedule"
    PREFER_NO_SCHEDULE = "PreferNoSchedule"
    NO_EXECUTE = "NoExecute"


class Toleration(Model):
    """A taint that the training pods tolerate, as in any pod."""

    key: str | None = Field(None, description="The taint's key; absent with operator Exists means all.", max_length=317)
    operator: TolerationOperator = Field(TolerationOperator.EQUAL, description="How key and value are compared.")
    value: str | None = Field(None, description="The taint's value.", max_length=63)
    effect: TaintEffect | None = Field(None, description="The taint's effect; absent means all.")
    toleration_seconds: int | None = Field(
        None, description="How long a NoExecute taint is tolerated.", ge=0, le=31_536_000
    )


class EnvVar(Model):
    """An environment variable with a plain value; secrets go through spec.credentials."""

    name: str = Field(description="Its name.", min_length=1, max_length=128, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    value: str = Field("", description="Its value.", max_length=4096)


class TrainerContainer(Model):
    """Bring your own trainer: an image that keeps the step contract (docs/architecture.md)."""

    image: str = Field(
        description="The image to run instead of the operator's training image.", min_length=1, max_length=512
    )
    command: list[Annotated[str, Field(max_length=4096)]] | None = Field(
        None, description="Its command; the image's own when absent.", min_length=1, max_length=64
    )
    env: list[EnvVar] | None = Field(
        None, description="Further environment variables.", max_length=64, json_schema_extra=keyed_by("name")
    )


GPUS = (
    "(has(self.resources.limits) && 'nvidia.com/gpu' in self.resources.limits "
    "? int(string(self.resources.limits['nvidia.com/gpu'])) : 1)"
)


class Training(Model):
    """How the model learns."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("has(self.epochs) != has(self.maxSteps)", "training takes exactly one of epochs and maxSteps"),
            (
                "!has(self.resources.limits) || !('nvidia.com/gpu' in self.resources.limits) "
                "|| string(self.resources.limits['nvidia.com/gpu']).matches('^[1-9][0-9]?$')",
                'training.resources.limits["nvidia.com/gpu"] must be a whole number from 1 to 99',
            ),
            (
                "(has(self.resources.limits) && 'nvidia.com/gpu' in self.resources.limits && "
                "!string(self.resources.limits['nvidia.com/gpu']).matches('^[1-9][0-9]?$')) || "
                f"self.batchSize % (self.microBatchSize * self.nodes * {GPUS}) == 0",
                "training.batchSize must be divisible by microBatchSize x nodes x GPUs of a pod, "
                "so that gradient accumulation keeps the batch that you asked for",
            ),
            ("self.method == 'Full' ? !has(self.lora) : true", "training.lora goes with method LoRA or QLoRA"),
        )
    )

    objective: Objective = Field(
        Objective.SUPERVISED,
        description="Supervised (only answers carry loss), Pretraining (all text does) or Preference (pairs).",
    )
    method: Method = Field(Method.FULL, description="Full trains every weight; LoRA and QLoRA train small additions.")
    lora: LoRA | None = Field(None, description="Settings of LoRA and QLoRA.")
    epochs: float | None = Field(None, description="Passes over the dataset.", gt=0, le=10_000)
    max_steps: int | None = Field(None, description="Optimizer steps, instead of epochs.", ge=1, le=100_000_000)
    batch_size: int = Field(8, description="Examples per optimizer step, over all devices.", ge=1, le=1_048_576)
    micro_batch_size: int = Field(
        1, description="Examples per device and pass; gradient accumulation is derived from it.", ge=1, le=65_536
    )
    learning_rate: float = Field(1e-5, description="Peak learning rate.", gt=0, le=10)
    schedule: Schedule = Field(Schedule.LINEAR, description="How the learning rate falls after its warm-up.")
    warmup_ratio: float = Field(0.0, description="Share of the steps in which the learning rate rises.", ge=0, le=1)
    weight_decay: float = Field(0.0, description="Decoupled weight decay.", ge=0, le=1)
    max_grad_norm: float = Field(1.0, description="Gradients are clipped to this norm; 0 does not clip.", ge=0, le=1e6)
    optimizer: Optimizer = Field(Optimizer.ADAMW, description="AdamW, or AdamW with 8-bit states on a GPU.")
    gradient_checkpointing: Switch = Field(
        Switch.DISABLED, description="Recompute activations in the backward pass: less memory, more time."
    )
    seed: int = Field(
        0, description="Seed of everything random: order of rows, dropout, sampled rows.", ge=0, le=4_294_967_295
    )
    evaluate_every_steps: int | None = Field(
        None,
        description="Measure the validation loss after every so many steps; at the end only when absent.",
        ge=1,
        le=1_000_000,
    )
    embedding_warmup: EmbeddingWarmup | None = Field(
        None, description="First only the new rows learn, all else frozen."
    )
    parallelism: Parallelism = Field(Parallelism.AUTO, description="How several devices share the work.")
    nodes: int = Field(1, description="Training pods, each with `resources`.", ge=1, le=512)
    resources: Resources = Field(
        default_factory=Resources, description="Resources of each training pod.", json_schema_extra={"default": {}}
    )
    node_selector: dict[str, Annotated[str, Field(max_length=63)]] | None = Field(
        None, description="Labels of the nodes that may train.", json_schema_extra={"maxProperties": 32}
    )
    tolerations: list[Toleration] | None = Field(
        None, description="Taints that the training pods tolerate.", max_length=32
    )
    priority_class_name: Name | None = Field(None, description="Priority class of the training pods.")
    checkpoint: Checkpoint = Field(
        default_factory=Checkpoint,
        description="How often progress is made safe, and how much of it is kept.",
        json_schema_extra={"default": {}},
    )
    container: TrainerContainer | None = Field(None, description="Your own trainer image instead of ours.")
    termination_grace_period_seconds: int = Field(
        300, description="Time for the last checkpoint when the pod is asked to go.", ge=1, le=86_400
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
        description="Its access modes. Several training nodes need ReadWriteMany.",
        min_length=1,
        max_length=3,
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )


class Cache(Model):
    """A claim shared by jobs, so that a second job downloads nothing."""

    claim_name: Name = Field(description="A claim of this namespace, ReadWriteMany if jobs run on several nodes.")


class OutputFormat(StrEnum):
    MERGED = "Merged"
    ADAPTER = "Adapter"


class Output(Model):
    """Where the trained model goes."""

    uri: str = Field(
        description="pvc://CLAIM/PATH, hf://ORGANISATION/NAME, s3://, gs:// or az://. The path is created.",
        max_length=512,
        pattern=OUTPUT_URI,
        json_schema_extra=rules(NO_PARENT),
    )
    format: OutputFormat = Field(OutputFormat.MERGED, description="A whole model, or only what LoRA added.")


class Retry(Model):
    """What is tolerated before a job counts as failed."""

    limit: int = Field(
        3, description="Failures in a row without a new checkpoint. Preemptions are not failures.", ge=0, le=100
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
    suspend: bool = Field(False, description="Stop after a checkpoint and keep everything; false goes on from there.")
    active_deadline_seconds: int | None = Field(
        None, description="The job fails when it runs longer than this, suspended time included.", ge=1, le=31_536_000
    )
    ttl_seconds_after_finished: int | None = Field(
        None, description="Delete the job so long after it finished.", ge=0, le=31_536_000
    )
