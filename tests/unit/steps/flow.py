"""Jobs and workspaces for the tests of load-dataset, train and save."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.api.contract import Layout, StepJob
from finetune.api.spec import FineTuneJobSpec
from tests.models import tiny

OPERATOR = Path(__file__).parents[3] / "operator"
CREATED = datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)


@dataclass
class Workshop:
    """A workspace with a tiny base model, a claim named `data`, and a job over them."""

    folder: Path

    @classmethod
    def at(cls, folder: Path, **model: Any) -> Workshop:
        """Make one in an empty folder."""
        workshop = cls(folder)
        tiny(workshop.layout.model, **model)
        (workshop.layout.claims / "data").mkdir(parents=True)
        return workshop

    @property
    def layout(self) -> Layout:
        return Layout(
            job_file=self.folder / "job.json",
            workspace=self.folder / "workspace",
            claims=self.folder / "claims",
            chat_template_file=self.folder / "chat_template.jinja",
            report_file=self.folder / "report.json",
        )

    def environment(self) -> dict[str, str]:
        """What a step finds this layout by, when it runs as a process."""
        return {
            "FINETUNE_JOB": str(self.layout.job_file),
            "FINETUNE_WORKSPACE": str(self.layout.workspace),
            "FINETUNE_CLAIMS": str(self.layout.claims),
            "FINETUNE_REPORT": str(self.layout.report_file),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(OPERATOR),
        }

    def run_without_torch(self, step: str, job: StepJob) -> subprocess.CompletedProcess[str]:
        """Run a step as a process that finds every package but torch, as in the steps image, and no home folder."""
        self.layout.job_file.write_text(job.model_dump_json(by_alias=True))
        packages = self.folder / "packages"
        packages.mkdir()
        for path in Path(sysconfig.get_path("purelib")).iterdir():
            if not path.name.startswith(("torch", "functorch")):
                (packages / path.name).symlink_to(path)
        return subprocess.run(
            [sys.executable, "-S", "-m", "finetune.steps", step],
            env=self.environment()
            | {"HOME": "/nonexistent", "PYTHONPATH": os.pathsep.join((str(packages), str(OPERATOR)))},
            capture_output=True,
            text=True,
        )

    def write(self, name: str, rows: Iterable[Any]) -> None:
        """A JSONL file in the claim; texts are written as they are."""
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (self.layout.claims / "data" / name).write_text("".join(f"{line}\n" for line in lines))

    def job(self, source: dict[str, Any] | None = None, dataset: dict[str, Any] | None = None, **spec: Any) -> StepJob:
        """A job that trains on the claim's rows.jsonl; `spec` holds further parts of the spec in wire form."""
        document = {
            "model": {"uri": "hf://tests/tiny"},
            "dataset": {"sources": [{"uri": "pvc://data/rows.jsonl"} | (source or {})]} | (dataset or {}),
            "training": {"maxSteps": 2},
        } | spec
        return StepJob(
            name="job",
            namespace="tests",
            uid="7d9c1d3e",
            created=CREATED,
            spec=FineTuneJobSpec.model_validate(document),
        )
