"""The hub of the tests: real clients find models and datasets in it, also when it runs as a bare script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.hub import Hub, server
from tests.models import tiny

CLIENT = """
import json, sys
from datasets import load_dataset
from huggingface_hub import HfApi, snapshot_download
rows = load_dataset("org/sums", split="train[:10]")
folder = snapshot_download("org/tiny")
files = sorted(file.path for file in HfApi().list_repo_tree("org/sums", repo_type="dataset", recursive=True))
found = [item.path for item in HfApi().get_paths_info("org/sums", ["README.md", "absent"], repo_type="dataset")]
print(json.dumps([rows[3], len(rows), HfApi().dataset_info("org/sums").sha, files, found]))
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tiny(tmp_path / "models/org/tiny")
    data = tmp_path / "datasets/org/sums/data"
    data.mkdir(parents=True)
    (data.parent / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    for split in ("train", "test"):
        lines = (json.dumps({"question": f"{number}+1", "answer": number + 1}) for number in range(50))
        (data / f"{split}.jsonl").write_text("\n".join(lines))
    return tmp_path


def run_client(url: str, home: Path) -> list:
    environment = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    process = subprocess.run([sys.executable, "-c", CLIENT], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_datasets_and_huggingface_hub_read_from_it(root: Path, tmp_path: Path) -> None:
    with Hub(root) as hub:
        row, length, commit, files, found = run_client(hub.url, tmp_path / "home")
    assert (row, length, len(commit)) == ({"question": "3+1", "answer": 4}, 10, 40)
    assert files == ["README.md", "data", "data/test.jsonl", "data/train.jsonl"]
    assert found == ["README.md"]


def test_it_runs_as_a_script_with_nothing_but_python(root: Path) -> None:
    (root / "rules.json").write_text('[{"match": "*", "action": "refuse", "status": 418, "times": 1}]')
    command = [sys.executable, "-I", "-S", server.__file__, "--root", str(root), "--host", "127.0.0.1", "--port", "0"]
    process = subprocess.Popen([*command, "--rules", str(root / "rules.json")], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        with pytest.raises(urllib.request.HTTPError, match="418"):
            urllib.request.urlopen(f"{url}/api/models/org/tiny")
        with urllib.request.urlopen(f"{url}/api/models/org/tiny") as answer:
            assert json.load(answer)["id"] == "org/tiny"
    finally:
        process.kill()
        process.wait()
