"""Files in an S3 bucket, through Arrow's own file system: fetched into the cache and then read like any other files.

Credentials, region and endpoint come from the variables that every S3 client knows (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL); the pod has them from spec.credentials.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from finetune.api.contract import ExitCode
from finetune.steps.runtime.disk import require_space
from finetune.steps.runtime.failure import StepFailure

NOT_FOUND = ("NoSuchKey", "NoSuchBucket", "NO_SUCH", "NOT_FOUND", "does not exist")
DENIED = ("ACCESS_DENIED", "AccessDenied", "403", "credentials")
"""What Arrow's message holds when S3 says so; it has no other way to tell its answers apart."""


def listing(uri: str, field: str) -> list[list[Any]]:
    """Name, size and time of change of every file that the URI names: itself, or those below it."""
    return [[info.path, info.size, str(info.mtime)] for info in _infos(uri, field)]


def fetched(uri: str, folder: Path, field: str) -> Path:
    """A local copy: of a file, or of a folder with all that is in it."""
    from pyarrow.fs import LocalFileSystem, copy_files

    infos = _infos(uri, field)
    root = _path(uri)
    folder.mkdir(parents=True, exist_ok=True)
    require_space(folder, sum(info.size for info in infos), uri)
    target = folder / root
    for info in infos:
        copy = folder / info.path
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            copy_files(info.path, str(copy), source_filesystem=_system(), destination_filesystem=LocalFileSystem())
        except OSError as error:
            raise _failure(uri, field, error) from error
    return target


def _infos(uri: str, field: str) -> list[Any]:
    from pyarrow.fs import FileSelector, FileType

    try:
        system, path = _system(), _path(uri)
        (info,) = system.get_file_info([path])
        below = FileSelector(path, recursive=True)
        infos = system.get_file_info(below) if info.type == FileType.Directory else [info]
    except OSError as error:
        raise _failure(uri, field, error) from error
    files = sorted((info for info in infos if info.type == FileType.File), key=lambda info: str(info.path))
    if not files:
        raise _missing(uri, field)
    return files


def _path(uri: str) -> str:
    return uri.removeprefix("s3://").rstrip("/")


def _system() -> Any:
    from pyarrow.fs import S3FileSystem

    options = {}
    if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        options["region"] = region
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        options["endpoint_override"] = endpoint
    return S3FileSystem(**options)


def _missing(uri: str, field: str) -> StepFailure:
    return StepFailure(
        ExitCode.NO_INPUT,
        "DatasetNotFound",
        f"{field}.uri: {uri} does not exist",
        "Check the bucket's name and the path in it.",
    )


def _failure(uri: str, field: str, error: OSError) -> StepFailure:
    message = f"{field}.uri: {uri}: {str(error).splitlines()[0]}"
    if any(word in message for word in DENIED):
        return StepFailure(
            ExitCode.NO_INPUT,
            "AccessDenied",
            message,
            "Put a Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY into spec.credentials.",
        )
    if any(word in message for word in NOT_FOUND):
        return _missing(uri, field)
    return StepFailure(ExitCode.UNAVAILABLE, "BucketUnavailable", message, "The operator tries again.")
