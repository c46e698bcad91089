"""The step `add-tokens`: the job's tokens enter tokenizer and embedding matrices."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.api.contract import ExitCode, Layout, Step, StepJob, StepReport
from finetune.api.spec import OutputFormat, Tokens
from finetune.api.status import TokensStatus
from finetune.steps.cache import EXTENDED, cached
from finetune.steps.model_files.checkpoint import Checkpoint, NoSafetensors, read_checkpoint
from finetune.steps.model_files.config import UNQUANTISED
from finetune.steps.model_files.copying import take_file
from finetune.steps.model_files.safetensors_file import InvalidSafetensors
from finetune.steps.runtime.disk import room_for
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.runtime.memory import require_memory
from finetune.steps.runtime.progress import Progress
from finetune.steps.token_matrices.architectures import matrices_of
from finetune.steps.token_matrices.matrices import Matrices, NotEditable
from finetune.steps.tokenizer_files import apart
from finetune.steps.tokenizer_files.agreement import Disagreement, around
from finetune.steps.tokenizer_files.as_it_is import proven
from finetune.steps.tokens.beside_weights import write_beside_weights
from finetune.steps.tokens.editor import columns_of, extend, extended_size, row_norm
from finetune.steps.tokens.initialise import Normal, factor_bytes
from finetune.steps.tokens.learn.job import LearnedTokens, learned_for, lesson_of, moving
from finetune.steps.tokens.plan import Plan, draws, make_plan, with_learned
from finetune.steps.tokens.requested import Requested, requested_tokens
from finetune.steps.tokens.vocabulary import InvalidVocabulary, Vocabulary
from finetune.steps.workspace.base_model import identity
from finetune.steps.workspace.staging import inputs_of, publish
from finetune.steps.workspace.token_record import write_record

ADAPTER = (
    "spec.output.format: Adapter: an adapter with rows of new tokens is loaded by peft alone, on the model that "
    "has them; servers that take adapters (llama.cpp, vLLM) take none with new rows: publish it Merged for them"
)

COMPARED = 4096
"""New tokens around which the readings of the tokenizer's files are compared with each other; reload looks at each."""

FORMAT = 3
"""Raise it when the same tokens would give other files: the cache then makes its extended models anew."""

log = logging.getLogger(__name__)


def run(job: StepJob, layout: Layout) -> StepReport:
    """Publish `prepared/`, the model with the job's tokens."""
    tokens = job.spec.tokens
    if tokens is None:
        return StepReport(step=Step.ADD_TOKENS, result=TokensStatus().wire())
    requested = asked_for(job, layout)
    inputs = {
        "model": inputs_of(layout.model),
        "tokens": [item.token.wire() for item in requested],
        "init": tokens.init and tokens.init.wire(),
        "padToMultipleOf": tokens.pad_to_multiple_of,
        "seed": job.spec.training.seed if draws(requested, tokens.init) else None,
        "learn": tokens.learn and lesson_of(tokens.learn, layout),
    }
    with Progress(Step.ADD_TOKENS, "byte") as progress:

        def write(partial: Path) -> dict[str, Any]:
            return add_tokens(job, layout, partial, requested, progress)

        if tokens.learn and (fields := moving(tokens.learn)):
            log.info("not shared through the cache: set %s.revision to a commit for that", fields[0])
            result = publish(layout.prepared, inputs, write)
        else:
            key = {**inputs, "format": FORMAT}
            shared = cached(layout, EXTENDED, lambda: {**key, "model": identity(job, layout)}, write)
            result = publish(layout.prepared, inputs, shared)
    result.pop("reused", None)
    if result.get("added") and job.spec.output and job.spec.output.format == OutputFormat.ADAPTER:
        result["warnings"] = [ADAPTER, *result.get("warnings", [])][:16]
    return StepReport(step=Step.ADD_TOKENS, result=result)


def asked_for(job: StepJob, layout: Layout) -> list[Requested]:
    """The tokens that the job lists, checked; raises StepFailure for what is wrong with them, and with that for all
    that the model finds wrong with the others."""
    if job.spec.tokens is None:
        return []
    requested, faults = requested_tokens(job.spec.tokens, layout)
    if faults:
        planned(job, layout, requested, faults)
    return requested


def planned(
    job: StepJob, layout: Layout, requested: Sequence[Requested], faults: Sequence[StepFailure] = ()
) -> tuple[Checkpoint, Matrices, Plan]:
    """What is to be done to the model; raises StepFailure for whatever the user has to change about model or tokens,
    `faults` of theirs among it."""
    tokens, model = job.spec.tokens or Tokens(add=[]), layout.model
    try:
        checkpoint = read_checkpoint(model)
        matrices = matrices_of(checkpoint)
        vocabulary = Vocabulary.read(model)
        plan = make_plan(
            vocabulary, matrices, requested, tokens.init, tokens.pad_to_multiple_of, job.spec.training.seed, faults
        )
    except (NotEditable, NoSafetensors) as error:
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "UnsupportedModel",
            f"spec.model: tokens cannot be added to this checkpoint: {error}",
            UNQUANTISED
            if "quantised" in str(error)
            else "Use an unquantised safetensors checkpoint of a supported family, or remove spec.tokens.",
        ) from error
    except InvalidVocabulary as error:
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "UnsupportedTokenizer",
            f"spec.model: tokens cannot be added to this tokenizer: {error}",
            "Use a model with a consistent tokenizer.json, or remove spec.tokens.",
        ) from error
    except (InvalidSafetensors, FileNotFoundError, ValueError) as error:
        raise StepFailure(
            ExitCode.BAD_DATA,
            "CorruptModel",
            f"spec.model: {error}",
            "Replace the model's file, delete and apply the job anew.",
        ) from error
    return checkpoint, matrices, plan


def add_tokens(
    job: StepJob, layout: Layout, target: Path, requested: Sequence[Requested], progress: Progress
) -> dict[str, Any]:
    """Write the model with its further tokens into the folder `target` and return a TokensStatus's wire form.

    Raises StepFailure for whatever the user has to change: tokens, corpus, model, size of the workspace.
    """
    checkpoint, matrices, plan = planned(job, layout, requested)
    learned, tokens = None, job.spec.tokens
    if tokens is not None and tokens.learn is not None:
        learned = learned_for(tokens.learn, plan.vocabulary, layout, target, progress)
        plan = with_learned(plan, learned.added, tokens.init, tokens.pad_to_multiple_of, job.spec.training.seed)
    _log(plan)
    size = extended_size(checkpoint, matrices, plan.rows)
    norms = list(_norms(checkpoint, matrices, plan))
    if not plan.inits:
        _take_all(layout.model, target)
        return _status(plan, matrices.rows, learned, norms).wire()
    if any(isinstance(init, Normal) for init in plan.inits.values()):
        columns = max(columns_of(checkpoint.tensors[name]) for name in matrices.names)
        require_memory(factor_bytes(columns), "the covariance of the embedding's columns (init.sample: Normal)")
    done = 0

    def count(size_done: int) -> None:
        nonlocal done
        done += size_done
        progress.update(min(done, size), size, unit="byte")

    with room_for(target, size, "the model with its new tokens"):
        tokenizer = plan.vocabulary.tokenizer
        left_out = write_beside_weights(
            layout.model, target, tokenizer, plan.added, plan.rows, generic_class=bool(plan.mended)
        )
        settled = _settled(target, plan)
        extend(checkpoint, matrices, plan.rows, plan.inits, plan.trained_rows, target, count)
        write_record(target, plan.records)
    warnings = [*norms, *left_out, *settled]
    return _status(plan, matrices.rows, learned, warnings).wire()


def _settled(target: Path, plan: Plan) -> list[str]:
    """What had to change for transformers to read the new tokenizer as tokenizer.json says; raises StepFailure when
    nothing helps."""
    if proven(target, plan.vocabulary.tokenizer):
        return []
    try:
        mended = apart.complete(
            target, around(item.token.content for item in plan.added[:COMPARED] if item.piece is None)
        )
    except Disagreement as error:
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "TokenizersDisagree",
            "spec.model: the tokenizer with the new tokens would be trained with other ids than it is served with: "
            f"{error}, whatever class tokenizer_config.json names",
            "transformers builds this tokenizer by rules of its own for the model_type in config.json: use a base of "
            "another model_type.",
        ) from error
    return [] if mended is None else [mended]


def _status(plan: Plan, rows_before: int, learned: LearnedTokens | None, warnings: Sequence[str]) -> TokensStatus:
    everything = [*plan.warnings, *(learned.warnings if learned else ()), *warnings]
    if len(everything) > 16:
        everything = [*everything[:15], f"and {len(everything) - 15} more warnings, in the log of add-tokens"]
    return TokensStatus(
        added=len(plan.added),
        already_present=plan.already_present,
        started_anew=len(plan.reused) or None,
        vocabulary_size=plan.vocabulary.size,
        vocabulary_size_before=plan.size_before,
        embedding_rows=plan.rows,
        embedding_rows_before=rows_before,
        learned=learned and len(learned.added),
        characters_per_token=learned and learned.characters_per_token,
        protected_characters=learned and learned.protected,
        warnings=everything or None,
    )


def _norms(checkpoint: Checkpoint, matrices: Matrices, plan: Plan) -> Iterator[str]:
    """What to say of tokens that were there: how large their rows are, which tells whether they were ever trained."""
    usual = row_norm(checkpoint, matrices.names[0], None, plan.trained_rows)
    for items, said in (
        (plan.reused, "was there already and starts anew (reuse)"),
        (plan.ignored, "is there already and keeps its row, its init is not used: set reuse: true for a new start"),
    ):
        for item in items:
            if item.id < matrices.rows:
                norm = row_norm(checkpoint, matrices.names[0], item.id, plan.trained_rows)
                yield f"{item.token.content!r} {said}; its row had norm {norm:.3g}, tokens have {usual:.3g} on average"


def _take_all(model: Path, target: Path) -> None:
    for path in sorted(model.rglob("*")):
        inner = path.relative_to(model)
        if path.is_file() and not inner.parts[0].startswith((".", "finetune-")):
            (target / inner).parent.mkdir(parents=True, exist_ok=True)
            take_file(path, target / inner, lambda _: None, link=True)


def _log(plan: Plan) -> None:
    for warning in plan.warnings:
        log.warning("%s", warning)
    for record in plan.records[:100]:
        log.info("%r is token %d, starting from %s", record.content, record.id, record.init)
    if plan.mended:
        log.info("the tokenizer's decoder now keeps %d tokens that it would have broken", len(plan.mended))
