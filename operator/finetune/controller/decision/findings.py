"""What each step found, as the sentence of its condition: `kubectl describe` reads like a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from finetune.api.contract import Step
from finetune.api.status import FineTuneJobStatus


def sentence(step: Step, status: FineTuneJobStatus) -> str:
    """What the step's part of status says, in one line; empty where it says nothing."""
    return ", ".join(_SENTENCES[step](status))


def size(count: int) -> str:
    """Bytes for people, in powers of 1000."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def _download(status: FineTuneJobStatus) -> Iterator[str]:
    if model := status.model:
        yield from [f"commit {model.commit[:12]}"] if model.commit else []
        yield from [size(model.size_bytes)] if model.size_bytes is not None else []
        yield from ["from the cache"] if model.from_cache else ["there already"] if model.reused else []
        yield from (f"warning: {text}" for text in model.warnings or ())


def _add_tokens(status: FineTuneJobStatus) -> Iterator[str]:
    if tokens := status.tokens:
        yield f"{tokens.added:,} added"
        yield from [f"{tokens.already_present:,} present already"] if tokens.already_present else []
        if tokens.vocabulary_size is not None and tokens.vocabulary_size_before is not None:
            yield f"vocabulary {tokens.vocabulary_size_before:,} → {tokens.vocabulary_size:,}"
        if tokens.embedding_rows is not None and tokens.embedding_rows_before is not None:
            yield f"embedding rows {tokens.embedding_rows_before:,} → {tokens.embedding_rows:,}"
        yield from ["from the cache"] if tokens.from_cache else []
        if (held_out := tokens.characters_per_token) is not None:
            yield f"characters per token {held_out.before:.2f} → {held_out.after:.2f}"
        yield from (f"warning: {text}" for text in tokens.warnings or ())


def _reload(status: FineTuneJobStatus) -> Iterator[str]:
    if tokens := status.tokens:
        yield from [tokens.proof] if tokens.proof else []
        for first in (tokens.probabilities or ())[:1]:
            yield from _change(f"P({first.token})", first.without_prompt_before, first.without_prompt)
            yield from _change("after the generation prompt", first.with_prompt_before, first.with_prompt)


def _change(what: str, before: float | None, after: float | None) -> Iterator[str]:
    if after is not None:
        yield f"{what} {after:.3g}" if before is None else f"{what} {before:.3g} → {after:.3g}"


def _load_dataset(status: FineTuneJobStatus) -> Iterator[str]:
    if dataset := status.dataset:
        yield f"{dataset.examples:,} examples"
        yield from [f"{dataset.validation_examples:,} held out"] if dataset.validation_examples else []
        yield f"{dataset.trained_tokens:,} of {dataset.tokens:,} tokens carry loss"
        yield from [f"packed into {dataset.packed_rows:,} rows"] if dataset.packed_rows is not None else []
        yield from [f"{dataset.truncated:,} truncated{_reasons(dataset.truncated_by)}"] if dataset.truncated else []
        yield from [f"{dataset.dropped:,} dropped{_reasons(dataset.dropped_by)}"] if dataset.dropped else []
        if dataset.turns_by:
            yield f"turns of the assistant{_reasons(dataset.turns_by)}"
        if dataset.unused_fields:
            yield f"not used: {'; '.join(dataset.unused_fields)}"
        if dataset.unused_tokens:
            yield f"warning: never in the data and so untrained: {' '.join(dataset.unused_tokens)}"
        yield from (f"warning: {text}" for text in dataset.warnings or ())


def _reasons(counts: Mapping[str, int] | None) -> str:
    return f" ({', '.join(f'{count:,} {reason}' for reason, count in sorted(counts.items()))})" if counts else ""


def _train(status: FineTuneJobStatus) -> Iterator[str]:
    if training := status.training:
        yield from [f"{training.steps:,} steps"] if training.steps is not None else []
        yield from [f"loss {training.loss:.4g}"] if training.loss is not None else []
        yield from [f"validation loss {training.validation_loss:.4g}"] if training.validation_loss is not None else []
        yield from ["a resumption was not bit-exact"] if training.exact is False else []


def _save(status: FineTuneJobStatus) -> Iterator[str]:
    if output := status.output:
        yield from [output.uri] if output.uri else []
        yield from [size(output.size_bytes)] if output.size_bytes is not None else []


_SENTENCES: Mapping[Step, Callable[[FineTuneJobStatus], Iterator[str]]] = {
    Step.DOWNLOAD: _download,
    Step.ADD_TOKENS: _add_tokens,
    Step.RELOAD: _reload,
    Step.LOAD_DATASET: _load_dataset,
    Step.TRAIN: _train,
    Step.SAVE: _save,
}
