"""Checkpoints: complete or absent, and never silently a fresh start.

A checkpoint is written as `step-N.partial`. When everything is in it, a marker goes in that lists every file with its
size, all is flushed to disk, and a rename gives it its name. What was interrupted has no marker and is removed at the
next start. What has a marker but not all its files is damaged: the run goes back to the one before and says so; where
there is none, it is an error that names what is lost.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.api.contract import ExitCode
from finetune.steps.runtime.disk import in_words
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.workspace.data_parts import Parts, changed
from finetune.steps.workspace.staging import flush, make_durable

MARKER = "COMPLETE"

REQUIRED = {
    "weights": r"(adapter_)?model(-\d+-of-\d+)?\.safetensors",
    "optimizer state": r"optimizer\.pt",
    "scheduler state": r"scheduler\.pt",
    "random state": r"rng_state(_\d+)?\.pth",
    "trainer state": r"trainer_state\.json",
}
"""What a run cannot go on without: a pattern of file names for each piece."""


def required(training: Mapping[str, Any], step: int) -> dict[str, str]:
    """The pieces of a checkpoint after `step` of a run with these settings."""
    warmup = training.get("embeddingWarmup", {}).get("steps", 0)
    pieces = dict(REQUIRED)
    if warmup and step > warmup:
        pieces["history of the warm-up"] = r"warmup_state\.json"
    if training.get("ema") and step > warmup:
        pieces["moving average"] = r"ema\.safetensors"
    if training.get("objective") == "Preference":
        pieces["reference"] = r"reference\.safetensors"
    return pieces


SPARE = 64 << 20
"""Bytes that stay free on the disk beside a new checkpoint."""

FULL = 1 << 20
"""A disk with fewer bytes left is full."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    folder: Path
    marker: dict[str, Any]
    passed_over: tuple[str, ...] = ()
    """What is wrong with newer ones that had to be left for this one."""

    @property
    def step(self) -> int:
        """The optimizer step after which it was written."""
        return int(self.marker["step"])

    @property
    def facts(self) -> dict[str, Any]:
        """The environment it was written in."""
        return dict(self.marker["facts"])

    @property
    def run(self) -> dict[str, Any]:
        """What the run knew about itself: seconds, tokens, resumptions, exactness."""
        return dict(self.marker["run"])

    def status(self) -> dict[str, Any]:
        """For `status.training.checkpoint`."""
        return {"step": self.step, "time": self.marker["time"]}


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, in one folder."""

    folder: Path
    keep: int
    inputs: dict[str, Any]
    """What the run depends on; a checkpoint with other inputs is refused."""

    parts: Parts = field(default_factory=dict)
    """What the data are made of, to tell what changed."""

    def newest(self) -> Checkpoint | None:
        """The checkpoint to go on from; None only when there has never been one. Removes what was interrupted."""
        self._clear()
        damaged: dict[Path, str] = {}
        for checkpoint in self._complete():
            self._verify_inputs(checkpoint)
            pieces = required(self.inputs.get("training", {}), checkpoint.step)
            if lost := _damage(checkpoint, pieces):
                damaged[checkpoint.folder] = f"{checkpoint.folder.name} {lost}"
                continue
            for folder, what in damaged.items():
                log.error("%s: going back to %s", what, checkpoint.folder.name)
                self._remove(folder)
            return replace(checkpoint, passed_over=tuple(damaged.values()))
        if damaged:
            raise StepFailure(
                ExitCode.BAD_DATA,
                "CheckpointDamaged",
                f"every checkpoint in {self.folder} is damaged: {'; '.join(damaged.values())}",
                f"Restore what is lost, or empty {self.folder} to train from the beginning.",
            )
        return None

    def forget_other_runs(self) -> None:
        """Remove the checkpoints of another run: when that is over, nobody will go on from them."""
        for checkpoint in list(self._complete()):
            if checkpoint.marker["inputs"] != self.inputs:
                log.info("%s is of a former run and is removed", checkpoint.folder)
                self._remove(checkpoint.folder)

    def begin(self, step: int, needed: int) -> Path:
        """An empty folder for the checkpoint after `step`, once `needed` bytes fit on the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"step-{step}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        if self._free() < needed + SPARE:
            for old in list(self._complete())[1:]:
                self._remove(old.folder)
        if (free := self._free()) < needed + SPARE:
            raise self._full(step, needed, free)
        partial.mkdir()
        return partial

    def seal(self, partial: Path, facts: dict[str, Any], run: dict[str, Any]) -> Checkpoint:
        """Make the written folder a complete checkpoint and remove those beyond `keep`."""
        folder = partial.with_suffix("")
        marker = {
            "step": int(folder.name.removeprefix("step-")),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "inputs": self.inputs,
            "parts": self.parts,
            "facts": facts,
            "run": run,
            "files": {path.name: path.stat().st_size for path in sorted(partial.iterdir())},
        }
        (partial / MARKER).write_text(json.dumps(marker, indent=1))
        make_durable(partial)
        self._remove(folder)
        partial.rename(folder)
        flush(self.folder)
        for old in list(self._complete())[self.keep :]:
            self._remove(old.folder)
        return Checkpoint(folder, marker)

    @contextlib.contextmanager
    def writing(self, partial: Path, needed: int) -> Iterator[None]:
        """In here `partial`, of `needed` bytes, is written. What goes wrong becomes a StepFailure, and `partial` is
        removed: the disk may be full with it. Not every library raises an OSError for a full disk."""
        try:
            yield
        except Exception as error:
            free, step = self._free(), int(partial.stem.removeprefix("step-"))
            shutil.rmtree(partial, ignore_errors=True)
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            if full or free < FULL or "No space left" in str(error):
                raise self._full(step, needed, free) from error
            raise StepFailure(
                ExitCode.IO_ERROR,
                "CheckpointNotWritten",
                f"{self.folder}: the checkpoint after step {step} was not written: {error}{self._what_is_safe()}",
                "The operator tries again; if it stays so, look at the volume.",
                result=self._safe(),
            ) from error

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint, unverified."""
        return next(self._complete(), None)

    def _complete(self) -> Iterator[Checkpoint]:
        """Complete checkpoints, newest first."""
        folders = [path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
        for folder in sorted(folders, key=lambda path: -int(path.name.removeprefix("step-"))):
            if (marker := _marker(folder)) is not None:
                yield Checkpoint(folder, marker)

    def _clear(self) -> None:
        for path in self.folder.glob("step-*"):
            if _marker(path) is None:
                log.warning("%s was interrupted and is removed", path)
                shutil.rmtree(path)

    def _remove(self, folder: Path) -> None:
        """Without its marker first: interrupted, the rest counts as nothing."""
        (folder / MARKER).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def _full(self, step: int, needed: int, free: int) -> StepFailure:
        return StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "DiskFull",
            f"the checkpoint after step {step} takes {needed:,} bytes ({in_words(needed)}), and {in_words(SPARE)} must "
            f"stay free; {self.folder} has {free:,} bytes ({in_words(free)}) left{self._what_is_safe()}",
            "Enlarge the workspace's claim (kubectl edit pvc) or lower spec.training.checkpoint.keep, and try again: "
            "kubectl finetune retry.",
            result=self._safe(),
        )

    def _what_is_safe(self) -> str:
        newest = self.latest()
        return f"; the one after step {newest.step} is safe" if newest else ""

    def _safe(self) -> dict[str, Any] | None:
        newest = self.latest()
        return {"checkpoint": newest.status()} if newest else None

    def _free(self) -> int:
        return shutil.disk_usage(self.folder).free

    def _verify_inputs(self, checkpoint: Checkpoint) -> None:
        others = checkpoint.marker["inputs"]
        for name, value in self.inputs.items():
            if others.get(name) != value:
                difference = _difference(others.get(name), value)
                if name == "data" and (told := changed(checkpoint.marker.get("parts", {}), self.parts)):
                    difference = "; ".join(told)
                raise StepFailure(
                    ExitCode.BAD_CONFIGURATION,
                    "CheckpointOfAnotherRun",
                    f"{checkpoint.folder} was made with another {name}: {difference}",
                    f"Empty {self.folder} to train from the beginning, or restore what the checkpoint was made with.",
                )


def _marker(folder: Path) -> dict[str, Any] | None:
    if folder.suffix == ".partial":
        return None
    try:
        marker = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) else None


def _damage(checkpoint: Checkpoint, pieces: Mapping[str, str]) -> str | None:
    """What is lost of a checkpoint: pieces that it never had, files that are gone or of another size."""
    listed = checkpoint.marker["files"]
    for piece, pattern in pieces.items():
        names = [name for name in listed if re.fullmatch(pattern, name)]
        if not names:
            return f"lacks the {piece}"
        if gone := [name for name in names if not (checkpoint.folder / name).exists()]:
            return f"lacks the {piece} ({', '.join(gone)})"
    for name, size in listed.items():
        path = checkpoint.folder / name
        if not path.exists():
            return f"lacks {name}"
        if (found := path.stat().st_size) != size:
            return f"is torn: {name} has {found:,} bytes instead of {size:,}"
    return None


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        return ", ".join(f"{key} {old.get(key)} instead of {new.get(key)}" for key in names)
    return f"{old} instead of {new}"
