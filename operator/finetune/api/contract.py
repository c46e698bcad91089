"""What the operator and the steps agree on: files, environment, exit codes, reports.

The operator writes a `StepJob` into an annotation of the pod template; a projected volume turns it into `job.json`.
A step reads it, works in the workspace, leaves a `StepReport` in the termination log and ends with an `ExitCode`.
The local runner keeps the same contract with folders and processes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import from_json

from finetune.api.conditions import ConditionType, shortened, word
from finetune.api.reading import readable, storable
from finetune.api.spec import FineTuneJobSpec, Model

MAX_REPORT_BYTES = 1536
"""The kubelet shares 12 KiB of termination messages among the containers of a pod and cuts the rest."""

JOB_ANNOTATION = "finetune.dev/job"
CA_ANNOTATION = "finetune.dev/progress-ca"
JOB_LABEL = "finetune.dev/job-name"
JOB_UID_LABEL = "finetune.dev/job-uid"
"""Tells the children of a job from those of a former job of the same name."""

OPERATOR_LABEL = "finetune.dev/operator"
"""On a FineTuneJob: leave it to the operator of that name (a canary, a test); the nameless one takes all others."""

STAGE_LABEL = "finetune.dev/stage"
SPEC_LABEL = "finetune.dev/spec"
"""On a child Job: a digest of what of the spec it was made from."""

KEPT_LABEL = "finetune.dev/kept"
KEPT_ANNOTATION = "finetune.dev/kept-from"
"""On a workspace claim that outlives its job: NAMESPACE/NAME/UID of that job."""

ATTEMPT_LABEL = "finetune.dev/attempt"
SUSPENDED_LABEL = "finetune.dev/suspended"
"""On a child Job that the operator suspended, written with the suspension: only such a one does it resume."""

TOKEN_AUDIENCE = "finetune.dev"  # noqa: S105 - the audience that pods' projected tokens are bound to
PROGRESS_URL = "KUBEFLOW_TRAINER_SERVER_URL"
PROGRESS_CA = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
PROGRESS_TOKEN = "KUBEFLOW_TRAINER_SERVER_TOKEN"  # noqa: S105 - the name of a variable
"""The variables of stock transformers' KubeflowCallback, so that any trainer image reports without a line of code."""

PROGRESS_PREFIX = "finetune-progress "
"""Starts a line of a step's standard output that carries a progress report: the local runner draws its bars from it."""


class Step(StrEnum):
    """The commands of `finetune-step`."""

    DOWNLOAD = "download"
    ADD_TOKENS = "add-tokens"
    RELOAD = "reload"
    LOAD_DATASET = "load-dataset"
    TRAIN = "train"
    SAVE = "save"


CONTAINERS: Mapping[Step, str] = {
    Step.DOWNLOAD: "download-model",
    Step.ADD_TOKENS: "add-tokens",
    Step.RELOAD: "reload-model",
    Step.LOAD_DATASET: "load-dataset",
    Step.TRAIN: "train",
    Step.SAVE: "save-model",
}
"""The container that runs each step."""

CONDITIONS: Mapping[Step, ConditionType] = {
    Step.DOWNLOAD: ConditionType.MODEL_DOWNLOADED,
    Step.ADD_TOKENS: ConditionType.TOKENS_ADDED,
    Step.RELOAD: ConditionType.MODEL_RELOADED,
    Step.LOAD_DATASET: ConditionType.DATASET_LOADED,
    Step.TRAIN: ConditionType.TRAINED,
    Step.SAVE: ConditionType.SAVED,
}
"""The condition that says whether each step is done."""

PARTS: Mapping[Step, str] = {
    Step.DOWNLOAD: "model",
    Step.ADD_TOKENS: "tokens",
    Step.RELOAD: "tokens",
    Step.LOAD_DATASET: "dataset",
    Step.TRAIN: "training",
    Step.SAVE: "output",
}
"""The part of status that each step reports."""


class ExitCode(IntEnum):
    """How a step ends, in the numbers of sysexits.h; 75 means: stopped on request, after a checkpoint."""

    OK = 0
    USAGE = 64
    BAD_DATA = 65
    NO_INPUT = 66
    UNAVAILABLE = 69
    SOFTWARE = 70
    IO_ERROR = 74
    PREEMPTED = 75
    BAD_CONFIGURATION = 78


NEVER_RETRIED = (
    ExitCode.USAGE,
    ExitCode.BAD_DATA,
    ExitCode.NO_INPUT,
    ExitCode.SOFTWARE,
    ExitCode.BAD_CONFIGURATION,
)
"""Trying again cannot help: somebody has to change something."""


class StepJob(Model):
    """The resolved job, as `job.json` gives it to every step."""

    name: str = Field(description="The FineTuneJob's name.")
    namespace: str = Field(description="Its namespace.")
    uid: str = Field(description="Its UID.")
    created: datetime = Field(description="Its creation time; chat templates that print a date get this one.")
    attempt: int = Field(1, description="Number of the stage's attempt, from 1.", ge=1)
    spec: FineTuneJobSpec = Field(description="The spec, defaults included.")


class StepError(Model):
    """Why a step failed and what to do about it."""

    reason: Annotated[str, AfterValidator(word)] = Field(description="One CamelCase word, for a condition's reason.")
    message: str = Field(description="What is wrong: field, value.")
    hint: str = Field("", description="How to mend it.")


class StepReport(Model):
    """What a step leaves in its termination log: a result or an error.

    `result` holds the wire form (camel-case) of the part of status that the step is responsible for:
    download -> ModelStatus, add-tokens and reload -> (parts of) TokensStatus, load-dataset -> DatasetStatus,
    train -> TrainingStatus, save -> OutputStatus.
    """

    step: Step
    result: dict[str, Any] | None = None
    error: StepError | None = None
    resumed_from_step: int | None = Field(
        None, description="train: the checkpoint that it went on from; 0 is a fresh start."
    )

    def to_json(self) -> str:
        """The report within `MAX_REPORT_BYTES`: texts are shortened first, then lists and mappings are dropped."""
        report = self
        for limit in (1024, 512, 256, 128, 64):
            text = report.model_dump_json(by_alias=True, exclude_none=True)
            if len(text.encode()) <= MAX_REPORT_BYTES:
                return text
            report = report.model_copy(
                update={
                    "error": report.error
                    and report.error.model_copy(
                        update={
                            "message": shortened(report.error.message, limit),
                            "hint": shortened(report.error.hint, limit),
                        }
                    ),
                    "result": report.result and _shortened_values(report.result, limit),
                }
            )
        plain = {key: value for key, value in (report.result or {}).items() if isinstance(value, (bool, int, float))}
        report = report.model_copy(update={"result": plain if report.result is not None else None})
        return report.model_dump_json(by_alias=True, exclude_none=True)

    @classmethod
    def from_json(cls, text: str) -> StepReport | None:
        """The report in a termination message, or None when the message is not one (a foreign image, a crash).

        Whoever wrote it: what cannot be read or stored is left out, value by value, and the rest counts."""
        try:
            found = from_json(text)
        except ValueError:
            return None
        if not isinstance(found, dict):
            return None
        sound = storable(found)
        try:
            return cls.model_validate(sound)
        except ValidationError:
            kept = readable(cls, sound)
        return cls.model_validate(kept) if kept else None


def _shortened_values(result: dict[str, Any], limit: int) -> dict[str, Any]:
    def shorten(value: Any) -> Any:
        if isinstance(value, str):
            return shortened(value, limit)
        if isinstance(value, list):
            return [shorten(item) for item in value[: max(1, limit // 32)]]
        if isinstance(value, dict):
            return {key: shorten(item) for key, item in value.items()}
        return value

    return {key: shorten(value) for key, value in result.items()}


JOB_FILE = "FINETUNE_JOB"
WORKSPACE = "FINETUNE_WORKSPACE"
CLAIMS = "FINETUNE_CLAIMS"
CACHE = "FINETUNE_CACHE"
TOKENS_FILE = "FINETUNE_TOKENS"
CHAT_TEMPLATE_FILE = "FINETUNE_CHAT_TEMPLATE"
REPORT_FILE = "FINETUNE_REPORT"
MODEL = "FINETUNE_MODEL"
DATASET = "FINETUNE_DATASET"
VALIDATION = "FINETUNE_VALIDATION"
CHECKPOINTS = "FINETUNE_CHECKPOINTS"
OUTPUT = "FINETUNE_OUTPUT"
"""The last five are for trainers of the user's own; our steps know the layout."""

DEVICES = "FINETUNE_DEVICES"
"""Training processes of a pod: one for each GPU, one without any."""

NODES = "FINETUNE_NODES"
"""Training pods of one attempt."""

NODE_RANK = "JOB_COMPLETION_INDEX"
"""Which of them this one is, from 0: Kubernetes sets it in every pod of an Indexed Job."""

RENDEZVOUS = "FINETUNE_RENDEZVOUS"
"""HOST:PORT where the pod of index 0 waits for the others; only where there are others. The next port is torchrun's."""

RENDEZVOUS_PORT = 29400

PEER_LOST = "PeerLost"
"""The reason of a training pod that ended only because another one did, and does not know why that did."""


@dataclass(frozen=True)
class Layout:
    """Where things lie for a step: in a pod by default, elsewhere for the local runner (through the environment)."""

    job_file: Path = Path("/etc/finetune/job.json")
    workspace: Path = Path("/workspace")
    claims: Path = Path("/claims")
    cache: Path | None = None
    tokens_file: Path = Path("/etc/finetune-tokens/tokens")
    chat_template_file: Path = Path("/etc/finetune-chat-template/chat_template.jinja")
    report_file: Path = Path("/dev/termination-log")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Layout:
        """The layout that the environment describes; what it leaves out is as in a pod."""
        cache = environment.get(CACHE)
        return cls(
            job_file=Path(environment.get(JOB_FILE, cls.job_file)),
            workspace=Path(environment.get(WORKSPACE, cls.workspace)),
            claims=Path(environment.get(CLAIMS, cls.claims)),
            cache=Path(cache) if cache else None,
            tokens_file=Path(environment.get(TOKENS_FILE, cls.tokens_file)),
            chat_template_file=Path(environment.get(CHAT_TEMPLATE_FILE, cls.chat_template_file)),
            report_file=Path(environment.get(REPORT_FILE, cls.report_file)),
        )

    @property
    def model(self) -> Path:
        """The base model, as downloaded."""
        return self.workspace / "model"

    @property
    def prepared(self) -> Path:
        """The model with its new tokens."""
        return self.workspace / "prepared"

    @property
    def proof(self) -> Path:
        """What reload proved about the model with its new tokens, in full."""
        return self.workspace / "finetune-reload.json"

    @property
    def dataset(self) -> Path:
        """Token ids and labels."""
        return self.workspace / "dataset"

    @property
    def checkpoints(self) -> Path:
        return self.workspace / "checkpoints"

    @property
    def trained(self) -> Path:
        """The trained weights, before they are published."""
        return self.workspace / "trained"

    @property
    def output(self) -> Path:
        """The result, when the job names no other place for it."""
        return self.workspace / "output"

    def claim_path(self, uri: str) -> Path:
        """The folder or file that pvc://CLAIM/PATH names, below the mounted claims."""
        claim, _, path = uri.removeprefix("pvc://").partition("/")
        return self.claims / claim / path


def foreign_environment(spec: FineTuneJobSpec, layout: Layout) -> dict[str, str]:
    """What a trainer that is not ours finds in its environment: the paths of docs/bring-your-own-trainer.md."""
    validation = {VALIDATION: str(layout.dataset / "validation")} if spec.dataset.validates else {}
    return {
        JOB_FILE: str(layout.job_file),
        WORKSPACE: str(layout.workspace),
        MODEL: str(layout.prepared if spec.tokens else layout.model),
        DATASET: str(layout.dataset / "train"),
        **validation,
        CHECKPOINTS: str(layout.checkpoints),
        OUTPUT: str(layout.trained),
        REPORT_FILE: str(layout.report_file),
    }


def claims_of(*uris: str | None) -> tuple[str, ...]:
    """The claims that pvc:// URIs name, each once, in order."""
    names = (uri.removeprefix("pvc://").partition("/")[0] for uri in uris if uri and uri.startswith("pvc://"))
    return tuple(dict.fromkeys(names))
