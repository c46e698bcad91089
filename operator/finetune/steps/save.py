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
from finetune.steps.disk import require_space
from finetune.steps.failure import StepFailure
from finetune.steps.model_card import provenance, write_card
from finetune.steps.progress import Progress
from finetune.steps.staging import MANIFEST, digest, make_durable, published, replace
from finetune.steps.tokens.copying import take_file

BLOCK = 16 << 20

log = logging.getLogger(__name__)


def run(job: StepJob, layout: Layout) -> StepReport:
    """Publish `trained/` to spec.output, or to `output/` in the workspace."""
    training = published(layout.trained)
    if training is None:
        raise StepFailure(
            ExitCode.NO_INPUT, "StepMissing", f"{layout.trained} is not there", "Run `finetune-step train` first."
        )
    uri = job.spec.output.uri if job.spec.output else None
    destination = layout.claim_path(uri) if uri else layout.output
    _claim_must_exist(destination, layout, uri)
    sources = _files(layout.trained)
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
                require_space(partial, sum(path.stat().st_size for path in sources), "the trained model")
            _copy(sources, layout.trained, partial, progress, link=uri is None)
            document = provenance(job, layout, identity.sha256)
            write_card(partial, document)
            if _digest_of_weights(partial) != identity.sha256:
                raise StepFailure(
                    ExitCode.IO_ERROR,
                    "CopyDiffers",
                    f"{destination}: what was written differs from {layout.trained}",
                    "The operator tries again; if it stays so, the volume is broken.",
                )
            result = {
                "uri": uri or f"{layout.output}",
                "sizeBytes": sum(path.stat().st_size for path in _files(partial)),
                "sha256": identity.sha256,
            }
            identity.seal(partial, result)
            make_durable(partial)
            replace(partial, destination)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return StepReport(step=Step.SAVE, result=result)


class _Identity:
    """Whose output a folder is, by the manifest in it."""

    def __init__(self, job: StepJob, sha256: str) -> None:
        self.sha256 = sha256
        self._job = f"{job.namespace}/{job.name}"
        self._uid = job.uid

    def published_at(self, folder: Path) -> dict[str, Any] | None:
        """The result of this very job with these very weights, if it is there already."""
        result = published(folder, self._inputs())
        if result is not None and _digest_of_weights(folder) == self.sha256:
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


def _copy(sources: list[Path], root: Path, target: Path, progress: Progress, *, link: bool) -> None:
    total, done = sum(path.stat().st_size for path in sources), 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress.update(done, total)

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
