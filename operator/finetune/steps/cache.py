"""The cache that jobs share: base models and extended models, each complete or absent, in a claim of their namespace.

An entry is a folder named after the digest of what it is made from. It is written under a name of the writer's own and
published by one rename: of two jobs that make the same entry at once the second finds the first one's and takes that.
No lock can be left behind; a folder whose writer was killed is known by its age, for a living writer touches it, and
the next run removes it.

Files of an entry are never written again, which their mode says as well, so they may be shared: by entries (a shard
without token matrices is one file in the base model's entry and in all that extend it) and by workspaces. Weights are
checked by size, everything else by digest; an entry that fails is made anew.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.api.contract import NEVER_RETRIED, ExitCode, Layout
from finetune.steps.model_files.copying import share_file, take_file
from finetune.steps.runtime.failure import StepFailure, failure_of
from finetune.steps.workspace.staging import MANIFEST, Write, digest, fill, flush, make_durable, manifest_of, remove

FOLDER = "finetune-cache"
"""Where the entries lie in the claim, which may hold other things as well."""

MODELS, PLAIN, EXTENDED = "models", "plain", "extended"
"""Kinds of entries: base models by repository and commit; the weights of quantised ones, written out; models with new
tokens by base model and tokens."""

HEARTBEAT_SECONDS = 60.0
ABANDONED_SECONDS = 3600.0
"""A partial folder that nobody touched for so long has no writer any more."""

_PARTIAL, _TRASH, _WRITER = ".partial-", "trash-", ".cache-writer"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A complete entry; `files` gives each file's size, and its SHA-256 unless it holds weights."""

    folder: Path
    result: dict[str, Any]
    files: dict[str, tuple[int, str | None]]

    def share(self, target: Path) -> None:
        """Put the files into the folder `target`: weights at no cost, the rest as copies."""
        for name in self.files:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if _is_weights(name):
                share_file(self.folder / name, target / name)
            else:
                shutil.copyfile(self.folder / name, target / name)


def cached(layout: Layout, kind: str, inputs: Callable[[], Any], write: Write) -> Write:
    """What `staging.publish` has to call in the place of `write`: it takes the files from the cache, where `write` puts
    them if they are not there yet. Without a cache that is `write` itself.

    `inputs` are everything that the files depend on. The result says `fromCache`: whether another job had made them. A
    cache without room fails no job: then the files go into the workspace.
    """
    if layout.cache is None:
        return write
    folder = layout.cache.absolute() / FOLDER / kind

    def take(partial: Path) -> dict[str, Any]:
        try:
            cache = Cache(folder, _writer(layout.workspace))
            entry, found = cache.entry(inputs(), write)
        except (StepFailure, OSError) as error:
            failure = failure_of(error)
            if failure.error.reason != "DiskFull":
                raise
            log.warning("the cache has no room, so the workspace takes the files: %s", failure.error.message)
            return {**write(partial), "fromCache": False}
        log.info("%s the cache's entry %s", "reused" if found else "made", entry.folder)
        entry.share(partial)
        return {**entry.result, "fromCache": found}

    return take


class Cache:
    """The entries of one kind, as one writer sees them; no two writers of the same name may run at once."""

    def __init__(self, folder: Path, writer: str) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.utime(folder)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise StepFailure(
                ExitCode.BAD_CONFIGURATION,
                "CacheNotWritable",
                f"spec.cache: {error.filename}: {error.strerror}",
                "Make the claim writable for group 65532, delete and apply the job anew.",
            ) from error
        self._folder = folder
        self._writer = writer

    def entry(self, inputs: Any, write: Write) -> tuple[Entry, bool]:
        """The entry made from `inputs`, and whether it was there; else `write` makes it.

        Raises whatever `write` raises. What it wrote until then stays for this writer's next try, unless that is in
        vain.
        """
        folder = self._folder / digest(inputs)
        partial = folder.with_name(f"{folder.name}{_PARTIAL}{self._writer}")
        self._sweep(partial)
        entry = _sound(folder)
        found = entry is not None
        if entry is None:
            if folder.exists():
                log.warning("the cache's entry %s is damaged and made anew", folder)
                self._discard(folder)
            found = not self._make(folder, partial, inputs, write)
            entry = _sound(folder)
        if entry is None:
            raise OSError(errno.EIO, "the entry of the cache was damaged as soon as it was made", str(folder))
        with contextlib.suppress(PermissionError):
            os.utime(folder / MANIFEST)
        return entry, found

    def _make(self, folder: Path, partial: Path, inputs: Any, write: Write) -> bool:
        """Whether this writer's folder became the entry; False when another one's did."""
        try:
            with _touched(partial):
                result = fill(partial, inputs, write)
                _seal(partial, inputs, result)
        except Exception as error:
            if failure_of(error).code in NEVER_RETRIED:
                remove(partial)
            raise
        try:
            partial.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            remove(partial)
            return False
        flush(self._folder)
        return True

    def _sweep(self, own: Path) -> None:
        """Remove what killed writers left. The time is the file system's: clocks of nodes differ."""
        os.utime(self._folder)
        now = self._folder.stat().st_mtime
        for path in list(self._folder.iterdir()):
            if path.name.startswith(_TRASH):
                shutil.rmtree(path, ignore_errors=True)
            elif _PARTIAL in path.name and path != own:
                with contextlib.suppress(FileNotFoundError):
                    if path.name.endswith(self._writer) or now - path.stat().st_mtime > ABANDONED_SECONDS:
                        self._discard(path)

    def _discard(self, folder: Path) -> None:
        """Remove a folder; first out of the way as a whole, so that nobody meets a half of it."""
        trash = self._folder / f"{_TRASH}{uuid.uuid4().hex}"
        with contextlib.suppress(FileNotFoundError):
            folder.rename(trash)
            if _sound(trash) is not None:  # another job has just made it anew
                with contextlib.suppress(OSError):
                    trash.rename(folder)
            shutil.rmtree(trash, ignore_errors=True)


def _sound(folder: Path) -> Entry | None:
    """The entry in a folder; None when it is absent or not as its manifest says."""
    manifest = manifest_of(folder)
    try:
        if manifest is None:
            return None
        files = {str(name): (int(size), sha256) for name, (size, sha256) in manifest["files"].items()}
        for name, (size, sha256) in files.items():
            if (folder / name).stat().st_size != size or (sha256 and _sha256(folder / name) != sha256):
                return None
        return Entry(folder, dict(manifest["result"]), files)
    except (FileNotFoundError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _seal(folder: Path, inputs: Any, result: dict[str, Any]) -> None:
    """Make the folder's files final: the cache's own, read-only, on disk, and listed in the manifest."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _own(path)
            name = path.relative_to(folder).as_posix()
            files[name] = (path.stat().st_size, None if _is_weights(name) else _sha256(path))
    manifest = {"inputs": digest(inputs), "of": inputs, "result": result, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, ensure_ascii=False, indent=1))
    (folder / MANIFEST).chmod(0o444)
    make_durable(folder)


def _own(path: Path) -> None:
    """Make a file read-only. One that is also somebody else's, who may still write to it, becomes a copy."""
    status = path.stat()
    if status.st_mode & 0o777 == 0o444:
        return
    if status.st_nlink > 1:
        copy = path.with_name(f".{path.name}.copy")
        take_file(path, copy, lambda _: None, link=False)
        copy.rename(path)
    path.chmod(0o444)


@contextlib.contextmanager
def _touched(partial: Path) -> Iterator[None]:
    """Meanwhile the folder says that its writer lives."""
    done = threading.Event()

    def touch() -> None:
        while True:
            with contextlib.suppress(OSError):
                os.utime(partial)
            if done.wait(HEARTBEAT_SECONDS):
                return

    toucher = threading.Thread(target=touch, name="cache", daemon=True)
    toucher.start()
    try:
        yield
    finally:
        done.set()
        toucher.join()


def _writer(workspace: Path) -> str:
    """The name that a workspace writes under; a pod that takes up a killed one's work finds it there."""
    path = workspace / _WRITER
    if not path.is_file():
        begun = path.with_name(f"{_WRITER}.partial")
        begun.write_text(uuid.uuid4().hex)
        begun.rename(path)
    return path.read_text()


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
