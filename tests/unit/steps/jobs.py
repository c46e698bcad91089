"""Running a step in tests: in this process, or as the process that a pod runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from finetune.api.contract import PROGRESS_PREFIX, Layout, StepError, StepJob, StepReport


@dataclass
class Outcome:
    """What a step's process left behind."""

    code: int
    result: dict[str, Any]
    error: StepError | None
    progress: list[dict[str, Any]] = field(default_factory=list)
    log: str = ""


def job(spec: dict[str, Any]) -> StepJob:
    """A job with defaults for everything that the test does not care about."""
    whole = {
        "model": {"uri": "hf://org/model"},
        "dataset": {"sources": [{"uri": "pvc://data/rows.jsonl"}], "packing": "Disabled"},
        "training": {"epochs": 1},
    }
    return StepJob.model_validate(
        {"name": "test", "namespace": "default", "uid": "1", "created": datetime.now(UTC), "spec": whole | spec}
    )


def layout(folder: Path) -> Layout:
    return Layout(workspace=folder, claims=folder / "claims", tokens_file=folder / "tokens.txt")


def report_of(step: ModuleType, folder: Path, spec: dict[str, Any]) -> StepReport:
    """Run a step here; failures are raised."""
    report: StepReport = step.run(job(spec), layout(folder))
    return report


def job_file(folder: Path, spec: dict[str, Any]) -> dict[str, str]:
    """Write job.json and return the environment of a step's process."""
    path = folder / "job.json"
    path.write_text(job(spec).model_dump_json(by_alias=True, exclude_none=True))
    unwanted = ("HF_", "FINETUNE_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    return environment | {
        "FINETUNE_JOB": str(path),
        "FINETUNE_WORKSPACE": str(folder),
        "FINETUNE_CLAIMS": str(folder / "claims"),
        "FINETUNE_TOKENS": str(folder / "tokens.txt"),
        "FINETUNE_REPORT": str(folder / "report.json"),
        "HF_HOME": str(folder / "hf"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }


def outcome_of(step: str, folder: Path, spec: dict[str, Any], **environment: str) -> Outcome:
    """Run `finetune-step STEP` as a process of its own."""
    process = subprocess.run(
        [sys.executable, "-m", "finetune.steps", step],
        env=job_file(folder, spec) | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    report = StepReport.from_json((folder / "report.json").read_text())
    assert report is not None, process.stderr
    lines = [
        line.removeprefix(PROGRESS_PREFIX) for line in process.stdout.splitlines() if line.startswith(PROGRESS_PREFIX)
    ]
    return Outcome(
        process.returncode, report.result or {}, report.error, [json.loads(line) for line in lines], process.stderr
    )
