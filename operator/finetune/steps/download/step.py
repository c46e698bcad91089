"""The step `download`: the base model's files enter the workspace, complete and checked."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from finetune.api.contract import ExitCode, Layout, Step, StepJob, StepReport
from finetune.api.status import ModelStatus
from finetune.steps.cache import MODELS, PLAIN, cached
from finetune.steps.dequantisation.plan import require_known
from finetune.steps.dequantisation.weights import NotDequantisable
from finetune.steps.dequantisation.writing import FORMAT as PLAIN_FORMAT
from finetune.steps.dequantisation.writing import write_plain
from finetune.steps.download import chat_template
from finetune.steps.download.needed_files import (
    corrupt,
    index_name,
    needed_beside_weights,
    refuse_remote_code,
    weights_of,
)
from finetune.steps.model_files.checkpoint import INDEX, NoSafetensors, read_checkpoint
from finetune.steps.model_files.config import UNQUANTISED, quantised, read_config
from finetune.steps.model_files.copying import take_file
from finetune.steps.model_files.safetensors_file import InvalidSafetensors
from finetune.steps.runtime.disk import require_space
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.runtime.progress import Progress
from finetune.steps.tokenizer_files import apart
from finetune.steps.workspace.base_model import is_commit
from finetune.steps.workspace.staging import INPUTS, Write, publish, published, remove

COMMIT = ".commit"

PLAIN_FOLDER = ".plain"
"""Where quantised weights are written out, in the folder that has them."""

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
        first = [name for name in ("config.json", index) if name in repository.files]
        hub.fetch(repository, first, partial)
        _refuse_unknown_quantisation(partial, uri)
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
        return publish(layout.model, inputs, _own(write, uri, template, progress))
    made_from = {"uri": uri, "commit": commit, "format": FORMAT}
    whole = cached(layout, MODELS, lambda: made_from, write)

    def shared(write: Write) -> Write:
        return cached(layout, PLAIN, lambda: {**made_from, "plain": PLAIN_FORMAT}, write)

    return publish(layout.model, inputs, _own(whole, uri, template, progress, shared))


def _own(
    write: Write, uri: str, template: str | None, progress: Progress, shared: Callable[[Write], Write] | None = None
) -> Write:
    """`write`, and then what is done to the job's own copy; `shared` puts the weights that are written out into the
    cache as well."""
    return _settled(_with_template(_plain(write, uri, progress, shared or (lambda write: write)), template))


def _plain(write: Write, uri: str, progress: Progress, shared: Callable[[Write], Write]) -> Write:
    """What `write` writes, with quantised weights written out. Until they all are, what was fetched stays."""

    def write_here(quantised_folder: Path, target: Path) -> dict[str, Any]:
        try:
            return write_plain(quantised_folder, target, lambda done, total: progress.update(done, total))
        except NotDequantisable as error:
            raise _quantised(uri, error) from error

    def written(partial: Path) -> dict[str, Any]:
        remove(partial / PLAIN_FOLDER)
        result = write(partial)
        if quantised(read_config(partial)) is None:
            return result
        commit = partial / COMMIT
        commit.write_text(result.get("commit") or "")
        (partial / PLAIN_FOLDER).mkdir()
        said = shared(lambda target: write_here(partial, target))(partial / PLAIN_FOLDER)
        log.info("%s", said["dequantized"])
        for warning in said["warnings"]:
            log.warning("%s", warning)
        _put_in_place(partial / PLAIN_FOLDER, partial)
        commit.unlink()
        return {**result, "dequantized": said["dequantized"], "warnings": said["warnings"]}

    return written


def _put_in_place(plain: Path, folder: Path) -> None:
    """The files of `plain` in the place of quantised weights. config.json comes last: until then the folder is known as
    that of a quantised model."""
    for file in (*read_checkpoint(folder).headers, INDEX):
        (folder / file).unlink(missing_ok=True)
    for path in sorted(plain.iterdir(), key=lambda path: path.name == "config.json"):
        path.replace(folder / path.name)
    plain.rmdir()


def _refuse_unknown_quantisation(folder: Path, uri: str) -> None:
    """Raise StepFailure before anything large is fetched."""
    if not (folder / "config.json").is_file():
        return
    try:
        require_known(read_config(folder))
    except NotDequantisable as error:
        raise _quantised(uri, error) from error
    except ValueError as error:
        raise corrupt(uri, str(error)) from error


def _quantised(uri: str, error: NotDequantisable) -> StepFailure:
    return StepFailure(
        ExitCode.BAD_CONFIGURATION, "QuantisedModel", f"spec.model.uri: {uri} cannot be used: {error}", UNQUANTISED
    )


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

        _refuse_unknown_quantisation(source, uri)
        for name in names:
            target = partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            take_file(source / name, target, count, link=True)
        _check(partial, uri)
        return ModelStatus(size_bytes=total).wire()

    return publish(layout.model, inputs, _own(write, uri, template, progress))


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
        return {**result, "warnings": [*result.get("warnings", []), mended]}

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
