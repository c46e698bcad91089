"""The streamed edit gives what the careful transformers path gives, tensor by tensor, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from finetune.steps.tokens import step as add_tokens
from finetune.steps.workspace.staging import publish
from tests.models import tiny
from tests.unit.steps.jobs import layout, report_of
from tests.unit.steps.peer import TOKENS, WORDS, tensors, transformers_way


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
