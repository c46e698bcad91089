"""Training: how the model learns, and on what machines."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from finetune.api.schema import Matching, Model, Name, Quantity, Switch, keyed_by, rules
from finetune.api.spec.samples import Samples


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
    """Each device holds the whole model and sees its part of every batch."""

    FSDP = "FSDP"
    """Weights, gradients and optimizer states are split among the devices (FSDP2)."""

    DEEPSPEED_ZERO = "DeepSpeedZeRO"
    """As FSDP, by DeepSpeed's ZeRO."""


class Schedule(StrEnum):
    LINEAR = "Linear"
    COSINE = "Cosine"
    CONSTANT = "Constant"


class Optimizer(StrEnum):
    ADAMW = "AdamW"
    ADAMW_8BIT = "AdamW8bit"


class NodeLostPolicy(StrEnum):
    WAIT = "Wait"
    FORCE_DELETE = "ForceDelete"


class LoRA(Model):
    """Low-rank adaptation."""

    rank: int = Field(16, description="Rank of the update matrices.", ge=1, le=1024)
    alpha: int = Field(32, description="Scale of the update: alpha / rank.", ge=1, le=4096)
    dropout: float = Field(0.0, description="Dropout before the update matrices.", ge=0, lt=1)
    targets: list[Annotated[str, Field(min_length=1, max_length=128)]] | None = Field(
        None, description="Names of the modules to adapt; all linear layers when absent.", min_length=1, max_length=64
    )
    bits: Literal[4, 8] | None = Field(
        None, description="QLoRA: bits of a frozen weight while training, 4 (NF4) when absent, or 8 (LLM.int8)."
    )


class EmbeddingWarmup(Model):
    """A phase before training proper in which only the new rows learn."""

    steps: int = Field(description="How many optimizer steps it takes.", ge=1, le=1_000_000)
    learning_rate: float | None = Field(
        None, description="Its learning rate; training.learningRate when absent.", gt=0, le=10
    )


class MovingAverage(Model):
    """An exponential moving average of the trained weights, which takes their place when the model is measured and
    saved: steadier than the last step, slower to forget."""

    decay: float = Field(
        0.999,
        description="Share of the average that stays at each step; smaller at first: (1 + step) / (10 + step).",
        gt=0,
        lt=1,
    )


class EarlyStopping(Model):
    """Training ends when the validation loss no longer falls."""

    patience: int = Field(
        3, description="So many evaluations in a row without improvement end training.", ge=1, le=10_000
    )
    minimum_improvement: float = Field(
        0.0, description="By how much the validation loss must fall below the best so far to count.", ge=0, le=1e6
    )


class Preference(Model):
    """Settings of the objective Preference: direct preference optimisation."""

    beta: float = Field(
        0.1, description="How strongly the model is held near where it started; higher is nearer.", gt=0, le=100
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

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "self.operator == 'Equal' ? has(self.key) : !has(self.value)",
                "a toleration with operator Equal needs a key; one with operator Exists takes no value",
            )
        )
    )

    key: str | None = Field(
        None, description="The taint's key; absent with operator Exists means all.", min_length=1, max_length=317
    )
    operator: TolerationOperator = Field(TolerationOperator.EQUAL, description="How key and value are compared.")
    value: str | None = Field(None, description="The taint's value.", max_length=63)
    effect: TaintEffect | None = Field(None, description="The taint's effect; absent means all.")
    toleration_seconds: int | None = Field(
        None, description="How long a NoExecute taint is tolerated.", ge=0, le=31_536_000
    )


class EnvVar(Model):
    """An environment variable with a plain value; secrets go through spec.credentials."""

    name: Annotated[
        str,
        Matching(
            "[A-Za-z_][A-Za-z0-9_]*",
            "must be the name of a variable: letters, digits and '_', not beginning with a digit",
        ),
    ] = Field(description="Its name.", min_length=1, max_length=128)
    value: str = Field("", description="Its value.", max_length=4096)


class Scripts(Model):
    """Files of yours for the trainer's container."""

    config_map: Name = Field(
        description="A ConfigMap of this namespace; each key is a read-only file of that name in /scripts."
    )


class TrainerContainer(Model):
    """Bring your own trainer: a command that keeps the contract of docs/bring-your-own-trainer.md."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "has(self.image) || has(self.command)",
                "training.container needs an image, or a command for the operator's own training image",
            )
        )
    )

    image: str | None = Field(
        None,
        description="The image to run; the operator's training image (torch, transformers, trl, peft) when absent.",
        min_length=1,
        max_length=512,
    )
    command: list[Annotated[str, Field(max_length=4096)]] | None = Field(
        None, description="Its command; the image's own when absent.", min_length=1, max_length=64
    )
    scripts: Scripts | None = Field(None, description="Files of yours that the command finds in /scripts.")
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
            (
                "!has(self.resources.requests) || !('nvidia.com/gpu' in self.resources.requests) || "
                "(has(self.resources.limits) && 'nvidia.com/gpu' in self.resources.limits)",
                "nvidia.com/gpu goes into training.resources.limits: a request alone gives a pod no GPU",
            ),
            ("self.method == 'Full' ? !has(self.lora) : true", "training.lora goes with method LoRA or QLoRA"),
            (
                "!has(self.lora) || !has(self.lora.bits) || self.method == 'QLoRA'",
                "training.lora.bits goes with method QLoRA",
            ),
            (
                "!has(self.preference) || self.objective == 'Preference'",
                "training.preference goes with objective Preference",
            ),
            (
                "!has(self.earlyStopping) || has(self.evaluateEverySteps)",
                "training.earlyStopping needs training.evaluateEverySteps: it looks at the validation loss",
            ),
            (
                "!has(self.ema) || self.parallelism == 'Auto' || self.parallelism == 'DDP'",
                "training.ema averages whole weights: use parallelism Auto or DDP",
            ),
            (
                "!has(self.embeddingWarmup) || self.objective != 'Preference'",
                "training.embeddingWarmup goes with Supervised or Pretraining: preferences are measured against the "
                "model as it starts, so teach it new tokens in a job before",
            ),
            (
                "self.objective != 'Preference' || self.parallelism == 'Auto' || self.parallelism == 'DDP'",
                "objective Preference measures the whole model before training: use parallelism Auto or DDP",
            ),
            (
                "!has(self.container) || self.parallelism == 'Auto'",
                "training.parallelism is our own trainer's: with training.container the command decides, so remove it",
            ),
        )
    )

    objective: Objective = Field(
        Objective.SUPERVISED,
        description="Supervised (only answers carry loss), Pretraining (all text does) or Preference (pairs).",
    )
    method: Method = Field(Method.FULL, description="Full trains every weight; LoRA and QLoRA train small additions.")
    lora: LoRA | None = Field(None, description="Settings of LoRA and QLoRA.")
    preference: Preference | None = Field(None, description="Settings of the objective Preference.")
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
    optimizer: Optimizer = Field(
        Optimizer.ADAMW, description="AdamW, or AdamW with 8-bit states: a quarter of their memory."
    )
    ema: MovingAverage | None = Field(
        None, description="Measure and save an exponential moving average of the trained weights."
    )
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
    early_stopping: EarlyStopping | None = Field(
        None, description="End when the validation loss no longer falls; the weights are those of the last step."
    )
    embedding_warmup: EmbeddingWarmup | None = Field(
        None, description="First only the new rows learn, all else frozen; its steps come before those of training."
    )
    parallelism: Parallelism = Field(
        Parallelism.AUTO,
        description="How several devices share the work: DDP (Auto too) copies the model to each, FSDP and "
        "DeepSpeedZeRO split it among them, for models that one device cannot hold.",
    )
    nodes: int = Field(
        1, description="Training pods that train one model together, each with `resources`.", ge=1, le=512
    )
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
    samples: Samples | None = Field(
        None, description="Prompts to answer before and after training, for the report and the model card."
    )
    container: TrainerContainer | None = Field(None, description="Your own trainer instead of ours.")
    progress_deadline_seconds: int | None = Field(
        None,
        description="A running attempt that does no optimizer step for so long (loading the model and evaluating "
        "count too) hangs: the stacks of all threads go into the pod's log, it is ended, and tried again as after any "
        "failure. One that reports progress and no longer does is ended by the operator a minute later.",
        ge=10,
        le=31_536_000,
    )
    termination_grace_period_seconds: int = Field(
        300, description="Time for the last checkpoint when the pod is asked to go.", ge=1, le=86_400
    )
    on_node_lost: NodeLostPolicy = Field(
        NodeLostPolicy.WAIT,
        description="What becomes of a pod of this job that was told to stop and whose machine does not confirm it. "
        "Wait: nothing new starts until somebody says that the machine is off (status.message has the command). "
        "ForceDelete: five minutes after the pod should have stopped, when Kubernetes counts its machine as "
        "unreachable, the operator declares the pod failed and removes it. With that you vouch that an unreachable "
        "machine is off or fenced by then, as a cloud's node repair sees to: one that only lost its network would go "
        "on writing to the same volume. Needs the chart's value nodeLost.forceDelete.",
    )

    @property
    def devices(self) -> int:
        """Training processes of a pod: one for each GPU, one without any."""
        return int((self.resources.limits or {}).get("nvidia.com/gpu", "1"))
