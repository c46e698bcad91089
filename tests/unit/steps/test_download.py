"""download: only what is needed arrives, whole or not at all, and every failure names its remedy."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.steps.download import step as download
from finetune.steps.workspace.staging import published
from tests.hub import Hub
from tests.models import tiny
from tests.unit.steps.jobs import job_file, outcome_of, report_of


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One repository of each kind."""
    root = tmp_path_factory.mktemp("hub")
    models = root / "models" / "org"
    tiny(models / "single")
    tiny(models / "sharded", sharded=True, tied=False)
    tiny(models / "gated")
    for name in (
        "pytorch_model.bin",
        "model.gguf",
        "onnx/model.onnx",
        "README.md",
        "training_args.bin",
        "modeling_x.py",
    ):
        (models / "single" / name).parent.mkdir(exist_ok=True)
        (models / "single" / name).write_text("not needed")
    (models / "single" / "LICENSE").write_text("Apache-2.0")
    tiny(models / "pickled")
    (models / "pickled" / "model.safetensors").rename(models / "pickled" / "pytorch_model.bin")
    tiny(models / "truncated")
    os.truncate(models / "truncated" / "model.safetensors", 100_000)
    tiny(models / "incomplete", sharded=True)
    (models / "incomplete" / "model-00002-of-00003.safetensors").unlink()
    tiny(models / "foreign")
    edit_config(models / "foreign", model_type="brand_new", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    tiny(models / "familiar")
    edit_config(models / "familiar", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    (models / "empty").mkdir()
    (models / "empty" / "README.md").write_text("nothing")
    return root


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def hub(root: Path) -> Iterator[Hub]:
    with Hub(root) as hub:
        yield hub


def fetch(hub: Hub, workspace: Path, uri: str, **options: Any) -> Any:
    """Run the step as its own process, since huggingface_hub reads HF_ENDPOINT when it is imported."""
    revision = options.pop("revision", "main")
    return outcome_of(
        "download", workspace, {"model": {"uri": uri, "revision": revision}}, HF_ENDPOINT=hub.url, **options
    )


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


BESIDE = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def test_only_needed_files_arrive_and_the_commit_is_recorded(hub: Hub, root: Path, tmp_path: Path) -> None:
    report = fetch(hub, tmp_path, "hf://org/single")
    assert report.error is None
    expected = {*BESIDE, "model.safetensors", "LICENSE"}
    assert names(tmp_path / "model") == {*expected, "finetune-manifest.json"}
    size = sum((root / "models/org/single" / name).stat().st_size for name in expected)
    assert len(report.result.pop("commit")) == 40
    assert report.result == {"sizeBytes": size, "reused": False}
    assert not any("pytorch_model.bin" in request for request in hub.requests)


def test_a_second_run_asks_for_nothing(hub: Hub, tmp_path: Path) -> None:
    first = fetch(hub, tmp_path, "hf://org/sharded")
    hub.requests.clear()
    second = fetch(hub, tmp_path, "hf://org/sharded")
    assert hub.requests == []
    assert second.result == {**first.result, "reused": True}
    assert "model-00003-of-00003.safetensors" in names(tmp_path / "model")


def test_progress_ends_at_the_size_that_the_repository_states(hub: Hub, tmp_path: Path) -> None:
    report = fetch(hub, tmp_path, "hf://org/single")
    values = {item["name"]: item["value"] for item in report.progress[-1]["metrics"]}
    assert values["current"] == values["total"] == str(report.result["sizeBytes"])
    assert values["unit"] == "byte"


def test_a_killed_download_goes_on_where_it_was(hub: Hub, root: Path, tmp_path: Path) -> None:
    original = tiny(root / "models/org/large", hidden=512, layers=8) / "model.safetensors"
    size = original.stat().st_size
    hub.set_rules([{"match": "*.safetensors", "action": "throttle", "bytesPerSecond": 2e7}])
    environment = job_file(tmp_path, {"model": {"uri": "hf://org/large"}}) | {"HF_ENDPOINT": hub.url}
    command = [sys.executable, "-m", "finetune.steps", "download"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(part.stat().st_size for part in tmp_path.glob("model.partial/*.safetensors.*.part")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "model").exists()
    (part,) = tmp_path.glob("model.partial/*.safetensors.*.part")
    there = part.stat().st_size
    hub.set_rules([])
    hub.requests.clear()
    assert fetch(hub, tmp_path, "hf://org/large").error is None
    assert [request for request in hub.requests if "bytes=" in request] == [
        f"GET /org/large/resolve/{published(tmp_path / 'model')['commit']}/model.safetensors bytes={there}-"
    ]
    assert there < size and (tmp_path / "model/model.safetensors").read_bytes() == original.read_bytes()
    assert not [name for name in names(tmp_path / "model") if name.endswith(".part") or name.startswith(".")]


def test_a_dropped_connection_is_mended_at_once(hub: Hub, root: Path, tmp_path: Path) -> None:
    hub.set_rules([{"match": "*.safetensors", "action": "drop", "after": 70_000, "times": 2}])
    assert fetch(hub, tmp_path, "hf://org/single").error is None
    assert (tmp_path / "model/model.safetensors").read_bytes() == (
        root / "models/org/single/model.safetensors"
    ).read_bytes()


def test_a_corrupted_download_is_noticed_and_fetched_again(hub: Hub, tmp_path: Path) -> None:
    hub.set_rules([{"match": "*.safetensors", "action": "corrupt", "at": 150_000, "times": 1}])
    report = fetch(hub, tmp_path, "hf://org/single")
    assert (report.code, report.error.reason) == (69, "CorruptDownload")
    assert fetch(hub, tmp_path, "hf://org/single").error is None


@pytest.mark.parametrize(
    ("uri", "code", "reason", "words"),
    [
        ("hf://org/absent", 66, "ModelNotFound", "has no model org/absent"),
        ("hf://org/pickled", 78, "PickledWeights", "pytorch_model.bin"),
        ("hf://org/truncated", 65, "CorruptModel", "model.safetensors: the file is truncated"),
        ("hf://org/incomplete", 65, "CorruptModel", "model-00002-of-00003.safetensors, which is missing"),
        ("hf://org/foreign", 78, "RemoteCode", "brand_new"),
        ("hf://org/empty", 78, "NoWeights", "neither model.safetensors"),
    ],
)
def test_a_bad_repository_is_named_with_the_reason(
    hub: Hub, tmp_path: Path, uri: str, code: int, reason: str, words: str
) -> None:
    report = fetch(hub, tmp_path, uri)
    assert (report.code, report.error.reason) == (code, reason)
    assert report.error.message.startswith("spec.model.uri: ")
    assert words in report.error.message
    assert report.error.hint
    assert not (tmp_path / "model").exists()


def test_custom_code_of_a_known_architecture_is_simply_left_out(hub: Hub, tmp_path: Path) -> None:
    assert fetch(hub, tmp_path, "hf://org/familiar").error is None


def test_a_gated_repository_asks_for_credentials_and_takes_them(hub: Hub, tmp_path: Path) -> None:
    hub.set_rules([{"match": "models/org/gated/*", "action": "gate", "token": "hf_good"}])
    report = fetch(hub, tmp_path, "hf://org/gated")
    assert (report.code, report.error.reason) == (78, "ModelGated")
    assert "HF_TOKEN" in report.error.hint and "spec.credentials" in report.error.hint
    report = fetch(hub, tmp_path, "hf://org/gated", HF_TOKEN="hf_bad")
    assert report.error.message.endswith("the token in HF_TOKEN has no access")
    assert fetch(hub, tmp_path, "hf://org/gated", HF_TOKEN="hf_good").error is None


def test_a_missing_revision_is_named(hub: Hub, tmp_path: Path) -> None:
    report = fetch(hub, tmp_path, "hf://org/single", revision="v9")
    assert (report.code, report.error.reason) == (66, "RevisionNotFound")
    assert "spec.model.revision" in report.error.message and "'v9'" in report.error.message


def test_a_hub_that_is_down_is_tried_again(hub: Hub, tmp_path: Path) -> None:
    hub.set_rules([{"match": "*", "action": "refuse", "status": 503}])
    report = fetch(hub, tmp_path, "hf://org/single")
    assert (report.code, report.error.reason) == (69, "HubUnavailable")
    report = outcome_of("download", tmp_path, {"model": {"uri": "hf://org/single"}}, HF_ENDPOINT="http://127.0.0.1:9")
    assert (report.code, report.error.reason) == (69, "HubUnavailable")


def test_a_model_on_a_claim_is_taken_over_without_its_other_files(root: Path, tmp_path: Path) -> None:
    source = shutil.copytree(root / "models/org/sharded", tmp_path / "claims/models/llama")
    (source / "optimizer.bin").write_text("not needed")
    report = report_of(download, tmp_path, {"model": {"uri": "pvc://models/llama"}})
    assert report.result["reused"] is False
    assert "optimizer.bin" not in names(tmp_path / "model")
    for name in names(tmp_path / "model") - {"finetune-manifest.json"}:
        assert (tmp_path / "model" / name).read_bytes() == (source / name).read_bytes()
    assert report_of(download, tmp_path, {"model": {"uri": "pvc://models/llama"}}).result["reused"] is True
    assert published(tmp_path / "model") is not None


def test_a_private_file_on_a_claim_keeps_its_mode(root: Path, tmp_path: Path) -> None:
    source = shutil.copytree(root / "models/org/single", tmp_path / "claims/models/llama")
    (source / "model.safetensors").chmod(0o600)
    report_of(download, tmp_path, {"model": {"uri": "pvc://models/llama"}})
    assert (source / "model.safetensors").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "model/model.safetensors").stat().st_mode & 0o444 == 0o444


def test_a_path_that_a_claim_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "claims/models").mkdir(parents=True)
    report = outcome_of("download", tmp_path, {"model": {"uri": "pvc://models/nothing"}})
    assert (report.code, report.error.reason) == (66, "ModelNotFound")
    assert "pvc://models/nothing does not exist" in report.error.message
