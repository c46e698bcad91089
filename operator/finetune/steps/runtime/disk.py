"""Room on the volume: known before a step fills it."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from finetune.api.contract import ExitCode
from finetune.steps.runtime.failure import StepFailure

RESERVE = 16 << 20
"""Bytes left for the small files around the weights."""


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise StepFailure unless the volume of `folder` has room for `needed` more bytes."""
    if needed + RESERVE > shutil.disk_usage(folder).free:
        raise _disk_full(folder, needed, what)


@contextlib.contextmanager
def room_for(folder: Path, needed: int, what: str) -> Iterator[None]:
    """`require_space` before `folder` is filled, and no half-written file in it when the volume fills up all the same
    (another pod may write there)."""
    require_space(folder, needed, what)
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        raise _disk_full(folder, needed, what) from error


def _disk_full(folder: Path, needed: int, what: str) -> StepFailure:
    free = shutil.disk_usage(folder).free
    return StepFailure(
        ExitCode.BAD_CONFIGURATION,
        "DiskFull",
        f"{what} takes {in_words(needed)}, the workspace has {in_words(free)} left",
        "Enlarge the workspace's claim (kubectl edit pvc) and try again: kubectl finetune retry. Where its storage "
        "class cannot grow, apply the job anew with a larger spec.workspace.size.",
    )


def in_words(size: int) -> str:
    """A size in bytes, for people."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"
