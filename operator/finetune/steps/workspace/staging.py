"""Complete or absent: how a step publishes a folder.

A step writes into `NAME.partial`, everything is flushed to disk, a manifest with the digest of the step's inputs goes
in last, and a rename publishes it. Killed at any moment, the folder is as before or whole; run again with the same
inputs, nothing is done.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

MANIFEST = "finetune-manifest.json"

INPUTS = ".inputs"
"""Lies in a partial folder and says what it is made from."""

Write = Callable[[Path], dict[str, Any]]
"""Writes a folder's files into the partial folder and returns the result that its manifest shall carry."""


def digest(inputs: Any) -> str:
    """SHA-256 of JSON-like inputs, independent of key order."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def published(folder: Path, inputs: Any | None = None) -> dict[str, Any] | None:
    """The result that the complete folder's manifest carries; None when the folder is absent, was made from other
    inputs, or lost a file that it shares with a cache."""
    manifest = manifest_of(folder)
    if manifest is None or (inputs is not None and manifest.get("inputs") != digest(inputs)) or lost_files(folder):
        return None
    result = manifest.get("result")
    return result if isinstance(result, dict) else None


def inputs_of(folder: Path) -> str | None:
    """The digest of what a complete folder was made from: the input of the steps that build on it."""
    digest_of_inputs = (manifest_of(folder) or {}).get("inputs")
    return digest_of_inputs if isinstance(digest_of_inputs, str) else None


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """What a complete folder says about itself; None when it is not complete."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def lost_files(folder: Path) -> list[Path]:
    """Files of a folder that lay in a cache and were removed there."""
    return [path for path in folder.rglob("*") if path.is_symlink() and not path.exists()]


def publish(folder: Path, inputs: Any, write: Write) -> dict[str, Any]:
    """The folder's result, made by `write(partial folder)` unless it is there already (then with `reused: true`).

    `write` may find files of an interrupted run in the partial folder if that run had the same inputs; it may go on
    from them.
    """
    if (result := published(folder, inputs)) is not None:
        remove(_former(folder))
        return {**result, "reused": True}
    partial = folder.with_name(f"{folder.name}.partial")
    result = fill(partial, inputs, write)
    (partial / MANIFEST).write_text(json.dumps({"inputs": digest(inputs), "result": result}, ensure_ascii=False))
    make_durable(partial)
    replace(partial, folder)
    return result


def fill(partial: Path, inputs: Any, write: Write) -> dict[str, Any]:
    """The result of `write`, which finds in the folder what an interrupted run with the same inputs left there."""
    marker = partial / INPUTS
    if not marker.is_file() or marker.read_text() != digest(inputs):
        remove(partial)
        partial.mkdir(parents=True)
        marker.write_text(digest(inputs))
    result = write(partial)
    marker.unlink()
    return result


def replace(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`. A crash between the two renames leaves `new` whole and `folder` absent."""
    former = _former(folder)
    remove(former)
    if folder.exists():
        folder.rename(former)
    new.rename(folder)
    flush(folder.parent)
    remove(former)


def _former(folder: Path) -> Path:
    """Where the folder's predecessor lies for the moment of the exchange; a crash may leave it there."""
    return folder.with_name(f"{folder.name}.former")


def make_durable(folder: Path) -> None:
    """Flush every file and folder below to disk, readable for all (safetensors writes 0600)."""
    for root, _, files in os.walk(folder):
        for name in files:
            path = Path(root, name)
            if not path.is_symlink():
                if (mode := path.stat().st_mode) & 0o444 != 0o444:
                    path.chmod(mode | 0o444)
                flush(path)
        flush(Path(root))


def flush(path: Path) -> None:
    """Have a file's bytes, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it; nothing when it is absent."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
