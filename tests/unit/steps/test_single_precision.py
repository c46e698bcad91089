"""Probabilities are computed in f32 from weights of 16 bits, as if the whole model were f32, in bounded memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from finetune.steps.inference.likelihood import Continuation
from finetune.steps.inference.single_precision import in_single_precision, largest_part
from finetune.steps.model_files.checkpoint import read_checkpoint
from tests.models import tiny
from tests.unit.steps.families import tiny_of

IDS = torch.tensor([[5, 17, 3, 200, 45, 9]])


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def in_f32(model: Any) -> torch.Tensor:
    with in_single_precision(model):
        return logits(model)


def nearly(expected: torch.Tensor, found: torch.Tensor) -> bool:
    """Up to the order in which sums are taken."""
    return found.dtype == torch.float32 and bool((expected - found).abs().max() <= 1e-6 * expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral", "gpt_oss", "mamba"])
def test_a_model_of_16_bits_computes_as_the_same_model_in_f32(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """Among them one that makes its input's type that of its weights (mamba) and ones whose experts are one tensor."""
    folder = tiny_of(tmp_path / "model", family, dtype=dtype)
    wide = logits(loaded(folder, torch.float32))
    narrow = loaded(folder, dtype)
    assert not nearly(wide, logits(narrow).float())
    assert nearly(wide, in_f32(narrow))


def test_afterwards_the_model_is_what_it_was(tmp_path: Path) -> None:
    model = loaded(tiny(tmp_path / "model"), torch.bfloat16)
    before, weights = logits(model), [(name, id(weight)) for name, weight in model.named_parameters()]
    in_f32(model)
    with pytest.raises(IndexError), in_single_precision(model), torch.inference_mode():
        model(input_ids=IDS + 10_000)
    assert torch.equal(before, logits(model)) and not torch.is_autocast_enabled("cpu")
    assert weights == [(name, id(weight)) for name, weight in model.named_parameters()]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_never_more_than_one_part_is_wide(tmp_path: Path, tied: bool) -> None:
    folder = tiny(tmp_path / "model", tied=tied, layers=5)
    model = loaded(folder, torch.bfloat16)
    seen: list[int] = []

    def measure(*_: Any) -> None:
        storages = {weight.untyped_storage() for weight in model.parameters()}
        seen.append(sum(storage.nbytes() for storage in storages if storage.nbytes() > 4))

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.register_forward_hook(measure)
    in_f32(model)
    assert max(seen) == largest_part(read_checkpoint(folder).tensors)


def test_the_largest_part_of_a_model_in_f32_takes_nothing(tmp_path: Path) -> None:
    assert largest_part(read_checkpoint(tiny(tmp_path / "model", dtype="float32")).tensors) == 0


def test_the_mixed_precision_of_a_training_run_is_left_out(tmp_path: Path) -> None:
    """accelerate wraps a model's forward pass in autocast, and leaves it so."""
    model = loaded(tiny(tmp_path / "model"), torch.float32)
    wide, plain = logits(model), model.forward
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(plain)
    assert not nearly(wide, logits(model).float())
    assert nearly(wide, in_f32(model))


def test_beneath_an_adapter_frozen_weights_are_widened_too(tmp_path: Path) -> None:
    """As LoRA trains on a GPU: the base in 16 bits, new rows and adapter in f32."""
    from peft import LoraConfig, TaskType, get_peft_model

    folder = tiny(tmp_path / "model")
    settings = LoraConfig(
        target_modules="all-linear",
        trainable_token_indices={"embed_tokens": [5, 9]},
        init_lora_weights=False,
        task_type=TaskType.CAUSAL_LM,
    )
    wide, narrow = (get_peft_model(loaded(folder, dtype), settings).eval() for dtype in (torch.float32, torch.bfloat16))
    trained = {name: weight for name, weight in wide.named_parameters() if weight.requires_grad}
    narrow.load_state_dict(trained, strict=False)
    weights = dict(narrow.named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in trained.items())
    assert {weight.dtype for weight in weights.values()} == {torch.float32, torch.bfloat16}
    assert nearly(logits(wide), in_f32(narrow))


def test_a_weight_used_where_it_is_not_widened_gives_no_number_rather_than_a_wrong_one(tmp_path: Path) -> None:
    model = loaded(tiny(tmp_path / "model"), torch.bfloat16)
    plain = model.forward

    def other_head(**inputs: Any) -> Any:
        output = plain(**inputs)
        output.logits = output.logits @ model.lm_head.weight[:, :1] @ model.lm_head.weight[:, :1].T
        return output

    model.forward = other_head
    with torch.inference_mode():
        assert Continuation(model, IDS).probability([7, 8]) is None
