"""The streamed edit gives what the careful transformers path gives, tensor by tensor, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from finetune.steps.staging import publish
from finetune.steps.tokens import step as add_tokens
from finetune.steps.tokens.architectures import TABLE
from finetune.steps.tokens.initialise import VocabularyMean, initial_rows, mean_of_all
from tests.models import tiny, write_tokenizer
from tests.unit.steps.jobs import layout, report_of

WORDS = ["<think>", "myocardial infarction", "心筋梗塞", "<average>"]
TOKENS = {
    "add": [
        {"content": WORDS[0], "init": {"copyOf": "<|im_start|>"}},
        {"content": WORDS[1]},
        {"content": WORDS[2], "init": {"meanOf": "Pieces"}},
        {"content": WORDS[3], "init": {"meanOf": "Vocabulary"}},
    ]
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return found


def transformers_way(folder: Path, target: Path, multiple: int) -> None:
    """Load, resize, set the rows with torch's arithmetic, save."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    old_rows, length = model.config.vocab_size, len(tokenizer)
    pieces = [tokenizer.encode(text, add_special_tokens=False) for text in (f" {WORDS[1]}", WORDS[2])]
    tokenizer.add_tokens(WORDS)
    first = tokenizer.convert_tokens_to_ids(WORDS[0])
    rows = max(old_rows, -(-len(tokenizer) // multiple) * multiple)
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        matrices = {id(w): w for w in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)}
        for weight in matrices.values():
            dtype = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[weight.dtype]
            old = weight[:length].clone()

            def read(start: int, end: int, old: torch.Tensor = old) -> bytes:
                return old[start:end].contiguous().view(torch.uint8).numpy().tobytes()

            mean = mean_of_all(read, length, old.shape[1], dtype)
            average = initial_rows([VocabularyMean()], read, dtype, lambda mean=mean: mean)
            average = torch.frombuffer(bytearray(average), dtype=weight.dtype)
            weight[first] = old[1]
            for index, ids in enumerate(pieces, start=1):
                weight[first + index] = old[ids].double().mean(0).to(weight.dtype)
            weight[first + 3] = average
            weight[max(old_rows, first + 4) :] = average
    model.save_pretrained(target, max_shard_size="100KB")
    tokenizer.save_pretrained(target)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shape", [{}, {"sharded": True}, {"padding": 2}, {"padding": 70}], ids=str)
def test_every_tensor_has_the_bits_of_the_transformers_way(
    tmp_path: Path, dtype: str, tied: bool, shape: dict[str, Any]
) -> None:
    publish(layout(tmp_path).model, 1, lambda folder: {"made": str(tiny(folder, dtype=dtype, tied=tied, **shape))})
    report = report_of(add_tokens, tmp_path, {"tokens": TOKENS})
    transformers_way(tmp_path / "model", tmp_path / "peer", 64)
    ours, theirs = tensors(tmp_path / "prepared"), tensors(tmp_path / "peer")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name
    config = json.loads((tmp_path / "prepared/config.json").read_text())
    assert report.result is not None
    assert config["vocab_size"] == report.result["embeddingRows"] == max(448, 384 + shape.get("padding", 0))
    assert report.result["embeddingRowsBefore"] == 384 + shape.get("padding", 0)
    ids = [AutoTokenizer.from_pretrained(tmp_path / name).convert_tokens_to_ids(WORDS) for name in ("prepared", "peer")]
    assert ids[0] == ids[1] == [384, 385, 386, 387]


def test_the_index_states_the_new_size(tmp_path: Path) -> None:
    publish(layout(tmp_path).model, 1, lambda folder: {"made": str(tiny(folder, sharded=True, tied=False))})
    report_of(add_tokens, tmp_path, {"tokens": TOKENS})
    index = json.loads((tmp_path / "prepared/model.safetensors.index.json").read_text())
    found = tensors(tmp_path / "prepared")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert index["weight_map"].keys() == found.keys()


def test_files_without_token_matrices_are_not_written_again(tmp_path: Path) -> None:
    publish(layout(tmp_path).model, 1, lambda folder: {"made": str(tiny(folder, sharded=True))})
    report_of(add_tokens, tmp_path, {"tokens": TOKENS})
    same = [(tmp_path / "model" / f.name).samefile(f) for f in sorted((tmp_path / "prepared").glob("*.safetensors"))]
    assert same == [False, True, True]


SMALL = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


@pytest.mark.parametrize("family", sorted(TABLE))
def test_every_family_of_the_table_is_edited_as_transformers_would(tmp_path: Path, family: str) -> None:
    def make(folder: Path) -> dict[str, Any]:
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **SMALL)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        write_tokenizer(folder, 384)
        return {}

    publish(layout(tmp_path).model, family, make)
    report_of(add_tokens, tmp_path, {"tokens": TOKENS})
    transformers_way(tmp_path / "model", tmp_path / "peer", 64)
    ours, theirs = tensors(tmp_path / "prepared"), tensors(tmp_path / "peer")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
