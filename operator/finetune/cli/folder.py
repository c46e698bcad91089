"""The work folder of a local run: the same files that a pod finds, where no cluster and no root are needed."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from finetune.api import contract
from finetune.api.contract import Step, StepJob
from finetune.api.spec import FineTuneJobSpec


class FolderInUse(Exception):
    """Another run works in the folder."""


@dataclass(frozen=True)
class WorkFolder:
    """Everything of one local job lies below `root`; running it again goes on from there."""

    root: Path

    @property
    def workspace(self) -> Path:
        """What would be the job's volume."""
        return self.root / "workspace"

    @property
    def job_file(self) -> Path:
        return self.root / "job.json"

    @property
    def tokens_file(self) -> Path:
        """What would be the mounted ConfigMap of tokens.addFrom."""
        return self.root / "tokens"

    @property
    def chat_template_file(self) -> Path:
        """What would be the mounted ConfigMap of model.chatTemplate."""
        return self.root / "chat_template.jinja"

    @property
    def links(self) -> Path:
        """Claims that lie in several places, gathered by links."""
        return self.root / "claims"

    def log(self, step: Step) -> Path:
        return self.root / "logs" / f"{step.value}.log"

    def report(self, step: Step) -> Path:
        return self.root / "reports" / f"{step.value}.json"

    @contextmanager
    def locked(self, *, fresh: bool = False) -> Iterator[None]:
        """The folder, for this run alone; with `fresh`, emptied of the former run."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise FolderInUse(f"another run works in {self.root}") from error
            if fresh:
                for path in (self.workspace, self.links, self.root / "logs", self.root / "reports"):
                    shutil.rmtree(path, ignore_errors=True)
                self.job_file.unlink(missing_ok=True)
            for path in (self.workspace, self.root / "logs", self.root / "reports"):
                path.mkdir(exist_ok=True)
            yield

    def write_job(self, name: str, namespace: str, spec: FineTuneJobSpec) -> StepJob:
        """The job as the steps read it. A job that goes on keeps its creation time and counts its attempts."""
        try:
            former = StepJob.model_validate_json(self.job_file.read_bytes())
        except (FileNotFoundError, ValidationError):
            former = None
        job = StepJob(
            name=name,
            namespace=namespace,
            uid=f"local-{name}",
            created=former.created if former else datetime.now(UTC).replace(microsecond=0),
            attempt=former.attempt + 1 if former else 1,
            spec=spec,
        )
        self.job_file.write_text(job.model_dump_json(by_alias=True, exclude_none=True, indent=2))
        return job

    def claims(self, claims: Path, named: Mapping[str, Path], wanted: tuple[str, ...]) -> Path:
        """The folder whose entries are the claims: `claims` itself, or links where some claims lie elsewhere."""
        if not named:
            return claims
        shutil.rmtree(self.links, ignore_errors=True)
        self.links.mkdir()
        for claim in {*wanted, *named}:
            (self.links / claim).symlink_to(named.get(claim, claims / claim).resolve())
        return self.links

    def environment(self, step: Step, claims: Path, extra: Mapping[str, str]) -> dict[str, str]:
        """What the step's process sees: this shell's variables and the contract's."""
        return {
            **os.environ,
            contract.JOB_FILE: str(self.job_file),
            contract.WORKSPACE: str(self.workspace),
            contract.CLAIMS: str(claims.absolute()),
            contract.TOKENS_FILE: str(self.tokens_file),
            contract.CHAT_TEMPLATE_FILE: str(self.chat_template_file),
            contract.REPORT_FILE: str(self.report(step)),
            "PYTHONUNBUFFERED": "1",
            **extra,
        }
