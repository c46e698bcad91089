"""What will be done about a job's tokens, decided in full before a byte is written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from finetune.api.contract import ExitCode
from finetune.api.spec import MeanOf, Sample, TokenInit
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.token_matrices.matrices import Matrices
from finetune.steps.tokens.byte_level import keep_decodable
from finetune.steps.tokens.initialise import Copy, Init, Mean, Noisy, Normal, VocabularyMean
from finetune.steps.tokens.requested import Requested
from finetune.steps.tokens.vocabulary import Added, Vocabulary, hidden_by_servers
from finetune.steps.workspace.token_record import TokenRecord

LISTED = 10
"""Problems that a failure tells; the others it counts."""


@dataclass(frozen=True)
class Plan:
    """The extended vocabulary and how each new row starts.

    `trained_rows` are the rows of the old vocabulary, the ones that the vocabulary's mean is taken of. `mended` are
    tokens for which the tokenizer's decoder had to change. `reused` are tokens that were there and start anew,
    `ignored` those that were there and keep their rows although the user wrote an init for them.
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
    reused: Sequence[Added] = ()
    ignored: Sequence[Added] = ()


def make_plan(
    vocabulary: Vocabulary,
    matrices: Matrices,
    requested: Sequence[Requested],
    default: TokenInit | None,
    multiple: int,
    seed: int = 0,
    faults: Sequence[StepFailure] = (),
) -> Plan:
    """Extend `vocabulary` (in memory) and say how the rows start; `seed` is that of draws and noise.

    Raises one StepFailure for all tokens that cannot be added and inits that name no token, and for `faults`, what is
    known to be wrong already.
    """
    size_before, length_before = vocabulary.size, vocabulary.length
    present = vocabulary.ids_of(item.content for item in requested)
    new = [item for item in requested if item.content not in present]
    problems = [*faults, *_absent(requested, present)]
    again = [item for item in requested if item.content in present and item.token.reuse]
    sources: dict[str, Source] = {}
    for asked in [*new, *again]:
        try:
            sources[asked.content] = _source(asked, default, vocabulary)
        except StepFailure as failure:
            problems.append(failure)
    collisions = vocabulary.collisions(item.token for item in new)
    problems += [_collision(item) for item in new if item.content in collisions]
    added = vocabulary.add([item.token for item in new if item.content not in collisions])
    mended = keep_decodable(vocabulary.tokenizer, (item.token.content for item in added))
    places = {item.content: item.place for item in new}
    for unkept, came_back in vocabulary.unfaithful(added):
        content = unkept.token.content
        problems.append(
            StepFailure(
                ExitCode.BAD_CONFIGURATION,
                "InvalidToken",
                f"{places[content]}: {content!r} would come back from this model's tokenizer as {came_back!r}",
                "Choose a text that the tokenizer keeps; or leave `normalized` false.",
            )
        )
    if problems:
        raise _all_of(problems)
    inits: dict[int, Init] = {}
    equal: dict[Init, list[str]] = defaultdict(list)
    records: list[TokenRecord] = []
    warnings = list(vocabulary.of_another_kind(item.token for item in requested if item.content in present))
    warnings += vocabulary.needless(added)
    warnings += vocabulary.spaced_apart(added)
    warnings += vocabulary.stripped_by_servers(added)
    warnings += hidden_by_servers(added)
    reused = [Added(item.token, present[item.content], (), leading_space=False) for item in again]
    for item in [*added, *reused]:
        source = sources[item.token.content]
        init, described = _init(item, source, (seed, item.id))
        if item in reused:
            described = {**described, "reused": True}
        if source.init.mean_of == MeanOf.PIECES and not item.pieces:
            warnings.append(
                f"{item.token.content!r} has no pieces in the old tokenizer; it starts as the vocabulary's mean"
            )
        inits[item.id] = init
        equal[init].append(item.token.content)
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
        warnings=[*_equal_starts(equal, sources), *warnings],
        reused=reused,
        ignored=[
            Added(item.token, present[item.content], (), leading_space=False)
            for item in requested
            if item.content in present and item.token.init is not None and not item.token.reuse
        ],
    )


def _absent(requested: Iterable[Requested], present: Mapping[str, int]) -> Iterator[StepFailure]:
    for item in requested:
        if item.token.reuse and item.content not in present:
            yield StepFailure(
                ExitCode.BAD_CONFIGURATION,
                "TokenNotThere",
                f"{item.place}.reuse: {item.content!r} is not one token of the base model's tokenizer",
                "Check how the tokenizer writes it; or leave out `reuse`, and it is added as a new token.",
            )


def with_learned(plan: Plan, learned: Sequence[Added], default: TokenInit | None, multiple: int, seed: int = 0) -> Plan:
    """The plan with pieces that were learned; `plan.vocabulary` has them already."""
    if not learned:
        return plan
    inits, records = dict(plan.inits), list(plan.records)
    source = _source(Requested(learned[0].token, "spec.tokens.learn"), default, plan.vocabulary)
    for item in learned:
        inits[item.id], described = _init(item, source, (seed, item.id))
        records.append(TokenRecord(item.token.content, item.id, False, False, described, item.piece))
    rows = max(plan.rows, -(-plan.vocabulary.length // multiple) * multiple)
    return replace(plan, added=[*plan.added, *learned], rows=rows, inits=inits, records=records)


def draws(requested: Iterable[Requested], default: TokenInit | None) -> bool:
    """Whether any row depends on the job's seed."""
    inits = (default, *(item.init(default)[0] for item in requested))
    return any(init is not None and (init.sample is not None or init.noise is not None) for init in inits)


class Source(NamedTuple):
    """The init as the user wrote it, and the rows that copyOf or a description name: looked up in the old tokenizer."""

    init: TokenInit
    rows: tuple[int, ...] = ()
    leading_space: bool = False


def _source(item: Requested, default: TokenInit | None, vocabulary: Vocabulary) -> Source:
    init, field = item.init(default)
    if init is None:
        return Source(TokenInit(mean_of=MeanOf.PIECES))
    if init.mean_of == MeanOf.DESCRIPTION:
        rows, leading_space = vocabulary.pieces(init.text or "")
        if not rows:
            raise StepFailure(
                ExitCode.BAD_CONFIGURATION,
                "InvalidInit",
                f"{field}.text: {init.text!r} has no pieces in the base model's tokenizer",
                "Describe the token in words that the base model has learned.",
            )
        return Source(init, rows, leading_space)
    if init.copy_of is None:
        return Source(init)
    id_ = vocabulary.id_of(init.copy_of)
    if id_ is None:
        near = ", ".join(repr(name) for name in vocabulary.similar(init.copy_of))
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "UnknownToken",
            f"{field}.copyOf: {init.copy_of!r} is not one token of the base model's tokenizer",
            f"Did you mean {near}?" if near else "Name a token that the base model has.",
        )
    return Source(init, (id_,))


def _collision(item: Requested) -> StepFailure:
    return StepFailure(
        ExitCode.BAD_CONFIGURATION,
        "TokenCollision",
        f"{item.place}: {item.content!r} is the tokenizer's own name of a piece that is not this text",
        "Choose a text that differs, for example with a marker around it.",
    )


def _all_of(problems: Sequence[StepFailure]) -> StepFailure:
    """What is wrong with any of the tokens, as one failure; a fault in a default is told once."""
    told = list({problem.error.message: problem for problem in problems}.values())
    if len(told) == 1:
        return told[0]
    which = f", the first {LISTED}" if len(told) > LISTED else ""
    return StepFailure(
        ExitCode.BAD_CONFIGURATION,
        told[0].error.reason,
        f"spec.tokens: {len(told):,} of the tokens cannot be added{which}: "
        + "; ".join(problem.error.message for problem in told[:LISTED]),
        " ".join(dict.fromkeys(problem.error.hint for problem in told[:LISTED] if problem.error.hint)),
    )


def _init(item: Added, source: Source, seed: tuple[int, int]) -> tuple[Init, dict[str, Any]]:
    if source.init.sample == Sample.NORMAL:
        return Normal(seed), {"sample": "Normal", "seed": seed[0]}
    start, described = _start(item, source)
    if source.init.noise is None:
        return start, described
    return Noisy(start, source.init.noise, seed), {**described, "noise": source.init.noise, "seed": seed[0]}


def _start(item: Added, source: Source) -> tuple[Copy | Mean | VocabularyMean, dict[str, Any]]:
    init = source.init
    if init.copy_of is not None:
        return Copy(source.rows[0]), {"copyOf": init.copy_of, "row": source.rows[0]}
    if init.mean_of == MeanOf.DESCRIPTION:
        rows, leading_space = source.rows, source.leading_space
    elif init.mean_of == MeanOf.VOCABULARY or not item.pieces:
        return VocabularyMean(), {"meanOf": "Vocabulary"}
    else:
        rows, leading_space = item.pieces, item.leading_space
    return Mean(rows), {"meanOf": init.mean_of, "rows": list(rows), "leadingSpace": leading_space}


def _equal_starts(equal: Mapping[Init, Sequence[str]], sources: Mapping[str, Source]) -> list[str]:
    """What to say of tokens whose rows would be the same: only training on different contexts tells them apart."""
    warnings = []
    for init, contents in equal.items():
        if len(contents) == 1:
            continue
        remedy = "Give each a source of its own, or set init.noise."
        match init:
            case Copy():
                copied = sources[contents[0]].init.copy_of
                warnings.append(
                    f"{len(contents)} new tokens copy {copied!r} ({_some(contents)}): they start equal and share its "
                    f"probability, 1/{len(contents) + 1} each. {remedy}"
                )
            case Mean() | VocabularyMean():
                mean = "the same pieces" if isinstance(init, Mean) else "the vocabulary"
                warnings.append(
                    f"{len(contents)} new tokens ({_some(contents)}) start as the mean of {mean}, so equal. {remedy}"
                )
    return warnings


def _some(contents: Sequence[str]) -> str:
    return ", ".join(contents[:4]) + (", ..." if len(contents) > 4 else "")
