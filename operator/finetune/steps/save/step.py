"""`finetune-step save`: publishes the trained model where the job wants it.

Complete or absent there too: everything is copied beside the destination, flushed, compared by digest and renamed into
place. A folder that is not this job's own earlier output is never touched.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from finetune.api.contract import ExitCode, Layout, Step, StepJob, StepReport
from finetune.api.spec import OutputFormat
from finetune.steps.model_files.adapter import ADAPTER_CONFIG
from finetune.steps.model_files.copying import Count, take_file
from finetune.steps.runtime.disk import require_space
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.runtime.progress import Progress
from finetune.steps.save.adopt import adopt
from finetune.steps.save.merging import is_adapter, merge, merged_size
from finetune.steps.save.model_card import provenance, write_card
from finetune.steps.save.stopping import stop_at, stops_of
from finetune.steps.workspace.base_model import base_model
from finetune.steps.workspace.end_tokens import read_end_tokens
from finetune.steps.workspace.merge_record import FILE as MERGE
from finetune.steps.workspace.staging import MANIFEST, digest, make_durable, published, replace

BLOCK = 16 << 20

OF_THE_MODEL = ("config.json", "generation_config.json")
"""Files that belong to a whole model and would have an adapter taken for one."""

log = logging.getLogger(__name__)


def run(job: StepJob, layout: Layout) -> StepReport:
    """Publish `trained/` to spec.output, or to `output/` in the workspace."""
    if container := job.spec.training.container:
        adopt(job, layout, container)
    training = published(layout.trained)
    if training is None:
        raise StepFailure(
            ExitCode.NO_INPUT, "StepMissing", f"{layout.trained} is not there", "Run `finetune-step train` first."
        )
    uri = job.spec.output.uri if job.spec.output else None
    destination = layout.claim_path(uri) if uri else layout.output
    _claim_must_exist(destination, layout, uri)
    content, ends = _Content(job, layout), read_end_tokens(layout.dataset)
    with Progress(Step.SAVE, "byte") as progress:
        identity = _Identity(job, _digest_of_weights(layout.trained))
        if (former := identity.published_at(destination)) is not None:
            return StepReport(step=Step.SAVE, result=former | {"reused": True})
        identity.must_own(destination)
        partial = destination.with_name(f"{destination.name}.partial-{job.uid}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            if uri is not None:
                require_space(partial, content.size, "the trained model")
            content.write(partial, progress, link=uri is None)
            warnings = content.stop(partial, [token.content for token in ends], [token.id for token in ends])
            sha256 = _digest_of_weights(partial)
            write_card(partial, provenance(job, layout, content.format, sha256))
            if not content.merges and sha256 != identity.sha256:
                raise StepFailure(
                    ExitCode.IO_ERROR,
                    "CopyDiffers",
                    f"{destination}: what was written differs from {layout.trained}",
                    "The operator tries again; if it stays so, the volume is broken.",
                )
            result = {
                "uri": uri or f"{layout.output}",
                "sizeBytes": sum(path.stat().st_size for path in _files(partial)),
                "sha256": sha256,
                **({"warnings": warnings} if warnings else {}),
            }
            identity.seal(partial, result)
            make_durable(partial)
            replace(partial, destination)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return StepReport(step=Step.SAVE, result=result)


class _Content:
    """What is published: the trained model, or the adapter by itself, or merged into the model that it adapts."""

    def __init__(self, job: StepJob, layout: Layout) -> None:
        wanted = job.spec.output.format if job.spec.output else OutputFormat.MERGED
        adapter = is_adapter(layout.trained)
        self._job, self._trained = job, layout.trained
        self._model, self._base = layout.model, base_model(layout)
        self.merges = adapter and wanted == OutputFormat.MERGED
        self.format = OutputFormat.ADAPTER if adapter and not self.merges else OutputFormat.MERGED
        left_out = (
            (ADAPTER_CONFIG, MERGE, "*.safetensors") if self.merges else (*OF_THE_MODEL, MERGE) if adapter else ()
        )
        self._files = [path for path in _files(layout.trained) if not any(path.match(each) for each in left_out)]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(path.stat().st_size for path in self._files) + (merged_size(self._base) if self.merges else 0)

    def write(self, target: Path, progress: Progress, *, link: bool) -> None:
        """Into an empty folder."""
        total, done = self.size, 0

        def count(size: int) -> None:
            nonlocal done
            done += size
            progress.update(min(done, total), total)

        _copy(self._files, self._trained, target, count, link=link)
        if self.merges:
            merge(self._trained, self._base, target, count)
        elif self.format == OutputFormat.ADAPTER:
            self._name_base(target / ADAPTER_CONFIG)

    def stop(self, target: Path, names: list[str], ids: list[int]) -> list[str]:
        """Have what was written stop where the training data ended; warnings where it cannot be had."""
        if self.format != OutputFormat.ADAPTER:
            if new := stop_at(target, ids):
                log.info("%s: stops at the learned end tokens too: %s", target.name, new)
            return []
        known = stops_of(self._base)
        new_names = [f"{name} ({id_})" for name, id_ in zip(names, ids, strict=True) if id_ not in known]
        if not new_names:
            return []
        return [
            f"the adapter has learned to end with {', '.join(new_names)}, where its base model does not stop: give "
            "eos_token_id to generate, or use output.format: Merged"
        ]

    def _name_base(self, path: Path) -> None:
        """The base by the name that others know it by, instead of its folder in this workspace."""
        model = self._job.spec.model
        config = json.loads(path.read_text()) | {
            "base_model_name_or_path": model.uri.removeprefix("hf://"),
            "revision": (published(self._model) or {}).get("commit"),
        }
        path.unlink()  # it may be a link to the file in the workspace
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


class _Identity:
    """Whose output a folder is, by the manifest in it."""

    def __init__(self, job: StepJob, sha256: str) -> None:
        self.sha256 = sha256
        self._job = f"{job.namespace}/{job.name}"
        self._uid = job.uid

    def published_at(self, folder: Path) -> dict[str, Any] | None:
        """The result of this very job with these very weights, if it is there already."""
        result = published(folder, self._inputs())
        if result is not None and _digest_of_weights(folder) == result["sha256"]:
            return result
        return None

    def must_own(self, folder: Path) -> None:
        """The place is free, empty, or holds an output of this job (or of a former one of its name)."""
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return
        owner = _owner(folder)
        if owner == self._job:
            return
        what = f"the output of the FineTuneJob {owner}" if owner else "files that no FineTuneJob published"
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "OutputExists",
            f"spec.output.uri: {folder.name} holds {what}",
            "Choose another path, or remove what is there.",
        )

    def seal(self, folder: Path, result: dict[str, Any]) -> None:
        """Mark the folder as this job's output, with its result."""
        manifest = {"inputs": digest(self._inputs()), "job": self._job, "result": result}
        (folder / MANIFEST).write_text(json.dumps(manifest, ensure_ascii=False))

    def _inputs(self) -> dict[str, str]:
        return {"uid": self._uid, "weights": self.sha256}


def _owner(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / MANIFEST).read_text())["job"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _claim_must_exist(destination: Path, layout: Layout, uri: str | None) -> None:
    if uri is None:
        return
    claim = layout.claims / uri.removeprefix("pvc://").partition("/")[0]
    if not claim.is_dir():
        raise StepFailure(
            ExitCode.NO_INPUT,
            "ClaimMissing",
            f"spec.output.uri: {uri}: the claim is not mounted at {claim}",
            "Create the claim, or name one that exists.",
        )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _copy(sources: list[Path], root: Path, target: Path, count: Count, *, link: bool) -> None:
    for source in sources:
        place = target / source.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        take_file(source, place, count, link=link)


def _digest_of_weights(folder: Path) -> str:
    """SHA-256 over the weights' files, in name order."""
    content = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as reader:
            while block := reader.read(BLOCK):
                content.update(block)
    return content.hexdigest()
