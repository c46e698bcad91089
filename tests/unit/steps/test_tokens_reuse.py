"""A token that the base has already, reserved and never trained: its row starts anew when the user says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from finetune.steps.reload import step as reload
from finetune.steps.workspace.token_record import read_record
from tests.unit.steps.adding import refusal, result
from tests.unit.steps.families import edit_tensors, tiny_of
from tests.unit.steps.jobs import report_of
from tests.unit.steps.runs import Run

RESERVED = "<|im_start|>"
MATRICES = ("model.embed_tokens.weight", "lm_head.weight")


def token(**settings: Any) -> dict[str, Any]:
    return {"content": RESERVED, "special": True} | settings


def blank(folder: Path) -> int:
    """A model whose reserved token has rows of zeros; its id."""
    tiny_of(folder, "llama", tie_word_embeddings=False)
    row: int = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(RESERVED)

    def cleared(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name in MATRICES:
            held[name][row] = 0
        return held

    edit_tensors(folder, cleared)
    return row


@pytest.fixture
def row(tmp_path: Path) -> int:
    (tmp_path / "model").mkdir()
    return blank(tmp_path / "model")


def test_with_reuse_its_rows_start_as_the_init_says_and_no_other_row_changes(tmp_path: Path, row: int) -> None:
    spec = {"tokens": {"add": [token(reuse=True, init={"copyOf": "<|endoftext|>"})]}}
    status = result(tmp_path, spec)
    assert (status["added"], status["alreadyPresent"], status["startedAnew"]) == (0, 1, 1)
    assert any("norm 0," in warning for warning in status["warnings"])
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("model", "prepared"))
    for name in MATRICES:
        assert before[name].shape == after[name].shape
        assert torch.equal(after[name][row], before[name][0])
        rest = [index for index in range(len(before[name])) if index != row]
        assert torch.equal(after[name][rest], before[name][rest])
    (record,) = read_record(tmp_path / "prepared")
    assert (record.id, record.init["reused"]) == (row, True)
    report_of(reload, tmp_path, spec)


def test_without_it_the_init_is_said_to_be_unused(tmp_path: Path, row: int) -> None:
    status = result(tmp_path, {"tokens": {"add": [token(init={"copyOf": "<|endoftext|>"})]}})
    assert any("its init is not used: set reuse: true" in warning for warning in status["warnings"])
    assert "startedAnew" not in status


def test_a_token_that_is_not_there_cannot_be_reused(tmp_path: Path, row: int) -> None:
    failure = refusal(tmp_path, {"tokens": {"add": [{"content": "<|im_sart|>", "reuse": True}]}})
    assert failure.error.reason == "TokenNotThere"
    assert "spec.tokens.add[0].reuse" in failure.error.message


@pytest.mark.slow
def test_under_lora_its_row_is_trained(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    row = blank(tmp_path / "base")
    wanted = [token(reuse=True, init={"meanOf": "Vocabulary"}), {"content": "<think>"}]
    rows = [{"prompt": f"{number} plus", "completion": f"{RESERVED}<think>{number}"} for number in range(12)]
    run = Run.at(tmp_path / "run", {"method": "LoRA", "maxSteps": 2}, rows=rows, tokens=wanted, model=tmp_path / "base")
    assert row in run.plan.new_rows
    run.go()
    base = load_file(run.base / "model.safetensors")["lm_head.weight"].float()
    deltas = {name: values for name, values in run.weights().items() if "trainable_tokens_delta" in name}
    place = run.plan.new_rows.index(row)
    assert any(not torch.equal(values[place], base[row]) for name, values in deltas.items() if "lm_head" in name)
    config = json.loads((run.trained / "adapter_config.json").read_text())
    assert all(row in ids for ids in config["trainable_token_indices"].values())
