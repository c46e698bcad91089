"""`finetune-step load-dataset`: rows in, token ids and labels out, so that GPU time is not spent on tokenising.

Memory stays bounded whatever the dataset's size: rows are read from a memory map, a batch at a time, and encoded onto
the disk; then it is settled by number which examples come in what order, and they are copied in that order.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.api.conditions import shortened
from finetune.api.contract import ExitCode, Layout, Step, StepJob, StepReport
from finetune.api.spec import DatasetSource, Duplicates, Objective, Switch
from finetune.api.spec import Format as Kind
from finetune.steps.dataset import readers
from finetune.steps.dataset.chat import NotShown
from finetune.steps.dataset.duplicates import NOWHERE, duplicates
from finetune.steps.dataset.encode import Counts, Encoder
from finetune.steps.dataset.encoded_rows import EncodedRows
from finetune.steps.dataset.mixture import Ingredient, held_out, mixed
from finetune.steps.dataset.packing import packed, require_isolation
from finetune.steps.dataset.preference import complete, in_pairs, pairs_in
from finetune.steps.dataset.template import templated
from finetune.steps.rows.formats import Example, Format, UndecodableRow, other_format, recognised, said
from finetune.steps.rows.messages import MalformedRow
from finetune.steps.rows.sources import Rows, identity, opened, prepare_environment
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.runtime.progress import Progress
from finetune.steps.workspace.base_model import base_model
from finetune.steps.workspace.data_parts import Parts, write_parts
from finetune.steps.workspace.end_tokens import EndToken, write_end_tokens
from finetune.steps.workspace.staging import digest, publish, published
from finetune.steps.workspace.token_record import FILE, read_record
from finetune.steps.workspace.training_data import TRAIN, VALIDATION

BATCH = 256
"""Rows that are tokenised together."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json")

CATEGORY = "category"
"""The column whose values buckets have their share of each."""

MAX_FIELDS = 16
"""Names of unused columns and fields that are told of a source."""

MAX_UNUSED = 32
"""Names in `DatasetStatus.unused_tokens`."""

MAX_WARNINGS = 16
"""Sentences in `DatasetStatus.warnings`."""

MAX_END_TOKENS = 16
"""Names in `DatasetStatus.end_tokens`."""

CREATED = "created"
"""Holds the day that the chat template printed; only where it prints one."""

log = logging.getLogger(__name__)


def run(job: StepJob, layout: Layout) -> StepReport:
    """Write `dataset/train` and, if rows are held out, `dataset/validation`; report what they hold."""
    model = base_model(layout)
    dated = _prints_date(model)
    inputs = {
        "sources": [identity(source, layout, f"spec.dataset.{place}") for place, source in job.spec.dataset.places()],
        "dataset": job.spec.dataset.wire(),
        "objective": job.spec.training.objective,
        "seed": job.spec.training.seed,
        "created": job.created if dated else None,
        "tokenizer": _tokenizer_digest(model),
    }
    if dated and (former := _day_of_former(layout, inputs)):
        inputs |= {"created": former}
    result = publish(layout.dataset, inputs, lambda folder: _Loading(job, layout, model, folder).write())
    return StepReport(step=Step.LOAD_DATASET, result=result)


@dataclass
class _Source:
    """A source of which all rows are known and none is encoded yet."""

    place: str
    """Its field in the spec."""

    spec: DatasetSource
    rows: Rows
    format: Format
    places: npt.NDArray[np.int64]
    """Where each row stands in the source's order; below zero if it is held out."""

    counts: Counts = field(default_factory=Counts)
    unused: list[str] = field(default_factory=list)
    """Columns, and fields of messages, that nothing is made of."""

    @property
    def trains(self) -> bool:
        """Whether it is one of the sources to train on."""
        return bool(self.places.max() >= 0)


@dataclass
class _Loading:
    """The work itself, in `folder`."""

    job: StepJob
    layout: Layout
    model: Path
    folder: Path
    categories: dict[str, int] = field(default_factory=dict)

    def write(self) -> dict[str, Any]:
        """Everything; the wire form of DatasetStatus."""
        dataset = self.job.spec.dataset
        if dataset.packing == Switch.ENABLED:
            require_isolation(self.model)
        cache = self.folder / ".source"
        prepare_environment(cache)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.model)
        _must_be_fast(tokenizer)
        sources = [self._open(place, source, cache) for place, source in dataset.places()]
        warnings = readers.compared(
            self.model,
            tokenizer,
            [readers.Source(f"{source.place}: {source.spec.uri}", source.rows, source.format) for source in sources],
        )
        encoded = EncodedRows(self.folder / ".encoded", keyed=dataset.validates)
        self._encode(tokenizer, sources, encoded)
        shutil.rmtree(cache, ignore_errors=True)
        result = self._arrange(sources, encoded, tokenizer)
        if warnings:
            result["warnings"] = warnings[:MAX_WARNINGS]
        shutil.rmtree(self.folder / ".encoded", ignore_errors=True)
        if _prints_date(self.model):
            (self.folder / CREATED).write_text(self.job.created.isoformat())
        return result

    def _open(self, place: str, source: DatasetSource, cache: Path) -> _Source:
        where = f"spec.dataset.{place}"
        rows = opened(source, self.layout, cache, where)
        columns = rows.column_names
        if self._in_pairs:
            row_format = pairs_in(columns, where, source)
        elif source.template:
            row_format = templated(source.template, columns, f"{where}.template")
        elif source.format:
            row_format = said(source.format, columns, where)
        else:
            row_format = recognised(columns, where)
        log.info("%s: %d rows in the format %s", where, len(rows), row_format.name)
        dataset, seed = self.job.spec.dataset, self.job.spec.training.seed
        by_category = (CATEGORY,) if dataset.buckets is not None else ()
        unused = [column for column in row_format.unused(columns) if column not in by_category]
        if place == "validation.source":
            return _Source(where, source, rows, row_format, np.arange(-len(rows), 0), unused=unused)
        places = held_out(len(rows), dataset.validation.fraction, seed)
        if places.max() < 0:
            raise StepFailure(
                ExitCode.BAD_CONFIGURATION,
                "TooFewRows",
                f"spec.dataset.validation.fraction: {dataset.validation.fraction} of the {len(rows)} rows of {where} "
                "leaves nothing to train on",
                "Lower the fraction, or add rows.",
            )
        return _Source(where, source, rows, row_format, places, unused=unused)

    # ---- rows to ids

    def _encode(self, tokenizer: Any, sources: list[_Source], encoded: EncodedRows) -> None:
        objective, dataset = self.job.spec.training.objective, self.job.spec.dataset
        total, before = sum(len(source.rows) for source in sources), 0
        with Progress(Step.LOAD_DATASET, "row") as progress:
            for number, source in enumerate(sources):
                encoder = Encoder(
                    tokenizer, self.job.created, objective, dataset.max_length, dataset.mask, source.counts
                )
                firsts: list[tuple[int, list[int] | None]] = []
                try:
                    for index, examples in enumerate(encoder.encode(self._batches(source, firsts))):
                        first, categories = firsts[index]
                        encoded.append(complete(examples) if self._in_pairs else examples, first, number, categories)
                        progress.update(before + min(first + BATCH, len(source.rows)), total)
                except MalformedRow as error:
                    raise _malformed(source, firsts[-1][0] + error.index // self._together, error) from error
                before += len(source.rows)
                source.unused += sorted(encoder.unused_fields)
                if self._in_pairs:
                    lost = len(source.rows) - int((encoded.sources == number).sum()) // 2
                    source.counts.dropped = in_pairs(source.counts.dropped, lost)
        encoded.finish()

    def _batches(self, source: _Source, firsts: list[tuple[int, list[int] | None]]) -> Iterator[list[Example]]:
        """The rows in batches, as examples; what is appended to `firsts` says where each batch begins."""
        by_category = self.job.spec.dataset.buckets is not None and CATEGORY in source.rows.column_names
        rows = source.rows.columns(source.format.wanted)
        every_category = source.rows.columns([CATEGORY]) if by_category else None
        for first in range(0, len(rows), BATCH):
            categories = None
            if every_category:
                names = map(str, every_category[first : first + BATCH][CATEGORY])
                categories = [self.categories.setdefault(name, len(self.categories)) for name in names]
            firsts.append((first, categories))
            try:
                yield source.format.examples(rows[first : first + BATCH])
            except UnicodeDecodeError as error:
                failure = _undecodable(rows[first : first + BATCH], error)
                failure.index *= self._together
                raise failure from error
            except MalformedRow as error:
                error.index *= self._together
                raise

    # ---- ids to rows of training data

    def _arrange(self, sources: list[_Source], encoded: EncodedRows, tokenizer: Any) -> dict[str, Any]:
        spec, vocabulary = self.job.spec, len(tokenizer)
        validation_duplicates = self._part_duplicates(sources, encoded)
        ingredients, validation = _divided(sources, encoded, spec.dataset.max_length, self._together)
        order = mixed(ingredients, spec.dataset.buckets, spec.training.seed)
        hasher = hashlib.sha256()
        parts = {TRAIN: order} | ({VALIDATION: [validation]} if spec.dataset.validates else {})
        written: dict[str, Any] = {}
        packing = spec.dataset.packing == Switch.ENABLED
        from finetune.steps.dataset.write import DatasetWriter, joined, paired, unpacked

        for name, runs in parts.items():
            shutil.rmtree(self.folder / name, ignore_errors=True)
            writer = DatasetWriter(self.folder / name, vocabulary, hasher, packed=packing or self._in_pairs)
            if packing:
                rows = joined(
                    window
                    for run in runs
                    for window in packed(run, encoded.lengths, spec.dataset.max_length, spec.training.seed)
                )
            else:
                rows = joined(map(paired if self._in_pairs else unpacked, runs))
            for _ in writer.write(encoded, rows):
                pass
            written[name] = writer
        train, held = written[TRAIN], written.get(VALIDATION)
        ends = _end_tokens(tokenizer, train.ending, spec.training.objective)
        write_end_tokens(self.folder, ends)
        write_parts(self.folder, self._parts(sources, encoded))
        used = np.bincount(encoded.sources[np.concatenate(order)], minlength=len(sources))
        return {
            "sources": [
                {"format": str(source.format.name), "rows": len(source.rows), "examples": int(examples)}
                for source, examples in zip(sources, used, strict=True)
            ],
            "examples": train.rows if self._in_pairs else train.examples,
            "validationExamples": 0 if held is None else held.rows if self._in_pairs else held.examples,
            **_counted_if("validationDuplicates", validation_duplicates),
            **({"packedRows": train.rows} if packing else {}),
            "tokens": train.tokens,
            "trainedTokens": train.learned,
            **_counted("truncated", _sum(source.counts.truncated for source in sources)),
            **_counted("dropped", _sum(source.counts.dropped for source in sources)),
            **({"turnsBy": dict(turns)} if (turns := _sum(source.counts.turns for source in sources)) else {}),
            **({"unusedFields": unused} if (unused := _unused_fields(sources)) else {}),
            "endTokens": [end.content for end in ends[:MAX_END_TOKENS]],
            **_counted_if("emptyAnswers", sum(int(train.alone[end.id]) for end in ends)),
            "unusedTokens": _unused(self.model, train.seen),
            "digest": hasher.hexdigest(),
        }

    def _parts(self, sources: list[_Source], encoded: EncodedRows) -> Parts:
        """A digest of what each source gave, and the settings that arrange it."""
        digests = {f"{source.place} ({source.spec.uri})": encoded.digest(n) for n, source in enumerate(sources)}
        wire = self.job.spec.dataset.wire()
        weights = {
            f"{source.place}.{name}": value
            for source in sources
            for name, value in source.spec.wire().items()
            if name in ("weight", "maxRepeats")
        }
        held = self.job.spec.dataset.validation
        validation = {f"spec.dataset.validation.{name}": getattr(held, name) for name in ("fraction", "duplicates")}
        settings = {f"spec.dataset.{name}": wire.get(name) for name in ("maxLength", "packing", "mask", "buckets")}
        seed = {"spec.training.seed": self.job.spec.training.seed}
        return digests | weights | validation | settings | seed

    def _part_duplicates(self, sources: list[_Source], encoded: EncodedRows) -> int:
        """Rows to train on that occur in validation too, which go there, or nowhere, if the job does not keep them."""
        validation = self.job.spec.dataset.validation
        if not self.job.spec.dataset.validates:
            return 0
        training = [source for source in sources if source.trains]
        move = validation.duplicates == Duplicates.HELD_OUT_TOGETHER
        own = validation.source is not None
        count = duplicates(encoded, [source.places for source in sources], move=move, own_source=own)
        if lost := next((source for source in training if not source.trains), None):
            raise StepFailure(
                ExitCode.BAD_DATA,
                "TooFewRows",
                f"{lost.place}: {lost.spec.uri}: every row occurs among those that are held out too, which leaves "
                "nothing to train on",
                "Validate on other rows, or set spec.dataset.validation.duplicates: Kept.",
            )
        return count

    @property
    def _in_pairs(self) -> bool:
        return self.job.spec.training.objective == Objective.PREFERENCE

    @property
    def _together(self) -> int:
        """How many examples a row gives that belong together."""
        return 2 if self._in_pairs else 1


def _divided(
    sources: list[_Source], encoded: EncodedRows, max_length: int, together: int
) -> tuple[list[Ingredient], npt.NDArray[np.int64]]:
    """The examples of every source to train on, and all those held out, each in their source's order. There must be
    some of every source. Where so many examples belong together, the first one's number stands for them."""
    ingredients, validation = [], [np.zeros(0, np.int64)]
    for number, source in enumerate(sources):
        numbers = np.flatnonzero(encoded.sources == number)[::together]
        places = source.places[encoded.rows[numbers]]
        numbers, places = numbers[places != NOWHERE], places[places != NOWHERE]
        in_order = np.argsort(places, kind="stable")
        numbers, training = numbers[in_order], places[in_order] >= 0
        if not (training.any() if source.trains else len(numbers)):
            raise _nothing(source, max_length)
        validation.append(numbers[~training])
        if source.trains:
            chosen, spec = numbers[training], source.spec
            ingredients.append(Ingredient(chosen, encoded.categories[chosen], spec.weight, spec.max_repeats))
    return ingredients, np.concatenate(validation)


def _counted(name: str, counts: Counter[Any]) -> dict[str, Any]:
    return {name: counts.total(), **({f"{name}By": dict(counts)} if counts else {})}


def _sum(counters: Iterable[Counter[Any]]) -> Counter[Any]:
    return sum(counters, Counter())


def _unused_fields(sources: list[_Source]) -> list[str]:
    """What no example was made of, in the words of status: a line for each source that has such."""
    lines = []
    for source in sources:
        if source.unused:
            names, more = source.unused[:MAX_FIELDS], len(source.unused) - MAX_FIELDS
            told = ", ".join(shortened(name, 64) for name in names) + (f" and {more} more" if more > 0 else "")
            lines.append(f"{source.place.removeprefix('spec.dataset.')}: {told}")
    return lines


def _counted_if(name: str, count: int) -> dict[str, int]:
    return {name: count} if count else {}


def _end_tokens(tokenizer: Any, counts: npt.NDArray[np.int64], objective: Objective) -> list[EndToken]:
    """The special tokens that end what is learned, by how often each does, the most frequent first. Under Pretraining
    long texts are cut anywhere, so that only the end token of a text counts."""
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    if objective == Objective.PRETRAINING:
        special = set()
    special |= {tokenizer.eos_token_id} - {None}
    found = sorted((id_ for id_ in special if counts[id_]), key=lambda id_: (-counts[id_], id_))
    return [EndToken(id_, tokenizer.convert_ids_to_tokens(id_), int(counts[id_])) for id_ in found]


def _undecodable(table: Any, error: UnicodeDecodeError) -> UndecodableRow:
    """The first row of the table that cannot be decoded."""
    failure = UndecodableRow(str(error))
    for index in range(table.num_rows):
        try:
            table.slice(index, 1).to_pylist()
        except UnicodeDecodeError:
            failure.index = index
            break
    return failure


def _malformed(source: _Source, index: int, error: MalformedRow) -> StepFailure:
    if isinstance(error, UndecodableRow):
        return StepFailure(
            ExitCode.BAD_DATA,
            "NotUtf8",
            f"{source.place}: {source.spec.uri}: row {index + 1} of {source.spec.split} is not UTF-8: {error}",
            "Convert the file to UTF-8, for example with iconv.",
        )
    told = not source.spec.template and source.format.name != Kind.PREFERENCE
    other = None if not told else other_format(source.rows[index], source.format)
    split = source.spec.split
    line = f" ({found})" if (found := source.rows.line(index)) else ""
    if other:
        return StepFailure(
            ExitCode.BAD_DATA,
            "MixedFormats",
            f"{source.place}: {source.spec.uri}: row {index + 1} of {split} is {other}, and the rows were "
            f"taken for {source.format.name} ({', '.join(source.format.columns)}){line}",
            "Put rows of different formats into different files, each a source of its own.",
        )
    return StepFailure(
        ExitCode.BAD_DATA,
        "UnsupportedChatTemplate" if isinstance(error, NotShown) else "MalformedRow",
        f"{source.place}: {source.spec.uri}: row {index + 1} of {split}: {error}{line}",
        error.hint,
    )


def _nothing(source: _Source, max_length: int) -> StepFailure:
    dropped, shortest = source.counts.dropped, source.counts.shortest
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    too_long = f"; the shortest that is too long has {shortest} tokens" if shortest else ""
    return StepFailure(
        ExitCode.BAD_DATA,
        "NothingToTrainOn",
        f"{source.place}: {source.spec.uri}: none of its {len(source.rows)} rows gives an example with a learned token "
        f"within maxLength {max_length} (dropped: {reasons or 'none'}{too_long})",
        "Raise spec.dataset.maxLength, or check what the rows hold.",
    )


def _unused(model: Path, seen: Any) -> list[str]:
    """The job's new tokens that no training example contains, as many as status has room for. Not those that were
    learned: many of these are only steps towards longer ones."""
    unused = [record.content for record in read_record(model) if record.piece is None and not seen[record.id]]
    return unused[:MAX_UNUSED]


def _tokenizer_digest(model: Path) -> str:
    """What ids depend on: the tokenizer's and the chat template's files, and which tokens are new."""
    files = {name: (model / name).read_text() for name in (*TOKENIZER_FILES, FILE) if (model / name).is_file()}
    return digest(files)


def _prints_date(model: Path) -> bool:
    """Whether the chat template asks what day it is, so that the ids depend on it."""
    return any("strftime_now" in (model / name).read_text() for name in TOKENIZER_FILES if (model / name).is_file())


def _day_of_former(layout: Layout, inputs: Mapping[str, Any]) -> datetime | None:
    """The day that the data here were made on, where they are this job's but for that and training on them has begun:
    a job that goes on from another one's checkpoints needs the very same ids."""
    if not any(layout.checkpoints.glob("step-*")) or not (layout.dataset / CREATED).is_file():
        return None
    former = datetime.fromisoformat((layout.dataset / CREATED).read_text())
    return former if published(layout.dataset, {**inputs, "created": former}) is not None else None


def _must_be_fast(tokenizer: Any) -> None:
    if not tokenizer.is_fast:
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "UnsupportedTokenizer",
            "spec.model: its tokenizer cannot tell where in the text its tokens lie (it is not a `tokenizers` one)",
            "Use a model that ships a tokenizer.json.",
        )
