"""What will be done about a job's tokens, decided in full before a byte is written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.api.contract import ExitCode
from finetune.api.spec import MeanOf, TokenInit
from finetune.steps.failure import StepFailure
from finetune.steps.tokens.architectures import Matrices
from finetune.steps.tokens.byte_level import keep_decodable
from finetune.steps.tokens.initialise import Copy, Init, Mean, VocabularyMean
from finetune.steps.tokens.record import TokenRecord
from finetune.steps.tokens.requested import Requested
from finetune.steps.tokens.vocabulary import Added, Collision, Vocabulary


@dataclass(frozen=True)
class Plan:
    """The extended vocabulary and how each new row starts.

    `trained_rows` are the rows of the old vocabulary, the ones that the vocabulary's mean is taken of. `mended` are
    tokens for which the tokenizer's decoder had to change.
    """

    vocabulary: Vocabulary
    added: Sequence[Added]
    already_present: int
    size_before: int
    rows: int
    trained_rows: int
    inits: Mapping[int, Init]
    records: Sequence[TokenRecord]
    mended: Sequence[str]
    warnings: Sequence[str]


def make_plan(
    vocabulary: Vocabulary,
    matrices: Matrices,
    requested: Sequence[Requested],
    default: TokenInit | None,
    multiple: int,
) -> Plan:
    """Extend `vocabulary` (in memory) and say how the rows start.

    Raises StepFailure for a token that cannot be added or an init that names no token.
    """
    size_before, length_before = vocabulary.size, vocabulary.length
    present = vocabulary.ids_of(item.content for item in requested)
    new = [item for item in requested if item.content not in present]
    sources = {item.content: _source(item, default, vocabulary) for item in new}
    added = _add(vocabulary, new)
    mended = keep_decodable(vocabulary.tokenizer, (item.token.content for item in added))
    for item, came_back in vocabulary.unfaithful(added):
        place = next(asked.place for asked in new if asked.content == item.token.content)
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "InvalidToken",
            f"{place}: {item.token.content!r} would come back from this model's tokenizer as {came_back!r}",
            "Choose a text that the tokenizer keeps; or leave `normalized` false.",
        )
    inits: dict[int, Init] = {}
    records, warnings = [], []
    for item in added:
        init, described = _init(item, sources[item.token.content])
        if init == VocabularyMean() and not item.pieces:
            warnings.append(
                f"{item.token.content!r} has no pieces in the old tokenizer; it starts as the vocabulary's mean"
            )
        inits[item.id] = init
        records.append(TokenRecord(item.token.content, item.id, item.token.special, item.token.normalized, described))
    if length_before > matrices.rows:
        warnings.append(
            f"the base tokenizer has ids up to {length_before - 1}, its embedding only {matrices.rows} rows: "
            "the rows that were missing start as the vocabulary's mean"
        )
    rows = matrices.rows
    if added:
        rows = max(rows, -(-vocabulary.length // multiple) * multiple)
    return Plan(
        vocabulary=vocabulary,
        added=added,
        already_present=len(present),
        size_before=size_before,
        rows=rows,
        trained_rows=min(length_before, matrices.rows),
        inits=inits,
        records=records,
        mended=mended,
        warnings=[*_shared_sources(sources), *warnings],
    )


Source = tuple[TokenInit | None, int | None]
"""The init as the user wrote it, and the id that copyOf names."""


def _source(item: Requested, default: TokenInit | None, vocabulary: Vocabulary) -> Source:
    init, field = item.init(default)
    if init is None:
        return None, None
    if init.sample is not None or init.mean_of == MeanOf.DESCRIPTION:
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "NotImplemented",
            f"{field}: {init.sample or init.mean_of} is not implemented yet",
            "Use copyOf, meanOf: Pieces or meanOf: Vocabulary.",
        )
    if init.copy_of is None:
        return init, None
    id_ = vocabulary.id_of(init.copy_of)
    if id_ is None:
        near = ", ".join(repr(name) for name in vocabulary.similar(init.copy_of))
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "UnknownToken",
            f"{field}.copyOf: {init.copy_of!r} is not one token of the base model's tokenizer",
            f"Did you mean {near}?" if near else "Name a token that the base model has.",
        )
    return init, id_


def _add(vocabulary: Vocabulary, new: Sequence[Requested]) -> list[Added]:
    try:
        return vocabulary.add([item.token for item in new])
    except Collision as collision:
        place = next(item.place for item in new if item.content == str(collision))
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "TokenCollision",
            f"{place}: {str(collision)!r} is the tokenizer's own name of a piece that is not this text",
            "Choose a text that differs, for example with a marker around it.",
        ) from collision


def _init(item: Added, source: Source) -> tuple[Init, dict[str, Any]]:
    init, id_ = source
    if init is not None and id_ is not None:
        return Copy(id_), {"copyOf": init.copy_of, "row": id_}
    if (init is not None and init.mean_of == MeanOf.VOCABULARY) or not item.pieces:
        return VocabularyMean(), {"meanOf": "Vocabulary"}
    described = {"meanOf": "Pieces", "rows": list(item.pieces), "leadingSpace": item.leading_space}
    return Mean(item.pieces), described


def _shared_sources(sources: Mapping[str, Source]) -> list[str]:
    copies: dict[str, list[str]] = defaultdict(list)
    for content, (init, id_) in sources.items():
        if init is not None and init.copy_of is not None and id_ is not None:
            copies[init.copy_of].append(content)
    return [
        f"{len(contents)} new tokens copy {source!r} ({_some(contents)}): they start equal and share its probability, "
        f"1/{len(contents) + 1} each. Give each a source of its own."
        for source, contents in copies.items()
        if len(contents) > 1
    ]


def _some(contents: Sequence[str]) -> str:
    return ", ".join(contents[:4]) + (", ..." if len(contents) > 4 else "")
