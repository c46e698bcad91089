"""Every architecture is edited as transformers would have resized it, loads strictly, and answers the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.api.contract import ExitCode
from finetune.steps.model_files.checkpoint import read_checkpoint
from finetune.steps.reload import step as reload
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.token_matrices import architectures
from finetune.steps.token_matrices.architectures import TABLE
from finetune.steps.token_matrices.matrices import NotEditable, UnknownArchitecture
from finetune.steps.token_matrices.resizing import matrices_by_resizing
from finetune.steps.tokens import step as add_tokens
from finetune.steps.workspace.staging import publish
from tests.unit.steps.families import VOCABULARY, edit_config, edit_tensors, rename, tiny_of
from tests.unit.steps.flow import Workshop
from tests.unit.steps.jobs import layout, report_of
from tests.unit.steps.peer import TOKENS, WORDS, tensors, transformers_way
from tests.unit.steps.published import with_prediction_layer

TEXT = f"Why {WORDS[0]} is the {WORDS[1]} sky {WORDS[2]} blue? {WORDS[3]}"
OLD_TEXT = "The quick brown fox jumps over the lazy dog."

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}
"""Of the largest logit. Both models hold the same bits, so only the kernels' choice of order could differ."""


def edited(folder: Path, make: Callable[[Path], Any]) -> Path:
    """A workspace with a base model and its extension, proven by reload."""
    publish(layout(folder).model, "base", lambda partial: {"made": str(make(partial))})
    report_of(add_tokens, folder, {"tokens": TOKENS})
    report_of(reload, folder, {"tokens": TOKENS})
    return folder


def logits(folder: Path, text: str) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    with torch.inference_mode():
        output = model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"], use_cache=False)
    return output.logits[0].float()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def assert_like_transformers(folder: Path) -> None:
    """Same tensors bit for bit, same logits for text with and without new tokens."""
    transformers_way(folder / "model", folder / "peer")
    ours, theirs = tensors(folder / "prepared"), tensors(folder / "peer")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(bits(tensor), bits(theirs[name])), name
    assert_equal_logits(folder, next(iter(ours.values())).dtype)


def assert_equal_logits(folder: Path, dtype: torch.dtype) -> None:
    for text in (TEXT, OLD_TEXT):
        mine, peers = logits(folder / "prepared", text), logits(folder / "peer", text)
        assert mine.shape == peers.shape
        assert (mine - peers).abs().max() <= TOLERANCE[dtype] * peers.abs().max()


FAMILIES = sorted({*TABLE, "gemma3"})


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_the_table_is_edited_as_transformers_would(tmp_path: Path, family: str) -> None:
    assert_like_transformers(edited(tmp_path, lambda folder: tiny_of(folder, family)))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neox", "bloom", "phi", "gemma3", "opt", "falcon"])
@pytest.mark.parametrize(
    "shape",
    [{"padding": 2}, {"padding": 70}, {"shard": "60KB"}, {"dtype": torch.float16}, {"dtype": torch.float32}],
    ids=["padded", "padded-beyond", "sharded", "f16", "f32"],
)
def test_padding_shards_and_dtypes_make_no_difference(tmp_path: Path, family: str, shape: dict[str, Any]) -> None:
    folder = edited(tmp_path, lambda folder: tiny_of(folder, family, **shape))
    assert ("shard" in shape) == (folder / "prepared/model.safetensors.index.json").is_file()
    assert_like_transformers(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tied"),
    [
        ("llama", True),
        ("gpt2", False),
        ("falcon", False),
        ("phi", True),
        ("gptj", True),
        ("gpt_neox", True),
        ("gemma2", False),
    ],
)
def test_config_json_says_whether_the_head_is_tied(tmp_path: Path, family: str, tied: bool) -> None:
    folder = edited(tmp_path, lambda folder: tiny_of(folder, family, tie_word_embeddings=tied))
    assert_like_transformers(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "prefix"),
    [("gpt2", "transformer."), ("bloom", "transformer."), ("gemma2", "model."), ("opt", "model.")],
)
def test_files_of_the_base_model_alone_name_tensors_without_its_prefix(
    tmp_path: Path, family: str, prefix: str
) -> None:
    """As the published GPT-2 and BLOOM do."""

    def make(folder: Path) -> None:
        tiny_of(folder, family)
        rename(folder, {prefix: ""})

    folder = edited(tmp_path, make)
    transformers_way(tmp_path / "model", tmp_path / "peer")
    ours, theirs = tensors(folder / "prepared"), tensors(folder / "peer")
    assert {f"{prefix}{name}" for name in ours} == theirs.keys()
    assert all(torch.equal(tensor, theirs[f"{prefix}{name}"]) for name, tensor in ours.items())
    assert_equal_logits(folder, torch.bfloat16)


@pytest.mark.slow
def test_a_tied_head_that_the_file_holds_all_the_same_stays_equal_to_the_embedding(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        tiny_of(folder, "gpt2")
        edit_tensors(folder, lambda held: held | {"lm_head.weight": held["transformer.wte.weight"].clone()})

    folder = edited(tmp_path, make)
    found = tensors(folder / "prepared")
    assert torch.equal(found["lm_head.weight"], found["transformer.wte.weight"])
    transformers_way(tmp_path / "model", tmp_path / "peer")
    assert_equal_logits(folder, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("body", ["model.language_model.", "language_model.model."])
def test_a_text_config_without_a_vocabulary_size_is_that_of_gemma_3(tmp_path: Path, body: str) -> None:
    """The published ones leave it out; both ways to name the tensors are published, too."""

    def make(folder: Path) -> None:
        tiny_of(folder, "gemma3", padding=262_208 - VOCABULARY, hidden_size=16)
        rename(folder, {"language_model.model.": body})
        text_config = json.loads((folder / "config.json").read_text())["text_config"]
        del text_config["vocab_size"]
        edit_config(folder, text_config=text_config)

    folder = edited(tmp_path, make)
    config = json.loads((folder / "prepared/config.json").read_text())
    assert config["text_config"]["vocab_size"] == 262_208 and "vocab_size" not in config
    assert f"{body}embed_tokens.weight" in tensors(folder / "prepared")
    transformers_way(folder / "model", folder / "peer")
    assert_equal_logits(folder, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["xglm", "biogpt", "persimmon", "gpt_neox_japanese", "jamba"])
def test_an_architecture_beyond_the_table_is_left_to_transformers_to_judge(tmp_path: Path, family: str) -> None:
    assert family not in TABLE
    assert_like_transformers(edited(tmp_path, lambda folder: tiny_of(folder, family)))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_finds_the_same_matrices_as_the_table(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = read_checkpoint(tiny_of(tmp_path, family))
    proven = architectures.matrices_of(checkpoint)
    monkeypatch.setattr(architectures, "TABLE", {})
    found = architectures.matrices_of(checkpoint)
    assert (set(found.names), found.rows) == (set(proven.names), proven.rows)


def refusal(folder: Path, make: Callable[[Path], Any]) -> str:
    """Why add-tokens refuses the model, which it leaves as it is."""
    publish(layout(folder).model, "base", lambda partial: {"made": str(make(partial))})
    before = {path.name: path.read_bytes() for path in (folder / "model").iterdir()}
    with pytest.raises(StepFailure) as caught:
        report_of(add_tokens, folder, {"tokens": TOKENS})
    assert (caught.value.code, caught.value.error.reason) == (ExitCode.BAD_CONFIGURATION, "UnsupportedModel")
    assert caught.value.error.hint
    assert {path.name: path.read_bytes() for path in (folder / "model").iterdir()} == before
    assert not (folder / "prepared").exists()
    assert [path.name for path in (folder / "prepared.partial").iterdir()] == [".inputs"]
    return caught.value.error.message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "whatnot"}, "the operator does not know the model_type 'whatnot'"),
        ({"model_type": None}, "does not know the model_type None"),
        ({"model_type": ["llama"]}, "does not know the model_type ['llama']"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "the weights are quantised (gptq, says config.json)",
        ),
        ({"vocab_size": 383}, "has shape [384, 64], config.json's vocabulary and width say [383, 64]"),
        ({"hidden_size": None}, "has shape [384, 64]"),
        ({"tie_word_embeddings": False}, "there is no tensor lm_head.weight"),
    ],
    ids=str,
)
def test_what_neither_table_nor_transformers_can_tell_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    def make(folder: Path) -> None:
        tiny_of(folder, "llama", tie_word_embeddings=True)
        edit_config(folder, **changes)

    assert words in refusal(tmp_path, make)


PER_LAYER = {
    "vocab_size_per_layer_input": VOCABULARY,
    "laurel_rank": 8,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0,
    "layer_types": ["full_attention", "full_attention"],
    "activation_sparsity_pattern": [0.0, 0.0],
}


def test_per_layer_embeddings_are_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, lambda folder: tiny_of(folder, "gemma3n_text", **PER_LAYER))
    assert "per-layer embeddings (model.embed_tokens_per_layer.weight)" in message


def test_transformers_is_not_followed_to_a_third_matrix(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(tiny_of(tmp_path, "gemma3n_text", **PER_LAYER))
    with pytest.raises(NotEditable, match=r"embed_tokens_per_layer\.weight also depends on the vocabulary's size"):
        matrices_by_resizing(checkpoint, UnknownArchitecture("not in the table"))


def test_an_embedding_of_small_numbers_is_refused(tmp_path: Path) -> None:
    name = "transformer.wte.weight"

    def make(folder: Path) -> None:
        tiny_of(folder, "gpt2")
        edit_tensors(folder, lambda held: held | {name: held[name].to(torch.float8_e4m3fn)})

    assert f"{name} has dtype F8_E4M3" in refusal(tmp_path, make)


def test_two_embeddings_are_one_too_many(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        tiny_of(folder, "gpt2")
        edit_tensors(folder, lambda held: held | {"wte.weight": held["transformer.wte.weight"].clone()})

    assert "transformer.wte.weight and wte.weight are both there" in refusal(tmp_path, make)


def test_without_torch_the_table_alone_decides_and_says_so(tmp_path: Path) -> None:
    workshop = Workshop.at(tmp_path)
    edit_config(workshop.layout.model, model_type="persimmon")
    process = workshop.run_without_torch("add-tokens", workshop.job(tokens=TOKENS))
    error = json.loads((tmp_path / "report.json").read_text())["error"]
    assert process.returncode == ExitCode.BAD_CONFIGURATION, process.stderr
    assert "transformers could tell which tensors to extend, but torch is not installed" in error["message"]


def test_copies_of_embedding_and_head_in_further_layers_grow_with_them(tmp_path: Path) -> None:
    """DeepSeek-V3 and GLM-4.5 publish a layer that transformers does not load, with both in it."""
    folder = edited(tmp_path, lambda folder: with_prediction_layer(folder, "glm4_moe", copies=True))
    found = tensors(folder / "prepared")
    rows = json.loads((folder / "prepared/config.json").read_text())["vocab_size"]
    for name, own in (
        ("model.layers.2.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.layers.2.shared_head.head.weight", "lm_head.weight"),
    ):
        assert found[name].shape[0] == rows
        assert torch.equal(found[name], found[own])


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("t5", {}, "encoder-decoder"),
        ("bart", {}, "encoder-decoder"),
        ("bert", {}, "bidirectional encoder"),
        ("roberta", {}, "bidirectional encoder"),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, "quantised (mxfp4)"),
        ("qwen3", {"quantization_config": {"quant_method": "fp8"}}, "quantised (fp8)"),
        ("llama", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised (bitsandbytes)"),
        ("llama", {"quantization_config": {"quant_method": "compressed-tensors"}}, "quantised (compressed-tensors)"),
    ],
)
def test_what_cannot_be_trained_or_published_is_refused_as_what_it_is(
    tmp_path: Path, family: str, settings: dict[str, Any], words: str
) -> None:
    """Also by a job that adds no tokens, before anything is trained."""

    def make(folder: Path) -> None:
        tiny_of(folder, "llama")
        edit_config(folder, **({"model_type": family, "architectures": None} | settings))

    publish(layout(tmp_path).model, "base", lambda partial: {"made": str(make(partial))})
    with pytest.raises(StepFailure) as caught:
        report_of(reload, tmp_path, {})
    assert caught.value.code == ExitCode.BAD_CONFIGURATION
    assert words in caught.value.error.message and caught.value.error.hint
