"""`finetune-step load-dataset`: rows in, token ids and labels out, so that GPU time is not spent on tokenising.

Memory stays bounded whatever the dataset's size: rows are read from a memory map, a batch at a time, and written as
they are encoded.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from pathlib import Path
from typing import Any

from finetune.api.contract import ExitCode, Layout, Step, StepJob, StepReport
from finetune.api.spec import DatasetSource
from finetune.steps.base import base_model
from finetune.steps.dataset.rows import Example, Format, MalformedRow, recognised
from finetune.steps.dataset.sources import identity, opened, prepare_environment
from finetune.steps.dataset.template import templated
from finetune.steps.failure import StepFailure
from finetune.steps.progress import Progress
from finetune.steps.staging import digest, publish
from finetune.steps.tokens.record import FILE, read_record

BATCH = 256
"""Rows that are tokenised together."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json")

MAX_UNUSED = 32
"""Names in `DatasetStatus.unused_tokens`."""

SOURCE = "spec.dataset.sources[0]"

log = logging.getLogger(__name__)


def run(job: StepJob, layout: Layout) -> StepReport:
    """Write `dataset/train` and, if rows are held out, `dataset/validation`; report what they hold."""
    model = base_model(layout)
    inputs = {
        "source": identity(job.spec.dataset.sources[0], layout),
        "dataset": job.spec.dataset.wire(),
        "objective": job.spec.training.objective,
        "seed": job.spec.training.seed,
        "created": job.created if _prints_date(model) else None,
        "tokenizer": _tokenizer_digest(model),
    }
    result = publish(layout.dataset, inputs, lambda folder: _write(job, layout, model, folder))
    return StepReport(step=Step.LOAD_DATASET, result=result)


def _write(job: StepJob, layout: Layout, model: Path, folder: Path) -> dict[str, Any]:
    cache = folder / ".source"
    prepare_environment(cache)
    from transformers import AutoTokenizer

    from finetune.steps.dataset.encode import Encoder
    from finetune.steps.dataset.write import DatasetWriter

    dataset, training = job.spec.dataset, job.spec.training
    tokenizer = AutoTokenizer.from_pretrained(model)
    _must_be_fast(tokenizer)
    rows = opened(dataset.sources[0], layout, cache, SOURCE)
    row_format = _format(job, rows.column_names)
    log.info("%d rows in the format %s", len(rows), row_format.name)
    encoder = Encoder(tokenizer, job.created, training.objective, dataset.max_length)
    parts = _parts(rows, dataset.validation.fraction, training.seed)
    hasher, written, read = hashlib.sha256(), {}, 0
    with Progress(Step.LOAD_DATASET, "row") as progress:
        for name, part in parts.items():
            shutil.rmtree(folder / name, ignore_errors=True)
            with DatasetWriter(folder / name, len(tokenizer), hasher) as writer:
                for start in range(0, len(part), BATCH):
                    try:
                        writer.write(encoder.encode(_examples(part[start : start + BATCH], row_format)))
                    except MalformedRow as error:
                        raise _malformed(dataset.sources[0], part, start + error.index, error) from error
                    progress.update(read + min(start + BATCH, len(part)), len(rows))
            read += len(part)
            written[name] = writer
    train, validation = written["train"], written.get("validation")
    if not train.examples:
        raise StepFailure(
            ExitCode.BAD_DATA,
            "NothingToTrainOn",
            f"spec.dataset: none of the {len(parts['train'])} rows gives an example with a learned token within "
            f"maxLength {dataset.max_length}",
            "Raise spec.dataset.maxLength, or check what the rows hold.",
        )
    shutil.rmtree(cache, ignore_errors=True)
    return {
        "examples": train.examples,
        "validationExamples": validation.examples if validation else 0,
        "tokens": train.tokens,
        "trainedTokens": train.learned,
        "truncated": encoder.counts.truncated,
        "dropped": encoder.counts.dropped,
        "unusedTokens": _unused(model, train.seen),
        "digest": hasher.hexdigest(),
    }


def _format(job: StepJob, columns: list[str]) -> Format:
    source = job.spec.dataset.sources[0]
    if source.template:
        return templated(source.template, columns, f"{SOURCE}.template")
    return recognised(columns, SOURCE)


def _parts(rows: Any, fraction: float, seed: int) -> dict[str, Any]:
    """Training rows and held-out rows: the same that `train_test_split` gives with this seed."""
    if not fraction:
        return {"train": rows}
    try:
        parts = rows.train_test_split(test_size=fraction, seed=seed)
    except ValueError as error:
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "TooFewRows",
            f"spec.dataset.validation.fraction: {fraction} of {len(rows)} rows leaves nothing to train on",
            "Lower the fraction, or add rows.",
        ) from error
    return {"train": parts["train"], "validation": parts["test"]}


def _examples(columns: dict[str, list[Any]], row_format: Format) -> list[Example]:
    """Some rows, given column by column, read as examples."""
    examples = []
    for index, values in enumerate(zip(*columns.values(), strict=True)):
        try:
            examples.append(row_format.read(dict(zip(columns, values, strict=True))))
        except MalformedRow as error:
            error.index = index
            raise
    return examples


def _malformed(source: DatasetSource, rows: Any, index: int, error: MalformedRow) -> StepFailure:
    order = rows._indices  # of a held-out split's rows; the user counts as the source does
    number = (index if order is None else order.column(0)[index].as_py()) + 1
    return StepFailure(
        ExitCode.BAD_DATA,
        "MalformedRow",
        f"{SOURCE}: row {number} of {source.split}: {error}",
        "Mend the row, or write a template that can do with it.",
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


def _must_be_fast(tokenizer: Any) -> None:
    if not tokenizer.is_fast:
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "UnsupportedTokenizer",
            "spec.model: its tokenizer cannot tell where in the text its tokens lie (it is not a `tokenizers` one)",
            "Use a model that ships a tokenizer.json.",
        )
