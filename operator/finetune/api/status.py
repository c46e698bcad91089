"""The FineTuneJob status: what a user reads.

Two writers share it: the controller owns everything but `progress`, which whoever receives a pod's live report writes.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import Field

from finetune.api.conditions import Condition
from finetune.api.schema import OpenEnum, StatusModel

MAX_ATTEMPTS = 10
"""Attempts that status remembers, newest last."""

Text = Annotated[str, Field(max_length=4096)]


class Phase(OpenEnum):
    """Where the job stands, in one word, for people; programs read the conditions."""

    PENDING = "Pending"
    """Nothing of it has run yet."""

    WAITING = "Waiting"
    """Between two things that run: for a pod to start, for a pause to pass, for something that is in the way."""

    DOWNLOADING = "Downloading"
    ADDING_TOKENS = "AddingTokens"
    RELOADING = "Reloading"
    LOADING_DATASET = "LoadingDataset"
    TRAINING = "Training"
    SAVING = "Saving"
    COMPLETE = "Complete"
    FAILED = "Failed"
    SUSPENDED = "Suspended"
    STOPPING = "Stopping"
    """The job is to fail, and pods of it still run."""


class Unit(OpenEnum):
    BYTE = "byte"
    ROW = "row"
    PIECE = "piece"
    STEP = "step"


class Progress(StatusModel):
    """The live state of the running step, as its pod reported it."""

    step: str = Field(
        description="The step that reports: download, add-tokens, reload, load-dataset, train or save.", max_length=32
    )
    summary: str = Field("", description="The progress column of kubectl get.", max_length=64)
    remaining: str = Field("", description="The remaining-time column of kubectl get.", max_length=32)
    percent: int = Field(0, description="Share of the step that is done.", ge=0, le=100)
    current: int | None = Field(None, description="How many units are done.", ge=0)
    total: int | None = Field(None, description="How many units there are.", ge=0)
    unit: Unit | None = Field(None, description="What is counted.")
    phase: str | None = Field(None, description="The phase of training: EmbeddingWarmup, then Training.", max_length=32)
    loss: float | None = Field(None, description="Training loss of the last logged step.")
    validation_loss: float | None = Field(None, description="Loss on the held-out rows.")
    learning_rate: float | None = Field(None, description="Current learning rate.")
    tokens_per_second: float | None = Field(None, description="Tokens trained per second.")
    checkpoint_step: int | None = Field(None, description="Step of the newest complete checkpoint.", ge=0)
    estimated_completion_time: datetime | None = Field(
        None, description="When the step will be done, if it goes on like this."
    )
    last_update_time: datetime | None = Field(None, description="When the pod last reported.")
    last_advance_time: datetime | None = Field(None, description="When `current` last changed.")


class ModelStatus(StatusModel):
    """The base model as it was downloaded."""

    commit: str | None = Field(None, description="The commit that the revision resolved to.", max_length=128)
    size_bytes: int | None = Field(None, description="Bytes of the files that were needed.", ge=0)
    reused: bool | None = Field(None, description="Whether the files were there already.")
    from_cache: bool | None = Field(
        None, description="Whether the files came from the cache; absent when the job has none."
    )
    dequantized: Text | None = Field(
        None,
        description="What quantised weights were written out as in this job's copy, and the bytes before and after.",
    )
    warnings: list[Text] | None = Field(
        None,
        description="What was changed in this job's copy: how transformers reads the tokenizer, scales that were left "
        "out.",
        max_length=4,
    )


class CharactersPerToken(StatusModel):
    """How compactly the tokenizer writes the domain; more is better."""

    before: float = Field(description="Before the tokens were added.")
    after: float = Field(description="After the tokens were added.")


class TokenProbability(StatusModel):
    """How likely a new token is as the next token."""

    token: str = Field(description="The token.", max_length=512)
    without_prompt: float | None = Field(None, description="After tokens.probePrompt, without the generation prompt.")
    with_prompt: float | None = Field(None, description="After tokens.probePrompt and the generation prompt.")
    without_prompt_before: float | None = Field(
        None, description="withoutPrompt of the same text in the base model, which writes it in several pieces."
    )
    with_prompt_before: float | None = Field(None, description="withPrompt of the same text in the base model.")


class TokensStatus(StatusModel):
    """What token addition did."""

    added: int = Field(0, description="Tokens that are new.", ge=0)
    already_present: int = Field(0, description="Tokens that the tokenizer had already.", ge=0)
    started_anew: int | None = Field(None, description="Those of them whose rows started anew (reuse).", ge=0)
    vocabulary_size: int | None = Field(None, description="Tokens of the extended tokenizer.", ge=0)
    vocabulary_size_before: int | None = Field(None, description="Tokens of the base tokenizer.", ge=0)
    embedding_rows: int | None = Field(None, description="Rows of the extended embedding matrix.", ge=0)
    embedding_rows_before: int | None = Field(None, description="Rows of the base embedding matrix.", ge=0)
    learned: int | None = Field(None, description="New tokens that were learned from the corpus.", ge=0)
    characters_per_token: CharactersPerToken | None = Field(
        None, description="Measured on a tenth of the corpus that nothing was learned from."
    )
    protected_characters: int | None = Field(
        None, description="Characters of protected text, all of which was found to be encoded as before.", ge=0
    )
    proof: Text | None = Field(None, description="What was proven about the extended model before any GPU was used.")
    probabilities: list[TokenProbability] | None = Field(
        None, description="How likely new tokens are right after their initialisation.", max_length=16
    )
    from_cache: bool | None = Field(
        None, description="Whether the extended model came from the cache; absent when the job has none."
    )
    warnings: list[Text] | None = Field(None, description="What may surprise later.", max_length=16)


class SourceStatus(StatusModel):
    """What one source of the dataset turned out to be."""

    format: str = Field(
        description="What its rows are; told by their columns where the spec does not say.", max_length=64
    )
    rows: int = Field(0, description="Rows that were read.", ge=0)
    examples: int = Field(0, description="Examples in the training data, repeated ones counted each time.", ge=0)


Counts = Annotated[dict[str, Annotated[int, Field(ge=0)]], Field(json_schema_extra={"maxProperties": 16})]
"""How many, for each reason."""


class DatasetStatus(StatusModel):
    """What the dataset turned out to be."""

    sources: list[SourceStatus] | None = Field(
        None, description="The sources, in the spec's order; one of validation's own is last.", max_length=33
    )
    examples: int = Field(0, description="Examples to train on.", ge=0)
    validation_examples: int = Field(0, description="Examples held out.", ge=0)
    validation_duplicates: int | None = Field(
        None,
        description="Rows to train on that occur in validation too: held out together with it, or kept, as "
        "validation.duplicates says.",
        ge=0,
    )
    packed_rows: int | None = Field(
        None, description="Rows of up to maxLength tokens that the examples were packed into.", ge=0
    )
    tokens: int = Field(0, description="Tokens of all examples.", ge=0)
    trained_tokens: int = Field(0, description="Tokens that carry the loss.", ge=0)
    truncated: int = Field(0, description="Rows that were shortened to maxLength.", ge=0)
    truncated_by: Counts | None = Field(
        None, description="How: LostTurns (whole turns at the end) or CutIntoPieces (text, nothing lost)."
    )
    dropped: int = Field(0, description="Rows that could not be used.", ge=0)
    dropped_by: Counts | None = Field(
        None, description="Why: TooLong (no whole answer within maxLength) or NothingToLearn (no answer in it)."
    )
    turns_by: Counts | None = Field(
        None,
        description="The assistant's turns that are not simply learned as they stand: MarkedNotToLearn (weight 0, "
        "train or loss false), ThoughtLeftOut (the template shows no thought of an earlier turn), NotAsPrompted (the "
        "generation prompt opens or closes a thought, and the last turn begins otherwise), OtherEndMarker (the "
        "template ends the turn with another marker than plain answers), NoEndMarker (it ends it with none).",
    )
    unused_fields: list[Text] | None = Field(
        None,
        description="Columns of the rows and fields of messages that no example was made of, for each source.",
        max_length=33,
    )
    end_tokens: list[Text] | None = Field(
        None,
        description="Special tokens that end what is learned, the most frequent first: the published model stops at "
        "them. Empty: the data teach no end.",
        max_length=16,
    )
    empty_answers: int | None = Field(
        None, description="Answers of the training data that say nothing: an end token by itself.", ge=0
    )
    unused_tokens: list[Text] | None = Field(
        None, description="New tokens that never occur in the data and so stay untrained.", max_length=32
    )
    warnings: list[Text] | None = Field(
        None,
        description="What may surprise later: rows that engines which read tokenizer.model would read otherwise.",
        max_length=16,
    )
    digest: str | None = Field(None, description="SHA-256 of ids and labels.", max_length=80)


class CheckpointStatus(StatusModel):
    """The newest complete checkpoint."""

    step: int = Field(description="The optimizer step after which it was written.", ge=0)
    time: datetime | None = Field(None, description="When it was complete.")


class TrainingStatus(StatusModel):
    """What training came to; live numbers are in `progress`."""

    steps: int | None = Field(None, description="Optimizer steps done, those of an embedding warm-up included.", ge=0)
    seconds: float | None = Field(
        None, description="Seconds of the training loop that led to the result, each step counted once.", ge=0
    )
    stopped_early: bool | None = Field(None, description="Whether earlyStopping ended it before its last step.")
    loss: float | None = Field(None, description="Mean training loss over the last logged steps.")
    validation_loss: float | None = Field(None, description="Loss on the held-out rows after training.")
    checkpoint: CheckpointStatus | None = Field(None, description="The newest complete checkpoint.")
    adapted: list[Text] | None = Field(
        None, description="What LoRA adapted: names of weights, those of all layers once.", max_length=16
    )
    left_out: list[Text] | None = Field(
        None, description="Linear layers and experts that LoRA did not adapt.", max_length=16
    )
    not_trained: list[Text] | None = Field(
        None,
        description="Tensors of the model's files that the training did not touch, published as they were: what "
        "transformers has no use for (layers that predict further tokens), and parts that text does not reach.",
        max_length=16,
    )
    exact: bool | None = Field(
        None, description="Whether every resumption was bit-exact: same libraries, threads, CPU capability, world size."
    )
    warnings: list[Text] | None = Field(
        None, description="What went otherwise than it should: damaged checkpoints, what differed.", max_length=16
    )


class AttemptOutcome(OpenEnum):
    """How an attempt ended."""

    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    PREEMPTED = "Preempted"
    SUSPENDED = "Suspended"
    USER_ERROR = "UserError"
    OUT_OF_MEMORY = "OutOfMemory"
    NODE_LOST = "NodeLost"
    CRASHED = "Crashed"
    STOPPED = "Stopped"
    """By the operator, which says why in the reason; costs nothing."""

    NEVER_STARTED = "NeverStarted"
    """Its pods did not all start in time; costs nothing, and the next one waits a while."""


class Attempt(StatusModel):
    """One try of a stage: one Job."""

    stage: str = Field(description="prepare, train or save.", max_length=16)
    number: int = Field(description="Counted from 1 within the stage.", ge=1)
    outcome: AttemptOutcome = Field(description="How it ended.")
    reason: str = Field("", description="Why, in one word.", max_length=128)
    message: str = Field("", description="Why, in the words of whoever knew.", max_length=1024)
    job_uid: str | None = Field(None, description="The UID of its Job, by which its pods are known.", max_length=64)
    pod: str | None = Field(None, description="Its pod.", max_length=253)
    node: str | None = Field(None, description="Where it ran.", max_length=253)
    exit_code: int | None = Field(None, description="Exit code of the container that ended it.")
    resumed_from_step: int | None = Field(None, description="The checkpoint that it went on from.", ge=0)
    checkpoint_step: int | None = Field(None, description="The newest checkpoint that it left.", ge=0)
    start_time: datetime | None = Field(None, description="When its Job was created.")
    end_time: datetime | None = Field(None, description="When its last pod was terminal or gone.")


class Attempts(StatusModel):
    """All tries so far.

    Goodput is the share of the training pods' time that went into steps of the result: `status.training.seconds` by
    `trainingSeconds`. Below 1 it shows what starting, loading, and steps that a preemption or a failure undid have
    cost. Queueing, pauses and suspension are in neither of the two.
    """

    count: int = Field(0, description="Training attempts, the running one included.", ge=0)
    failures: int = Field(0, description="Failures in a row without a new checkpoint, of the current stage.", ge=0)
    preemptions: int = Field(
        0, description="Preemptions so far, since the last retry; they cost nothing of retry.limit.", ge=0
    )
    retried_at: str | None = Field(None, description="The spec.retry.at that was taken up last.", max_length=64)
    training_seconds: int | None = Field(
        None, description="Seconds in which training pods ran, over all attempts.", ge=0
    )
    goodput: float | None = Field(
        None,
        description="Share of trainingSeconds that led to the result, once there is one; the rest was starting, "
        "loading, and work that was undone.",
        ge=0,
        le=1,
    )
    retry_after: datetime | None = Field(None, description="When the next attempt starts.")
    history: list[Attempt] | None = Field(
        None, description="The newest attempts, newest last.", max_length=MAX_ATTEMPTS
    )


class OutputStatus(StatusModel):
    """The result."""

    uri: str | None = Field(None, description="Where it lies.", max_length=512)
    size_bytes: int | None = Field(None, description="Its size.", ge=0)
    sha256: str | None = Field(None, description="SHA-256 over the weights' files, in name order.", max_length=80)
    warnings: list[Text] | None = Field(None, description="What may surprise whoever serves it.", max_length=16)


class FineTuneJobStatus(StatusModel):
    """What is known about the job."""

    phase: Phase | None = Field(None, description="Where the job stands, in one word.")
    message: str | None = Field(None, description="What the job waits for, or why it failed.", max_length=4096)
    observed_generation: int | None = Field(
        None, description="The generation of the spec that this status is about.", ge=0
    )
    start_time: datetime | None = Field(
        None, description="When the operator took the job up; the spec is frozen from then on."
    )
    completion_time: datetime | None = Field(None, description="When the job finished, either way.")
    active_seconds: int | None = Field(
        None, description="Seconds in which pods ran, up to activeSince, since the start or the last retry.", ge=0
    )
    active_since: datetime | None = Field(None, description="Since when pods run; absent while none does.")
    spec_digest: str | None = Field(None, description="Digest of the spec as it was taken up.", max_length=80)
    operator: str | None = Field(
        None,
        description="The operator that took the job up, by its value of the label finetune.dev/operator, empty for "
        "the one without a name: another one leaves the job alone, whatever the label says later.",
        max_length=63,
    )
    conditions: list[Condition] | None = Field(
        None,
        description="Observations, one for each type.",
        max_length=16,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    progress: Progress | None = Field(None, description="The live state of the running step.")
    model: ModelStatus | None = Field(None, description="The base model.")
    tokens: TokensStatus | None = Field(None, description="The new tokens.")
    dataset: DatasetStatus | None = Field(None, description="The dataset.")
    training: TrainingStatus | None = Field(None, description="What training came to.")
    attempts: Attempts | None = Field(None, description="All tries so far.")
    output: OutputStatus | None = Field(None, description="The result.")
