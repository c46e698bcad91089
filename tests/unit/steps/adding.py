"""The step add-tokens in a test's workspace: what it reports, or why it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.steps.runtime.failure import StepFailure
from finetune.steps.tokens import step
from tests.unit.steps.jobs import report_of


def result(workspace: Path, spec: dict[str, Any]) -> dict[str, Any]:
    report = report_of(step, workspace, spec)
    assert report.result is not None
    return report.result


def refusal(workspace: Path, spec: dict[str, Any]) -> StepFailure:
    with pytest.raises(StepFailure) as caught:
        report_of(step, workspace, spec)
    assert not (workspace / "prepared").exists()
    assert caught.value.error.hint
    return caught.value
