"""`spec.tokens.learn` of a job: where its corpora lie, what is learned, and what the user reads when it cannot be.

What learning needs is imported by those who learn: jobs that only add tokens start without it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from finetune.api.contract import ExitCode, Layout
from finetune.api.spec import LearnTokens, NewToken
from finetune.api.status import CharactersPerToken, Unit
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.runtime.progress import Progress
from finetune.steps.tokens.vocabulary import Added, Vocabulary
from finetune.steps.workspace.base_model import is_commit

SOURCE, PROTECT = "spec.tokens.learn.source", "spec.tokens.learn.protect"


@dataclass(frozen=True)
class LearnedTokens:
    """The new pieces, what they do to held-out text, and how much protected text was found unchanged."""

    added: Sequence[Added]
    characters_per_token: CharactersPerToken
    protected: int | None
    warnings: Sequence[str]


def lesson_of(wanted: LearnTokens, layout: Layout) -> dict[str, Any]:
    """What the learned pieces depend on, besides the tokenizer."""
    from finetune.steps.rows.sources import identity
    from finetune.steps.tokens.learn.corpus import dataset_source

    return {
        **wanted.wire(),
        "source": identity(dataset_source(wanted.source), layout, SOURCE),
        "protect": wanted.protect and identity(dataset_source(wanted.protect), layout, PROTECT),
    }


def moving(wanted: LearnTokens) -> list[str]:
    """The corpora that may be others tomorrow, a branch of a hub; what is learned from them is never shared."""
    corpora = [(SOURCE, wanted.source), (PROTECT, wanted.protect)]
    return [
        field
        for field, corpus in corpora
        if corpus is not None and corpus.uri.startswith("hf://") and not is_commit(corpus.revision)
    ]


def learned_for(
    wanted: LearnTokens, vocabulary: Vocabulary, layout: Layout, folder: Path, progress: Progress
) -> LearnedTokens:
    """Learn, and let the vocabulary go on with the grown tokenizer. Rows are kept in `folder` for the time of it.

    Raises StepFailure for a corpus that cannot be read and a tokenizer that cannot be continued.
    """
    from finetune.steps.tokens.learn.corpus import Corpus
    from finetune.steps.tokens.learn.families import NotLearnable
    from finetune.steps.tokens.learn.learning import NothingHeldOut, learn

    rows = folder / ".corpus"
    read, found_so_far = (partial(progress.update, unit=unit.value) for unit in (Unit.ROW, Unit.PIECE))
    try:
        corpus = Corpus(wanted.source, layout, rows, SOURCE, read)
        protected = Corpus(wanted.protect, layout, rows, PROTECT, read) if wanted.protect else None
        found = learn(vocabulary.tokenizer, corpus, protected, wanted.size, wanted.minimum_saving, found_so_far)
    except NotLearnable as error:
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "UnsupportedTokenizer",
            f"spec.tokens.learn: the model's tokenizer cannot be continued: {error}",
            "List the tokens in spec.tokens.add or spec.tokens.addFrom.",
        ) from error
    except NothingHeldOut as error:
        raise StepFailure(
            ExitCode.BAD_DATA,
            "CorpusTooSmall",
            f"{SOURCE}: {wanted.source.uri}: {error}",
            "Give it more rows, or longer ones: a long row is cut at the ends of its lines.",
        ) from error
    finally:
        shutil.rmtree(rows, ignore_errors=True)
    if found.pieces:
        vocabulary.replace(found.tokenizer)
    held_out, warnings = found.held_out, []
    if len(found.pieces) < wanted.size:
        warnings.append(
            f"{len(found.pieces):,} pieces were learned instead of {wanted.size:,}: no other saves "
            f"{wanted.minimum_saving:,} tokens of the corpus"
            + (" without touching protected text" if protected else "")
        )
    return LearnedTokens(
        [
            Added(
                NewToken(content=found.content(piece)),
                found.first_id + index,
                piece.parts,
                piece.name.startswith(("Ġ", "▁")),
                piece.name,
            )
            for index, piece in enumerate(found.pieces)
        ],
        CharactersPerToken(
            before=_rounded(held_out.characters / max(held_out.before, 1)),
            after=_rounded(held_out.characters / max(held_out.after, 1)),
        ),
        found.protected,
        warnings,
    )


def _rounded(value: float) -> float:
    return round(value, 4)
