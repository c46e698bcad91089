"""Which model the later steps start from, and what it is."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from finetune.api.contract import ExitCode, Layout, StepJob
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.workspace.staging import MANIFEST, lost_files, published

_COMMIT = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


def base_model(layout: Layout) -> Path:
    """The model with its new tokens, or the model as downloaded when the job adds none.

    Raises StepFailure when its files lay in the cache and somebody removed them there.
    """
    for folder in (layout.prepared, layout.model):
        if lost := lost_files(folder):
            raise StepFailure(
                ExitCode.NO_INPUT,
                "CacheEntryRemoved",
                f"spec.cache: {lost[0].readlink()} was removed from the cache while this job needed it",
                "Delete the job and apply it anew; remove entries of the cache only when no running job uses them.",
            )
    return layout.prepared if published(layout.prepared) is not None else layout.model


def is_commit(revision: str) -> bool:
    """Whether a revision is a whole commit id: it then names the same files for ever."""
    return _COMMIT.fullmatch(revision) is not None


def identity(job: StepJob, layout: Layout) -> dict[str, Any]:
    """What the base model is, whoever downloaded it: repository and commit (and how its weights were written out, if it
    is quantised), or else the SHA-256 of each file."""
    result = published(layout.model) or {}
    commit = result.get("commit")
    if commit and is_commit(commit):
        template = layout.model / "chat_template.jinja"
        own = {"chatTemplate": template.read_text()} if job.spec.model.chat_template else {}
        own |= {"dequantized": result["dequantized"]} if "dequantized" in result else {}
        return {"uri": job.spec.model.uri, "commit": commit} | own
    files = {}
    for path in sorted(layout.model.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                files[path.relative_to(layout.model).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return {"files": files}
