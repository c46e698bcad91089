"""The step `download`: the base model's files enter the workspace, complete and checked."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from finetune.api.contract import ExitCode, Layout, Step, StepJob, StepReport
from finetune.api.status import ModelStatus
from finetune.steps.cache import MODELS, cached
from finetune.steps.download import chat_template
from finetune.steps.download.needed_files import (
    corrupt,
    index_name,
    needed_beside_weights,
    refuse_remote_code,
    weights_of,
)
from finetune.steps.model_files.checkpoint import NoSafetensors, read_checkpoint
from finetune.steps.model_files.copying import take_file
from finetune.steps.model_files.safetensors_file import InvalidSafetensors
from finetune.steps.runtime.disk import require_space
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.runtime.progress import Progress
from finetune.steps.tokenizer_files import apart
from finetune.steps.workspace.base_model import is_commit
from finetune.steps.workspace.staging import INPUTS, Write, publish, published

COMMIT = ".commit"

FORMAT = 1
"""Raise it when the same commit would come as other files: the cache then fetches them anew."""

log = logging.getLogger(__name__)


def run(job: StepJob, layout: Layout) -> StepReport:
    """Publish `model/`, the base model."""
    model = job.spec.model
    template = chat_template.chosen(model, layout)
    with Progress(Step.DOWNLOAD, "byte") as progress:
        if model.uri.startswith("hf://"):
            result = _from_hub(model.uri, model.revision, layout, progress, template)
        elif model.uri.startswith("pvc://"):
            result = _from_claim(model.uri, layout, progress, template)
        else:
            raise StepFailure(
                ExitCode.BAD_CONFIGURATION,
                "NotImplemented",
                f"spec.model.uri: {model.uri.partition('://')[0]}:// is not implemented yet",
                "Use hf:// or pvc://.",
            )
    status = ModelStatus.model_validate({"reused": result.get("fromCache", False), **result})
    return StepReport(step=Step.DOWNLOAD, result=status.wire())


def _from_hub(uri: str, revision: str, layout: Layout, progress: Progress, template: str | None) -> dict[str, Any]:
    inputs = {"uri": uri, "revision": revision} | _given(template)
    if (result := published(layout.model, inputs)) is not None:
        return {**result, "reused": True}
    _use_writable_home(layout.workspace)
    from finetune.steps.download import hub  # huggingface_hub reads its settings when it is imported

    @cache
    def found() -> hub.Repository:
        return hub.find(uri.removeprefix("hf://"), revision)

    def write(partial: Path) -> dict[str, Any]:
        repository = found()
        _start_over_unless_of(repository.commit, partial)
        index = index_name(repository.files, uri)
        if index is not None:
            hub.fetch(repository, [index], partial)
        names = _with_weights(needed_beside_weights(repository.files), partial / index if index else None, uri)
        for name in names:
            if name not in repository.files:
                raise corrupt(uri, f"{index} names {name}, which is missing")
        total = sum(repository.files[name].size for name in names)
        require_space(partial, total - hub.present(names, partial), uri)
        log.info("%s at commit %s: %d files, %d bytes", uri, repository.commit, len(names), total)
        hub.fetch(repository, names, partial, lambda done: progress.update(min(done, total), total))
        _check(partial, uri)
        (partial / COMMIT).unlink()
        return ModelStatus(commit=repository.commit, size_bytes=total).wire()

    commit = revision if is_commit(revision) else found().commit
    if not is_commit(commit):
        return publish(layout.model, inputs, _settled(_with_template(write, template)))
    made_from = {"uri": uri, "commit": commit, "format": FORMAT}
    whole = cached(layout, MODELS, lambda: made_from, write)
    return publish(layout.model, inputs, _settled(_with_template(whole, template)))


def _given(template: str | None) -> dict[str, str]:
    return {} if template is None else {"chatTemplate": template}


def _with_template(write: Write, template: str | None) -> Write:
    """What `write` writes, with the job's chat template: in the workspace only, the cache keeps the model's own."""
    if template is None:
        return write

    def written(partial: Path) -> dict[str, Any]:
        result = write(partial)
        chat_template.put(partial, template)
        return result

    return written


def _from_claim(uri: str, layout: Layout, progress: Progress, template: str | None) -> dict[str, Any]:
    source = layout.claim_path(uri)
    if not source.is_dir():
        what = "is a file" if source.exists() else "does not exist"
        raise StepFailure(
            ExitCode.NO_INPUT,
            "ModelNotFound",
            f"spec.model.uri: the folder of {uri} {what}",
            "Check the path after the claim's name: it must be the folder with the model's config.json.",
        )
    files = [path.relative_to(source).as_posix() for path in sorted(source.rglob("*")) if path.is_file()]
    index = index_name(files, uri)
    names = _with_weights(needed_beside_weights(files), source / index if index else None, uri)
    for name in names:
        if not (source / name).is_file():
            raise corrupt(uri, f"{index} names {name}, which is missing")
    states = {name: (source / name).stat() for name in names}
    total = sum(state.st_size for state in states.values())
    inputs = {"uri": uri, "files": {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}}
    inputs |= _given(template)

    def write(partial: Path) -> dict[str, Any]:
        if source.stat().st_dev != partial.stat().st_dev:
            require_space(partial, total, uri)
        done = 0

        def count(size: int) -> None:
            nonlocal done
            done += size
            progress.update(done, total)

        for name in names:
            target = partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            take_file(source / name, target, count, link=True)
        _check(partial, uri)
        return ModelStatus(size_bytes=total).wire()

    return publish(layout.model, inputs, _settled(_with_template(write, template)))


def _settled(write: Write) -> Write:
    """`write`, and then a tokenizer that everybody reads alike: the job's own copy gets a tokenizer.json, or names
    another class in tokenizer_config.json, where it has to. What is wrong beyond that, or cannot be read, is for the
    steps to say that read it."""

    def write_settled(partial: Path) -> dict[str, Any]:
        result = write(partial)
        try:
            mended = apart.complete(partial)
        except Exception as error:
            log.info("the tokenizer was left as it is: %s", error)
            mended = None
        if mended is None:
            return result
        log.warning("%s", mended)
        return {**result, "warnings": [mended]}

    return write_settled


def _start_over_unless_of(commit: str, partial: Path) -> None:
    """Files of an interrupted download are good for the commit that they came from, not for where its branch went."""
    marker = partial / COMMIT
    if not marker.is_file() or marker.read_text() != commit:
        for path in partial.rglob("*"):
            if path.is_file() and path.name != INPUTS:
                path.unlink()
        marker.write_text(commit)


def _with_weights(beside: Sequence[str], index: Path | None, uri: str) -> list[str]:
    try:
        return [*beside, *weights_of(index)]
    except InvalidSafetensors as error:
        raise corrupt(uri, error) from error


def _check(folder: Path, uri: str) -> None:
    """Raise StepFailure unless the model is whole, needs no foreign code and has weights that can be read."""
    refuse_remote_code(folder, uri)
    try:
        read_checkpoint(folder)
    except (InvalidSafetensors, NoSafetensors) as error:
        raise corrupt(uri, str(error)) from error


def _use_writable_home(workspace: Path) -> None:
    """huggingface_hub keeps a little state in its home; a pod's root file system is read-only, its user has no home."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - "~" stays without a home
    home = Path(os.environ.get("HF_HOME") or f"{cache}/huggingface")
    if not home.is_absolute() or not os.access(next(path for path in (home, *home.parents) if path.exists()), os.W_OK):
        os.environ["HF_HOME"] = str(workspace / ".huggingface")
