"""reload: a model that was extended rightly passes, and each way to get it wrong is caught."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.api.contract import ExitCode, StepReport
from finetune.steps.model_files.checkpoint import read_checkpoint
from finetune.steps.model_files.safetensors_file import read_header
from finetune.steps.reload import step as reload
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.tokens import step as add_tokens
from finetune.steps.workspace.staging import publish
from tests.models import smollm2, tiny
from tests.unit.steps.jobs import layout, report_of
from tests.unit.steps.vocabularies import QWEN, byte_level

THINK = {"tokens": {"add": [{"content": "<think>"}, {"content": "myocardial infarction"}, {"content": "café"}]}}


def extended(folder: Path, spec: dict[str, Any] = THINK, **model: Any) -> Path:
    """A workspace with a tiny model and its extension."""
    publish(layout(folder).model, "base", lambda partial: {"made": str(tiny(partial, **model))})
    report_of(add_tokens, folder, spec)
    return folder


def overwrite(path: Path, tensor: str, row: int, value: bytes) -> None:
    header = read_header(path)
    place = header.tensors[tensor]
    row_bytes = place.size // place.shape[0]
    with path.open("r+b") as file:
        file.seek(header.data_start + place.start + row * row_bytes)
        file.write(value)


@pytest.mark.parametrize(
    "model",
    [{}, {"tied": False, "sharded": True}, {"dtype": "float16", "padding": 70}, {"dtype": "float32", "tied": False}],
    ids=str,
)
def test_an_extended_model_proves_itself(tmp_path: Path, model: dict[str, Any]) -> None:
    report = report_of(reload, extended(tmp_path, **model), THINK)
    assert report.result is not None
    chances = report.result["probabilities"]
    assert [chance["token"] for chance in chances] == ["<think>", "myocardial infarction", "café"]
    assert all(0 < chance["withPrompt"] < 1 and 0 < chance["withoutPrompt"] < 1 for chance in chances)
    assert len(report.to_json()) <= 1536
    layers = 3
    assert report.result["proof"].startswith(
        "3 new tokens round-trip, tokenizer.json and transformers give the same ids, loads strictly, finite logits, "
    )
    proven, _, lacking = report.result["proof"].partition("; not proven: ")
    assert proven.endswith(f"of old weights unchanged, {layers} hidden states of old text bit-equal") and lacking
    proof = json.loads((tmp_path / "finetune-reload.json").read_text())
    assert (proof["tokens"], proof["wasRun"], proof["equalStates"]) == (3, True, layers)
    assert (
        proof["equalBytes"] == sum(tensor.size for tensor in read_checkpoint(tmp_path / "model").tensors.values())
        and proof["moved"] <= 2e-2
    )
    assert proof["probabilities"] == chances


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_before_is_the_chance_of_the_old_pieces_after_is_that_of_the_new_row(tmp_path: Path, dtype: str) -> None:
    """As the model computes them in f32, in whatever type its weights are."""
    spec = {"tokens": {"add": [{"content": "<think>"}], "probePrompt": "What is two plus three?"}}
    report = report_of(reload, extended(tmp_path, spec, dtype=dtype), spec)
    assert report.result is not None
    (chance,) = report.result["probabilities"]
    messages = [{"role": "user", "content": "What is two plus three?"}]
    for name, key in (("model", "withPromptBefore"), ("prepared", "withPrompt")):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        expected = 1.0
        for piece in tokenizer.encode("<think>", add_special_tokens=False):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            expected *= float(logits.softmax(-1)[piece])
            ids = [*ids, piece]
        assert chance[key] == pytest.approx(expected, rel=1e-3)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model").encode("<think>")) > 1


def test_many_tokens_are_in_the_file_and_some_in_the_status(tmp_path: Path) -> None:
    spec = {"tokens": {"add": [{"content": f"<{number}>"} for number in range(80)]}}
    report = report_of(reload, extended(tmp_path, spec), spec)
    assert report.result is not None and len(report.result["probabilities"]) == 16
    status = StepReport.from_json(report.to_json())
    assert status is not None and status.result is not None and status.result["probabilities"]
    chances = json.loads((tmp_path / "finetune-reload.json").read_text())["probabilities"]
    assert [chance["token"] for chance in chances] == [f"<{number}>" for number in range(80)]
    assert all("withPrompt" in chance for chance in chances)
    assert sum("withPromptBefore" in chance for chance in chances) == reload.COMPARED


def test_without_a_chat_template_the_message_is_plain_text(tmp_path: Path) -> None:
    def make(partial: Path) -> dict[str, Any]:
        (tiny(partial) / "chat_template.jinja").unlink()
        return {}

    publish(layout(tmp_path).model, "base", make)
    report_of(add_tokens, tmp_path, THINK)
    report = report_of(reload, tmp_path, THINK)
    assert report.result is not None
    assert all(
        set(chance) == {"token", "withoutPrompt", "withoutPromptBefore"} for chance in report.result["probabilities"]
    )


def test_a_job_without_tokens_only_loads_its_model(tmp_path: Path) -> None:
    publish(layout(tmp_path).model, "base", lambda partial: {"made": str(tiny(partial))})
    assert report_of(reload, tmp_path, {}).result == {}


def failure(folder: Path) -> StepFailure:
    with pytest.raises(StepFailure) as caught:
        report_of(reload, folder, THINK)
    assert (caught.value.code, caught.value.error.reason) == (ExitCode.BAD_DATA, "ReloadFailed")
    return caught.value


def test_one_changed_bit_of_an_old_row_is_found(tmp_path: Path) -> None:
    path = extended(tmp_path) / "prepared/model.safetensors"
    overwrite(path, "model.embed_tokens.weight", 17, b"\x01")
    assert "model.embed_tokens.weight differs in its old rows" in failure(tmp_path).error.message


def test_one_changed_bit_of_a_layer_is_found(tmp_path: Path) -> None:
    path = extended(tmp_path) / "prepared/model.safetensors"
    overwrite(path, "model.layers.1.mlp.up_proj.weight", 3, b"\x01")
    assert "model.layers.1.mlp.up_proj.weight differs" in failure(tmp_path).error.message


def test_a_row_that_is_not_finite_is_found(tmp_path: Path) -> None:
    path = extended(tmp_path) / "prepared/model.safetensors"
    overwrite(path, "model.embed_tokens.weight", 384, np.full(64, 0x7FC0, "<u2").tobytes())
    assert "not finite" in failure(tmp_path).error.message


def test_a_vocabulary_that_the_embedding_lacks_rows_for_is_found(tmp_path: Path) -> None:
    path = extended(tmp_path) / "prepared/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 385}))
    assert "the embedding only 385 rows" in failure(tmp_path).error.message


def test_a_tokenizer_without_the_tokens_is_found(tmp_path: Path) -> None:
    extended(tmp_path)
    (tmp_path / "prepared/tokenizer.json").write_bytes((tmp_path / "model/tokenizer.json").read_bytes())
    assert "'<think>' is encoded as" in failure(tmp_path).error.message


def test_a_class_that_breaks_a_token_is_named_with_a_way_out(tmp_path: Path) -> None:
    """transformers' own class for Qwen2 ignores tokenizer.json's decoder."""

    def make(partial: Path) -> dict[str, Any]:
        config = json.loads((tiny(partial, padding=64) / "config.json").read_text())
        (partial / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))
        byte_level(split=QWEN).save(str(partial / "tokenizer.json"))
        return {}

    publish(layout(tmp_path).model, "base", make)
    report_of(add_tokens, tmp_path, THINK)
    with pytest.raises(StepFailure) as caught:
        report_of(reload, tmp_path, THINK)
    error = caught.value.error
    assert error.reason == "TokenNotDecodable" and "'café'" in error.message and "' café'" in error.hint
    report_of(add_tokens, tmp_path, {"tokens": {"add": [{"content": " café"}]}})
    folder = tmp_path / "prepared"
    tokenizer = reload.TRANSFORMERS.AutoTokenizer.from_pretrained(folder)
    reload._prove_tokens(tokenizer, reload.read_record(folder), 448)


def test_a_model_larger_than_memory_is_proven_by_structure_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reload, "available_memory", lambda: 1 << 20)
    report = report_of(reload, extended(tmp_path, tied=False), THINK)
    assert report.result is not None and "probabilities" not in report.result
    assert "it was not run" in report.result["warnings"][0]
    assert "tensors in their shapes" in report.result["proof"] and "bit-equal" not in report.result["proof"]
    assert json.loads((tmp_path / "finetune-reload.json").read_text())["wasRun"] is False
    overwrite(tmp_path / "prepared/model.safetensors", "lm_head.weight", 5, b"\x01")
    failure(tmp_path)


def test_a_tensor_of_another_shape_is_found_without_running_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reload, "available_memory", lambda: 1 << 20)
    path = extended(tmp_path) / "prepared/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 96}))
    assert "mismatched_keys" in failure(tmp_path).error.message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "brand_new"}, "does not know it"),
        ({"model_type": "llava", "text_config": {"model_type": "llama"}}, "no causal language model for the"),
        ({"model_type": "t5"}, "'t5' is an encoder-decoder"),
    ],
    ids=str,
)
def test_a_model_that_is_no_causal_language_model_is_refused(
    tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    publish(layout(tmp_path).model, "base", lambda partial: {"made": str(tiny(partial))})
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(StepFailure, match=words) as caught:
        report_of(reload, tmp_path, {})
    assert (caught.value.code, caught.value.error.reason) == (ExitCode.BAD_CONFIGURATION, "UnsupportedModel")


def test_warnings_of_add_tokens_are_kept(tmp_path: Path) -> None:
    copy = {"copyOf": "<|im_start|>"}
    spec = {"tokens": {"add": [{"content": "<a>", "init": copy}, {"content": "<b>", "init": copy}]}}
    report = report_of(reload, extended(tmp_path, spec), spec)
    assert report.result is not None and "share its probability" in report.result["warnings"][0]


@pytest.mark.parametrize("noise", [0, 0.01], ids=["equal", "with noise"])
def test_on_a_real_model_four_copies_of_one_source_share_its_probability(tmp_path: Path, noise: float) -> None:
    """Evenly, as long as they are equal; noise makes one of them a little likelier than another."""
    markers = ("<think>", "</think>", "<answer>", "</answer>")
    init = {"copyOf": "<|im_start|>"} | ({"noise": noise} if noise else {})
    spec = {"tokens": {"add": [{"content": marker, "init": init} for marker in markers]}}

    def link(partial: Path) -> dict[str, Any]:
        for path in smollm2().iterdir():
            os.link(path, partial / path.name)
        return {}

    publish(layout(tmp_path).model, "smollm2", link)
    report_of(add_tokens, tmp_path, spec)
    report = report_of(reload, tmp_path, spec)
    assert report.result is not None and ("warnings" in report.result) == (not noise)
    chances = report.result["probabilities"]
    shares = [chance["withoutPrompt"] for chance in chances]
    assert shares == pytest.approx([0.1996] * 4, rel=0.04 if noise else 1e-3)
    assert len(set(shares)) == (4 if noise else 1)
    assert all(chance["withPrompt"] < 1e-6 for chance in chances)
