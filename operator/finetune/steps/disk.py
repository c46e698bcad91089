"""Room on the volume: known before a step fills it."""

from __future__ import annotations

import shutil
from pathlib import Path

from finetune.api.contract import ExitCode
from finetune.steps.failure import StepFailure

RESERVE = 16 << 20
"""Bytes left for the small files around the weights."""


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise StepFailure unless the volume of `folder` has room for `needed` more bytes."""
    free = shutil.disk_usage(folder).free
    if needed + RESERVE > free:
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "DiskFull",
            f"{what} takes {in_words(needed)}, the workspace has {in_words(free)} left",
            "Enlarge spec.workspace.size (or the claim in spec.workspace.claimName), delete and apply the job anew.",
        )


def in_words(size: int) -> str:
    """A size in bytes, for people."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"
