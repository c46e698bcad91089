"""`finetune-step add-tokens --dry-run`: what the step would do, token by token; nothing is written."""

from __future__ import annotations

from finetune.api.contract import Layout, Step, StepJob, StepReport
from finetune.api.token_plan import Piece, PlannedMatrix, PlannedToken, TokenPlan
from finetune.steps.tokens.editor import extended_size
from finetune.steps.tokens.step import asked_for, planned
from finetune.steps.tokens.vocabulary import Vocabulary

UNLEARNED = "the pieces of spec.tokens.learn are not among these: they are learned when the step runs"


def run(job: StepJob, layout: Layout) -> StepReport:
    """Report a TokenPlan, or the failure that add-tokens would end with."""
    requested = asked_for(job, layout)
    checkpoint, matrices, plan = planned(job, layout, requested)
    vocabulary = plan.vocabulary
    new = {item.id for item in plan.added}
    reused = {item.id for item in plan.reused}
    present = vocabulary.ids_of(item.content for item in requested)
    tensors = checkpoint.tensors
    result = TokenPlan(
        tokens=[
            PlannedToken(
                content=item.token.content,
                id=item.id,
                special=item.token.special,
                pieces=_pieces(vocabulary, item.pieces),
                leading_space=item.leading_space,
                init=record.init,
            )
            for item, record in zip([*plan.added, *plan.reused], plan.records, strict=True)
        ],
        already_present=[Piece(id=id_, text=content) for content, id_ in present.items() if id_ not in new | reused],
        vocabulary_size_before=plan.size_before,
        vocabulary_size=vocabulary.size,
        matrices=[
            PlannedMatrix(
                name=name,
                dtype=tensors[name].dtype,
                shape_before=list(tensors[name].shape),
                shape=[plan.rows, *tensors[name].shape[1:]],
            )
            for name in matrices.names
        ],
        size_bytes_before=checkpoint.size,
        size_bytes=extended_size(checkpoint, matrices, plan.rows),
        warnings=[*plan.warnings, *([UNLEARNED] if job.spec.tokens and job.spec.tokens.learn else [])],
    )
    return StepReport(step=Step.ADD_TOKENS, result=result.wire())


def _pieces(vocabulary: Vocabulary, ids: tuple[int, ...]) -> list[Piece]:
    return [Piece(id=id_, text=vocabulary.text_of(id_)) for id_ in ids]
