"""Fetching a model from a Hugging Face hub: what is needed, resumable to the byte, verified.

huggingface_hub speaks the protocol. Its own downloads start a file anew when the process was killed, so the bytes go
into `NAME.ETAG.part` files here and a restarted pod asks for the rest.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import get_hf_file_metadata, http_get
from huggingface_hub.utils import build_hf_headers, disable_progress_bars  # type: ignore[attr-defined]

from finetune.api.contract import ExitCode
from finetune.steps.runtime.failure import StepFailure

WORKERS = 4
"""Files fetched at a time."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub lists it; `sha256` only of those that it keeps outside git."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Repository:
    """A model repository at one commit."""

    name: str
    commit: str
    files: dict[str, RemoteFile]

    @property
    def uri(self) -> str:
        return f"hf://{self.name}"


def find(name: str, revision: str) -> Repository:
    """The files of a repository at a revision.

    Raises StepFailure: it does not exist, is gated, has no such revision, or the hub does not answer.
    """
    with _explained(name, revision):
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=30)
    files = {
        sibling.rfilename: RemoteFile(sibling.rfilename, sibling.size or 0, sibling.lfs.sha256 if sibling.lfs else None)
        for sibling in info.siblings or ()
    }
    return Repository(name, info.sha or revision, files)


def fetch(
    repository: Repository, names: Sequence[str], folder: Path, on_bytes: Callable[[int], None] = lambda _: None
) -> None:
    """Bring files into `folder`, going on where an earlier run of the same commit was killed.

    `on_bytes` gets the bytes that are there, every half second. Raises StepFailure.
    """
    disable_progress_bars()
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(0.5):
            on_bytes(present(names, folder))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(lambda name: _fetch(repository, repository.files[name], folder), names))
    finally:
        finished.set()
        watcher.join()
    on_bytes(present(names, folder))


def present(names: Sequence[str], folder: Path) -> int:
    """Bytes of these files that are there, unfinished ones included."""
    total = 0
    for name in names:
        for path in (folder / name, *(folder / name).parent.glob(f"{Path(name).name}.*.part")):
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue
    return total


def _fetch(repository: Repository, file: RemoteFile, folder: Path) -> None:
    target = folder / file.name
    if target.is_file() and target.stat().st_size == file.size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if file.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
        with _explained(repository.name, repository.commit, file.name):
            hf_hub_download(repository.name, file.name, revision=repository.commit, local_dir=folder)
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        return
    with _explained(repository.name, repository.commit, file.name):
        url = hf_hub_url(repository.name, file.name, revision=repository.commit)
        metadata = get_hf_file_metadata(url, timeout=30, retry_on_errors=True)
        size = file.size if metadata.size is None else metadata.size
        part = target.with_name(f"{target.name}.{(metadata.etag or 'none')[:16]}.part")
        headers = build_hf_headers()
        if httpx2.URL(metadata.location).host != httpx2.URL(url).host:
            headers.pop("authorization", None)
        with part.open("ab") as written:
            start = written.tell()
            if start > size:
                written.truncate(0)
                start = 0
            if start:
                log.info("%s: going on at byte %d of %d", file.name, start, size)
            http_get(metadata.location, written, resume_size=start, headers=headers, expected_size=size)
            written.flush()
            os.fsync(written.fileno())
    if file.sha256 is not None and (found := _sha256(part)) != file.sha256:
        part.unlink()
        raise StepFailure(
            ExitCode.UNAVAILABLE,
            "CorruptDownload",
            f"{repository.uri}: {file.name} arrived with SHA-256 {found}, the hub says {file.sha256}",
            "The operator fetches it again.",
        )
    part.rename(target)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _explained(name: str, revision: str, file: str | None = None) -> Iterator[None]:
    """Turn the hub's errors into failures that say what to do."""
    try:
        yield
    except GatedRepoError as error:
        raise _gated(name) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise StepFailure(
            ExitCode.NO_INPUT,
            "ModelNotFound",
            f"spec.model.uri: the hub {constants.ENDPOINT} has no model {name}, or it is private",
            "Check the spelling of spec.model.uri; for a private model, name a Secret with HF_TOKEN in "
            "spec.credentials.",
        ) from error
    except RevisionNotFoundError as error:
        raise StepFailure(
            ExitCode.NO_INPUT,
            "RevisionNotFound",
            f"spec.model.revision: hf://{name} has no revision {revision!r}",
            "Name a branch, tag or commit that exists.",
        ) from error
    except RemoteEntryNotFoundError as error:
        raise StepFailure(
            ExitCode.NO_INPUT,
            "ModelNotFound",
            f"spec.model.uri: hf://{name} has no file {file}",
            "Check the repository.",
        ) from error
    except DisabledRepoError as error:
        raise StepFailure(
            ExitCode.NO_INPUT,
            "ModelDisabled",
            f"spec.model.uri: the hub has disabled hf://{name}",
            "Use another model.",
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise _gated(name) from error
        raise _unavailable(f"the hub answered {error.response.status_code} about hf://{name}") from error
    except (httpx2.HTTPError, ConnectionError) as error:
        raise _unavailable(f"the hub {constants.ENDPOINT} does not answer: {error or type(error).__name__}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise _unavailable(str(error).partition("\n")[0]) from error


def _gated(name: str) -> StepFailure:
    return StepFailure(
        ExitCode.BAD_CONFIGURATION,
        "ModelGated",
        f"spec.model.uri: hf://{name} is gated, and "
        + ("the token in HF_TOKEN has no access" if os.environ.get("HF_TOKEN") else "there is no HF_TOKEN"),
        f"Accept its terms at {constants.ENDPOINT}/{name} and name a Secret with HF_TOKEN in spec.credentials.",
    )


def _unavailable(message: str) -> StepFailure:
    return StepFailure(
        ExitCode.UNAVAILABLE, "HubUnavailable", f"spec.model.uri: {message}", "The operator tries again."
    )
