"""What real families have besides a plain decoder: nothing of it is lost, all of it that is adapted is merged, and what
cannot be published right is refused before the first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.api.contract import ExitCode
from finetune.steps.download import step as download
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.save.step import run as save
from finetune.steps.weight_names.correspondence import correspondence
from tests.unit.steps.families import edit_tensors, rename, tiny_of
from tests.unit.steps.jobs import report_of
from tests.unit.steps.published import with_prediction_layer
from tests.unit.steps.quantised import KINDS
from tests.unit.steps.runs import Run

pytestmark = pytest.mark.slow

LORA = {"method": "LoRA", "learningRate": 3e-2, "maxSteps": 2}
FULL = {"method": "Full", "learningRate": 1e-2, "maxSteps": 1}


def trained(folder: Path, model: Path, training: dict[str, Any], **spec: Any) -> tuple[Run, dict[str, Any]]:
    run = Run.at(folder, training, model=model, **({"output": {"uri": "pvc://data/out"}} | spec))
    result = run.go()
    save(run.job, run.workshop.layout)
    return run, result


def place(run: Run) -> Path:
    return run.workshop.layout.claims / "data/out"


def logits(folder: Path, ids: list[int], adapter: Path | None = None) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        values: torch.Tensor = model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits
    return values


@pytest.mark.parametrize("method", ["Full", "LoRA"])
@pytest.mark.parametrize("family", ["qwen3_5", "glm4_moe"])
def test_what_transformers_does_not_load_is_published_byte_for_byte(family: str, method: str, tmp_path: Path) -> None:
    """Prediction layers and, in Qwen3.5, the vision tower; config.json goes on declaring them."""
    model = with_prediction_layer(tmp_path / "model", family)
    names = correspondence(model)
    assert names.not_loaded and not names.homeless
    run, result = trained(tmp_path / "run", model, FULL if method == "Full" else LORA, dataset={"packing": "Disabled"})
    before, after = load_file(run.base / "model.safetensors"), load_file(place(run) / "model.safetensors")
    assert list(before) == list(after)
    for name, values in before.items():
        assert (values.dtype, values.shape) == (after[name].dtype, after[name].shape)
        if name in names.not_loaded:
            assert torch.equal(values, after[name]), name
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("mlp" in name or "self_attn" in name for name in moved)
    assert any("layers.2" in line or "mtp" in line for line in result["notTrained"])
    assert (place(run) / "config.json").read_bytes() == (run.base / "config.json").read_bytes()


def test_a_tensor_keeps_its_own_type_in_a_checkpoint_of_several(tmp_path: Path) -> None:
    """DeepSeek's and GLM's correction of the router is f32 in a bf16 checkpoint."""
    model = with_prediction_layer(tmp_path / "model", "glm4_moe")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    edit_tensors(model, lambda held: held | {bias: torch.full_like(held[bias], 1 / 3, dtype=torch.float32)})
    run, _ = trained(tmp_path / "run", model, FULL)
    values = load_file(place(run) / "model.safetensors")[bias]
    assert values.dtype == torch.float32 and bool((values == torch.tensor(1 / 3)).all())


MERGED = (
    "qwen3_moe",
    "qwen2_moe",
    "mixtral",
    "olmoe",
    "qwen3_next",
    "phimoe",
    "gpt_oss",
    "gemma3",
    "gpt_neox",
    "gptj",
    "falcon",
)


@pytest.mark.parametrize("family", MERGED)
def test_merged_it_answers_as_base_and_adapter_do(family: str, tmp_path: Path) -> None:
    model = tiny_of(tmp_path / "model", family, dtype=torch.float32)
    run, result = trained(tmp_path / "run", model, LORA, dataset={"packing": "Disabled"})
    ids = [5, 9, *run.plan.new_rows, 40]
    ours = logits(place(run), ids)
    base = logits(run.base, ids)
    scale = float(base.abs().max())
    assert float((ours - base).abs().max()) > 1e-2 * scale
    if family != "gptj":  # whose head has a bias, which peft leaves out
        theirs = logits(run.base, ids, run.trained)
        assert float((ours - theirs).abs().max()) < 1e-4 * scale
    assert result["adapted"]
    if family in ("gemma3", "qwen3_next", "phimoe"):
        assert any(word in line for line in result["leftOut"] for word in ("vision_tower", "shared_expert", "router"))
    assert not (place(run) / "finetune-merge.json").exists()


def test_the_head_s_bias_is_there_in_training_as_it_is_in_what_is_published(tmp_path: Path) -> None:
    model = tiny_of(tmp_path / "model", "phi", dtype=torch.float32)
    run, _ = trained(
        tmp_path / "run", model, LORA | {"learningRate": 1e-6, "maxSteps": 1}, output={"uri": "pvc://data/out"}
    )
    ids = [5, 9, *run.plan.new_rows, 40]
    assert float((logits(place(run), ids) - logits(run.base, ids)).abs().max()) < 1e-3
    whole = Run.at(tmp_path / "whole", FULL | {"learningRate": 1e-6}, model=model)
    whole.go()
    losses = [each.record()["history"][0]["loss"] for each in (run, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_an_adapter_that_peft_would_compute_without_a_bias_is_refused(tmp_path: Path) -> None:
    model = tiny_of(tmp_path / "model", "phi")
    run = Run.at(tmp_path / "run", LORA, model=model, output={"uri": "pvc://data/out", "format": "Adapter"})
    with pytest.raises(StepFailure) as failure:
        run.go()
    assert (failure.value.code, failure.value.error.reason) == (ExitCode.BAD_CONFIGURATION, "AdapterWithoutBias")
    assert not list(run.workshop.layout.checkpoints.glob("step-*"))


def test_lora_on_a_tied_head_is_refused_before_the_first_step_when_it_is_to_be_merged(tmp_path: Path) -> None:
    run = Run.at(tmp_path / "run", LORA | {"lora": {"targets": ["lm_head"]}}, tokens=None)
    with pytest.raises(StepFailure) as failure:
        run.go()
    assert (failure.value.code, failure.value.error.reason) == (ExitCode.BAD_CONFIGURATION, "NotMergeable")
    assert "Adapter" in failure.value.error.hint


def test_dropout_on_experts_is_refused_with_what_helps(tmp_path: Path) -> None:
    model = tiny_of(tmp_path / "model", "qwen3_moe")
    run = Run.at(tmp_path / "run", LORA | {"lora": {"dropout": 0.1}}, model=model)
    with pytest.raises(StepFailure) as failure:
        run.go()
    assert failure.value.code == ExitCode.BAD_CONFIGURATION
    assert "spec.training.lora.dropout: 0" in failure.value.error.hint


def test_files_that_name_tensors_without_the_base_model_s_name_keep_their_names(tmp_path: Path) -> None:
    """As the published GPT-2 does."""
    model = tiny_of(tmp_path / "model", "gpt2")
    rename(model, {"transformer.": ""})
    for method, training in (("full", FULL), ("lora", LORA)):
        run, _ = trained(tmp_path / method, model, training)
        before, after = load_file(run.base / "model.safetensors"), load_file(place(run) / "model.safetensors")
        assert list(before) == list(after)
        assert not torch.equal(before["h.0.mlp.c_fc.weight"], after["h.0.mlp.c_fc.weight"])


def test_the_files_of_a_processor_are_published(tmp_path: Path) -> None:
    model = tiny_of(tmp_path / "model", "gemma3")
    (model / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "SiglipImageProcessor"}))
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tools.jinja").write_text("{{ messages }}")
    run, _ = trained(tmp_path / "run", model, LORA)
    for name in ("preprocessor_config.json", "additional_chat_templates/tools.jinja"):
        assert (place(run) / name).read_bytes() == (model / name).read_bytes()


@pytest.mark.parametrize("kind", ["gpt_oss (MXFP4)", "llama (compressed-tensors W4A16)"])
def test_a_quantised_model_is_trained_without_tokens_too(kind: str, tmp_path: Path) -> None:
    """Nothing but download touches it before training; the card says what its weights were."""
    KINDS[kind](tmp_path / "claims/models/base")
    report_of(download, tmp_path, {"model": {"uri": "pvc://models/base"}})
    packed = {"tokens": None, "dataset": {"packing": "Disabled"}}
    run, _ = trained(tmp_path / "run", tmp_path / "model", LORA, **packed)
    assert not (run.workshop.layout.prepared).exists()
    assert torch.isfinite(logits(place(run), [5, 9])).all()
    said = json.loads((place(run) / "provenance.json").read_text())["base"]["dequantized"]
    assert "weights were written out as bf16" in said
    assert f"The base is published quantised: {said}." in (place(run) / "README.md").read_text()
