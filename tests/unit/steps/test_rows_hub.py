"""Datasets from a hub, over the real protocol; the step runs as a process, since the hub's client reads its address
when it is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.api.contract import ExitCode
from tests.hub import Hub
from tests.unit.steps.flow import Workshop

pytestmark = pytest.mark.slow

ROWS = [{"instruction": f"{number}+1?", "output": f"It is {number + 1}."} for number in range(30)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    for name, files in {
        "sums": {"train.jsonl": ROWS, "test.jsonl": ROWS[:4]},
        "gated": {"train.jsonl": ROWS},
        "several": {"easy/train.jsonl": ROWS[:5], "hard/train.jsonl": ROWS[5:20]},
        "broken": {"train.jsonl": [*ROWS[:3], '{"instruction": "4+1?", "output": ']},
    }.items():
        for file, rows in files.items():
            path = root / "datasets/org" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
            path.write_text("".join(f"{line}\n" for line in lines))
    configurations = "".join(f"- config_name: {name}\n  data_files: {name}/train.jsonl\n" for name in ("easy", "hard"))
    (root / "datasets/org/several/README.md").write_text(f"---\nconfigs:\n{configurations}---\n")
    return root


@pytest.fixture
def hub(root: Path) -> Iterator[Hub]:
    with Hub(root) as hub:
        yield hub


def load(hub: Hub | None, folder: Path, uri: str, **source: Any) -> tuple[int, dict[str, Any]]:
    """Run load-dataset; its exit code and report."""
    workshop = Workshop.at(folder)
    job = workshop.job({"uri": uri} | source)
    workshop.layout.job_file.write_text(job.model_dump_json(by_alias=True))
    url = hub.url if hub else "http://127.0.0.1:9"
    subprocess_environment = workshop.environment() | {"HF_ENDPOINT": url, "HOME": str(folder / "home")}
    done = subprocess.run(
        [sys.executable, "-m", "finetune.steps", "load-dataset"],
        env=subprocess_environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert workshop.layout.report_file.exists(), done.stderr
    return done.returncode, json.loads(workshop.layout.report_file.read_text())


def test_a_split_of_a_dataset_is_loaded_by_its_name(hub: Hub, tmp_path: Path) -> None:
    code, report = load(hub, tmp_path, "hf://datasets/org/sums", split="train[:10]")
    assert (code, report["result"]["examples"]) == (0, 10), report


def test_a_subset_is_loaded_by_its_name(hub: Hub, tmp_path: Path) -> None:
    code, report = load(hub, tmp_path, "hf://datasets/org/several", subset="hard")
    assert (code, report["result"]["examples"]) == (0, 15), report


@pytest.mark.parametrize(
    ("uri", "source", "code", "reason", "words"),
    [
        ("org/none", {}, ExitCode.NO_INPUT, "DatasetNotFound", "hf://datasets/org/none at revision main"),
        ("org/sums", {"split": "dev"}, ExitCode.BAD_CONFIGURATION, "UnknownSplit", "dev"),
        ("org/several", {}, ExitCode.BAD_CONFIGURATION, "UnknownSubset", "spec.dataset.sources[0].subset"),
        ("org/several", {"subset": "odd"}, ExitCode.BAD_CONFIGURATION, "UnknownSubset", "odd"),
        ("org/broken", {}, ExitCode.BAD_DATA, "MalformedRow", "line 4 of train.jsonl"),
    ],
)
def test_what_is_not_there_is_named(
    hub: Hub, tmp_path: Path, uri: str, source: dict[str, Any], code: ExitCode, reason: str, words: str
) -> None:
    returned, report = load(hub, tmp_path, f"hf://datasets/{uri}", **source)
    assert (returned, report["error"]["reason"]) == (code, reason), report
    assert words in report["error"]["message"]


def test_a_gated_dataset_asks_for_credentials(hub: Hub, tmp_path: Path) -> None:
    hub.set_rules([{"match": "datasets/org/gated/*", "action": "gate", "token": "hf_sesame"}])
    code, report = load(hub, tmp_path, "hf://datasets/org/gated")
    assert (code, report["error"]["reason"]) == (ExitCode.NO_INPUT, "DatasetGated"), report
    assert "spec.credentials" in report["error"]["hint"]


def test_a_hub_that_cannot_be_reached_is_tried_again(tmp_path: Path) -> None:
    code, report = load(None, tmp_path, "hf://datasets/org/sums")
    assert (code, report["error"]["reason"]) == (ExitCode.UNAVAILABLE, "HubUnavailable"), report
