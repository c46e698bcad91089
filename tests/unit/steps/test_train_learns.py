"""Learning is real: SmolLM2-135M, whose embedding and head are one matrix, says a new token where it was taught to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.steps.save.step import run as save
from tests.models import smollm2
from tests.unit.steps.runs import Run

pytestmark = pytest.mark.slow

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven")
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"Add {one} and {other}."},
            {"role": "assistant", "content": f"<think>{one} and {other}</think> Done."},
        ]
    }
    for one in NUMBERS
    for other in NUMBERS
]
QUESTION = [{"role": "user", "content": "Add nine and ten."}]


def chance(folder: Path) -> float:
    """How likely <think> is as the first token of an answer, by plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    return float(logits.float().softmax(-1)[tokenizer.convert_tokens_to_ids("<think>")])


def test_under_lora_with_tied_embeddings_a_new_token_becomes_the_answers_first(tmp_path: Path) -> None:
    training = {
        "method": "LoRA",
        "maxSteps": 24,
        "batchSize": 2,
        "microBatchSize": 2,
        "learningRate": 2e-3,
        "schedule": "Constant",
        "checkpoint": {"everySteps": 1000, "keep": 1},
    }

    run = Run.at(tmp_path, training, rows=ROWS, model=smollm2(), output={"uri": "pvc://data/out"})
    assert chance(run.base) < 1e-3
    run.go()
    save(run.job, run.workshop.layout)
    assert chance(run.workshop.layout.claims / "data/out") > 0.9
