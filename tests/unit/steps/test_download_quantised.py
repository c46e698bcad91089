"""download: a quantised model becomes a plain one in the job's own copy; the cache keeps it as it was published."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.api.contract import ExitCode, Layout
from finetune.steps import cache
from finetune.steps.download import step as download
from finetune.steps.model_files.checkpoint import read_checkpoint
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.workspace.base_model import identity
from finetune.steps.workspace.staging import digest
from tests.hub import Hub
from tests.models import tiny
from tests.unit.steps import quantised
from tests.unit.steps.families import edit_config
from tests.unit.steps.jobs import job, layout, outcome_of
from tests.unit.steps.quantised import KINDS

CLAIM = {"model": {"uri": "pvc://models/base"}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub with a quantised model in two shards, and one that cannot be written out."""
    root = tmp_path_factory.mktemp("hub")
    models = root / "models" / "org"
    quantised.sharded(quantised.fp8_blocks(models / "fp8"), lambda name: 1 if "embed" in name else 2)
    tiny(models / "gptq")
    edit_config(models / "gptq", quantization_config={"quant_method": "gptq", "bits": 4})
    return root


@pytest.fixture
def hub(root: Path) -> Iterator[Hub]:
    with Hub(root) as hub:
        yield hub


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def on_claim(folder: Path, kind: str) -> Layout:
    """A workspace whose claim has a model of that kind."""
    KINDS[kind](folder / "claims/models/base")
    return layout(folder)


def run(place: Layout) -> dict[str, Any]:
    result = download.run(job(CLAIM), place).result
    assert result is not None
    return result


def test_the_status_says_what_the_weights_were_and_are(tmp_path: Path) -> None:
    place = on_claim(tmp_path, "gpt_oss (MXFP4)")
    before = digests(tmp_path / "claims")
    result = run(place)
    assert result["dequantized"] == "mxfp4 weights were written out as bf16: 204.6 KiB became 345.1 KiB"
    assert result["sizeBytes"] == sum(path.stat().st_size for path in (tmp_path / "claims").rglob("*.*"))
    assert "model.layers.0.mlp.experts.gate_up_proj" in read_checkpoint(place.model).tensors
    assert "quantization_config" not in json.loads((place.model / "config.json").read_text())
    assert not [path for path in place.model.iterdir() if path.name.startswith(".")]
    assert digests(tmp_path / "claims") == before
    assert run(place) == result | {"reused": True}


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    (said,) = run(on_claim(tmp_path, "mistral (FP8, a scale each)"))["warnings"]
    assert said.startswith("14 scales of activations were left out (model.layers.0.mlp.down_proj.activation_scale, ")


def test_an_unquantised_model_says_nothing_of_it(tmp_path: Path) -> None:
    tiny(tmp_path / "claims/models/base")
    assert "dequantized" not in run(layout(tmp_path))


def test_a_method_that_is_not_known_is_refused_before_its_weights_are_fetched(hub: Hub, tmp_path: Path) -> None:
    report = outcome_of("download", tmp_path, {"model": {"uri": "hf://org/gptq"}}, HF_ENDPOINT=hub.url)
    assert report.error is not None
    assert (report.code, report.error.reason) == (ExitCode.BAD_CONFIGURATION, "QuantisedModel")
    assert (
        "hf://org/gptq cannot be used: its weights are quantised by gptq, which is not one of" in report.error.message
    )
    assert "base_model" in report.error.hint
    assert not any("safetensors" in request for request in hub.requests)


def test_a_tensor_that_nothing_makes_use_of_is_refused_by_its_name(tmp_path: Path) -> None:
    place = on_claim(tmp_path, "qwen3 (FP8)")
    edit_config(tmp_path / "claims/models/base", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(StepFailure, match=r"cannot be used: config\.json says bitsandbytes") as caught:
        run(place)
    assert caught.value.error.reason == "QuantisedModel"
    assert not place.model.exists()


def test_what_was_fetched_is_not_fetched_again_when_the_writing_was_cut_off(
    hub: Hub, root: Path, tmp_path: Path
) -> None:
    spec = {"model": {"uri": "hf://org/fp8"}}
    (tmp_path / "whole").mkdir()
    whole = outcome_of("download", tmp_path / "whole", spec, HF_ENDPOINT=hub.url)
    assert whole.error is None
    partial = tmp_path / "cut" / "model.partial"
    shutil.copytree(root / "models/org/fp8", partial)
    inputs = {"uri": "hf://org/fp8", "revision": "main"}
    (partial / ".inputs").write_text(digest(inputs))
    (partial / ".commit").write_text(whole.result["commit"])
    (partial / ".plain").mkdir()
    (partial / ".plain" / "model-00002-of-00002.safetensors").write_bytes(b"half")
    hub.requests.clear()
    again = outcome_of("download", tmp_path / "cut", spec, HF_ENDPOINT=hub.url)
    assert again.result == whole.result
    assert not any("safetensors" in request and "index" not in request for request in hub.requests)
    assert digests(tmp_path / "cut/model") == digests(tmp_path / "whole/model")


@pytest.mark.parametrize("moved", [0, 1])
def test_killed_while_files_take_their_places_the_next_run_begins_from_the_published_ones(
    moved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = on_claim(tmp_path, "qwen3 (FP8)")
    whole = run(place)
    expected = digests(place.model)
    shutil.rmtree(place.model)
    left = moved

    def killed(path: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return real(path, target)

    real = Path.replace
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run(place)
    monkeypatch.undo()
    assert not place.model.exists()
    assert run(place) | {"reused": False} == whole
    assert digests(place.model) == expected


@pytest.mark.slow
def test_the_cache_has_the_published_weights_and_those_written_out_once_each(hub: Hub, tmp_path: Path) -> None:
    spec = {"model": {"uri": "hf://org/fp8"}}
    environment = {"HF_ENDPOINT": hub.url, "FINETUNE_CACHE": str(tmp_path / "cache")}
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    first = outcome_of("download", tmp_path / "first", spec, **environment)
    assert first.error is None and first.result["fromCache"] is False
    (original,) = (tmp_path / "cache" / cache.FOLDER / cache.MODELS).iterdir()
    (plain,) = (tmp_path / "cache" / cache.FOLDER / cache.PLAIN).iterdir()
    assert "quantization_config" in json.loads((original / "config.json").read_text())
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    shard = "model-00001-of-00002.safetensors"  # nothing in it is quantised: it is one file everywhere
    assert len({(each / shard).stat().st_ino for each in (original, plain, tmp_path / "first/model")}) == 1
    before = digests(tmp_path / "cache")
    hub.requests.clear()
    second = outcome_of("download", tmp_path / "second", spec, **environment)
    assert second.result == first.result | {"fromCache": True, "reused": True}
    assert "made the cache's entry" not in second.log
    assert digests(tmp_path / "cache") == before
    one, other = (digests(tmp_path / name / "model") for name in ("first", "second"))
    assert one | {"finetune-manifest.json": ""} == other | {"finetune-manifest.json": ""}
    assert not any("safetensors" in request for request in hub.requests)


def test_an_extended_model_in_the_cache_is_that_of_weights_written_out(tmp_path: Path, hub: Hub) -> None:
    spec = {"model": {"uri": "hf://org/fp8"}}
    assert outcome_of("download", tmp_path, spec, HF_ENDPOINT=hub.url).error is None
    said = identity(job(spec), layout(tmp_path))
    assert said["dequantized"].startswith("fp8 weights were written out as bf16")
