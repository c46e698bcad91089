"""Files that are compressed: told by the end of their name or by their first bytes, and read as what they hold."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from finetune.steps.rows.file_checks import BadFile, Damaged

BLOCK = 1 << 20
"""Bytes that are copied together."""


def _zstd(path: Path) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")


OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstd,
}
"""How a compressed file is opened, by the end of its name."""

_BEGINNINGS = {
    ".gz": re.compile(rb"\x1f\x8b"),
    ".bz2": re.compile(rb"BZh[1-9]1AY&SY"),
    ".xz": re.compile(rb"\xfd7zXZ\x00"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd"),
}
_ARCHIVES = {b"PK\x03\x04": "a zip archive", b"7z\xbc\xaf\x27\x1c": "a 7z archive", b"Rar!\x1a\x07": "a rar archive"}


class Archive(BadFile):
    """A file that holds files."""


def compression(path: Path) -> str | None:
    """The end of the name that files so compressed have; None for a plain file. Raises Archive for an archive."""
    with path.open("rb") as file:
        beginning = file.read(16)
    if archive := next((name for start, name in _ARCHIVES.items() if beginning.startswith(start)), None):
        raise Archive(f"{path.name} is {archive}")
    if path.suffix in OPENERS:
        return path.suffix
    return next((suffix for suffix, start in _BEGINNINGS.items() if start.match(beginning)), None)


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked if it is compressed."""
    suffix = compression(path)
    if suffix is None:
        with path.open("rb") as file:
            yield file
        return
    with _damage(path), OPENERS[suffix](path) as file:
        yield file


def unpack(path: Path, target: Path) -> None:
    """Write what the compressed file holds."""
    with opened(path) as source, target.open("wb") as file:
        while block := source.read(BLOCK):
            file.write(block)


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """What the decompressors raise for a file that is not whole; OSErrors of the disk itself have a number."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise Damaged(f"{path.name}: {error}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise Damaged(f"{path.name}: {error}") from error
