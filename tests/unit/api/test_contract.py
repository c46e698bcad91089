import json
from pathlib import Path

import pytest

from finetune.api.contract import MAX_REPORT_BYTES, Layout, Step, StepError, StepReport, claims_of


def test_a_report_fits_the_termination_log_whatever_it_says():
    report = StepReport(
        step=Step.ADD_TOKENS,
        result={"added": 4, "warnings": ["ü" * 5000] * 40, "probabilities": [{"token": "x" * 512}] * 16},
        error=StepError(reason="Bad", message="€" * 10_000, hint="h" * 10_000),
    )
    text = report.to_json()
    assert len(text.encode()) <= MAX_REPORT_BYTES
    assert json.loads(text)["result"]["added"] == 4
    assert StepReport.from_json(text).error.reason == "Bad"


@pytest.mark.parametrize("text", ["", "Killed", "{", '{"step": "dance"}', "[1]", "null"])
def test_a_foreign_termination_message_is_no_report(text):
    assert StepReport.from_json(text) is None


def test_pvc_uris_name_claims_and_paths_below_their_mounts():
    layout = Layout(claims=Path("/claims"))
    assert layout.claim_path("pvc://models/a/b") == Path("/claims/models/a/b")
    assert layout.claim_path("pvc://models") == Path("/claims/models")
    assert claims_of("pvc://a/x", None, "hf://b/c", "pvc://d", "pvc://a/y") == ("a", "d")


def test_the_environment_moves_the_layout():
    layout = Layout.from_environment({"FINETUNE_WORKSPACE": "/tmp/w", "FINETUNE_CACHE": "/c"})
    assert layout.prepared == Path("/tmp/w/prepared")
    assert layout.cache == Path("/c")
    assert layout.report_file == Path("/dev/termination-log")
