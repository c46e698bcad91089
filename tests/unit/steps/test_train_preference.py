"""Preference: pairs are read, kept whole and learned by the paper's loss; resumed it is the same run, bit for bit."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.api.contract import ExitCode
from finetune.api.status import DatasetStatus
from finetune.steps.dataset.preference import in_pairs, read_pair
from finetune.steps.rows.formats import Completion, Conversation
from finetune.steps.rows.messages import MalformedRow, Message
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.train.data.examples import Examples
from finetune.steps.train.trainer.preference import Pairs
from tests.unit.steps.runs import Run, same

PAIRS = [
    {"prompt": f"{number} plus one is", "chosen": f" {number + 1}.", "rejected": f" <think> {number - 1} or so."}
    for number in range(10)
]
QUESTION, GOOD, BAD = (
    {"role": "user", "content": "What is two plus three?"},
    {"role": "assistant", "content": "It is five."},
    {"role": "assistant", "content": "It is seven."},
)
TRAINING = {"objective": "Preference", "maxSteps": 3}


def asked(*messages: dict[str, str], learned_from: int = 1) -> Conversation:
    return Conversation(tuple(Message(**message) for message in messages), learned_from)


@pytest.mark.parametrize(
    ("row", "chosen", "rejected"),
    [
        (
            {"prompt": "A ", "chosen": "B", "rejected": "C"},
            Completion("A ", "B"),
            Completion("A ", "C"),
        ),
        (
            {"chosen": "Q: why? A: so", "rejected": "Q: why? A: never"},
            Completion("Q: why? A:", " so"),
            Completion("Q: why? A:", " never"),
        ),
        (
            {"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]},
            asked(QUESTION, GOOD),
            asked(QUESTION, BAD),
        ),
        (
            {"prompt": QUESTION["content"], "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
            asked(QUESTION, GOOD),
            asked(QUESTION, BAD),
        ),
        (
            {"prompt": [QUESTION], "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
            asked(QUESTION, GOOD),
            asked(QUESTION, BAD),
        ),
    ],
)
def test_texts_and_messages_with_and_without_a_prompt_are_pairs(row: Any, chosen: Any, rejected: Any) -> None:
    assert read_pair(row) == (chosen, rejected)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "A", "chosen": "B", "rejected": "B"}, "are equal"),
        ({"prompt": [QUESTION], "chosen": [GOOD], "rejected": [GOOD]}, "are equal"),
        ({"prompt": "A", "chosen": "B", "rejected": [BAD]}, "does not"),
        ({"prompt": [QUESTION], "chosen": "B", "rejected": "C"}, "holds messages"),
        ({"prompt": None, "chosen": [QUESTION, GOOD], "rejected": [QUESTION]}, "rejected has no answer"),
    ],
)
def test_what_is_no_pair_is_said(row: Any, what: str) -> None:
    with pytest.raises(MalformedRow, match=what):
        read_pair(row)


def test_a_pair_of_which_one_is_too_long_is_dropped_whole(tmp_path: Path) -> None:
    rows = [*PAIRS, {"prompt": "x", "chosen": " five." * 2000, "rejected": " no"}]
    rows += [{"prompt": "x", "chosen": " five." * 2000, "rejected": " one." * 2000}]
    run = Run.at(tmp_path, TRAINING, rows=rows)
    document = json.loads((run.workshop.layout.dataset / "finetune-manifest.json").read_text())["result"]
    status = DatasetStatus.model_validate(document)
    assert (status.examples, status.dropped) == (10, 2)
    pairs = Pairs(Examples(run.workshop.layout.dataset / "train"))
    assert len(pairs) == run.plan.examples == 10
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.base)
    for pair, row in zip((pairs[index] for index in range(10)), PAIRS, strict=True):
        for example, name in zip(pair["examples"], ("chosen", "rejected"), strict=True):
            ids, labels = example["input_ids"], example["labels"]
            assert tokenizer.decode(ids) == row["prompt"] + row[name] + "<|im_end|>"
            assert tokenizer.decode(labels[labels != -100]) == row[name] + "<|im_end|>"


def test_a_row_that_is_no_pair_is_named_by_its_number(tmp_path: Path) -> None:
    with pytest.raises(StepFailure, match=r"row 5 of train: columns chosen and rejected are equal"):
        Run.at(tmp_path, TRAINING, rows=[*PAIRS[:4], PAIRS[4] | {"rejected": PAIRS[4]["chosen"]}, *PAIRS[5:]])


def test_a_dataset_without_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StepFailure, match="lack rejected") as failure:
        Run.at(tmp_path, TRAINING, rows=[{"prompt": "a", "chosen": "b"}])
    assert failure.value.code == ExitCode.BAD_CONFIGURATION


def test_reasons_count_pairs() -> None:
    assert in_pairs(Counter({"TooLong": 5, "NothingToLearn": 1}), 4) == Counter({"TooLong": 3, "NothingToLearn": 1})
    assert in_pairs(Counter({"TooLong": 2}), 2) == Counter({"TooLong": 2})


def log_probability(model: Any, example: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the learned tokens of one example, token by token."""
    chances = model(input_ids=example["input_ids"][None]).logits[0, :-1].log_softmax(-1)
    total = torch.zeros(())
    for position, label in enumerate(example["labels"][1:].tolist()):
        if label != -100:
            total = total + chances[position, label]
    return total


@pytest.mark.parametrize("method", ["Full", "LoRA"])
def test_the_loss_is_the_papers_and_the_answers_part(method: str, tmp_path: Path) -> None:
    """The second step's loss, worked out from the weights after the first, pair by pair."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = {"method": method, "batchSize": 10, "microBatchSize": 2, "preference": {"beta": 0.5}}
    run = Run.at(tmp_path, TRAINING | settings | {"learningRate": 3e-3, "maxSteps": 8}, rows=PAIRS)
    run.go()
    history = run.record()["history"]
    assert history[0]["loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item(), rel=1e-6)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    before = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32)
    if method == "Full":
        after = AutoModelForCausalLM.from_pretrained(run.checkpoint(1), dtype=torch.float32)
    else:
        base = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32)
        after = PeftModel.from_pretrained(base, run.checkpoint(1))
    pairs = Pairs(Examples(run.workshop.layout.dataset / "train"))
    losses = []
    with torch.no_grad():
        for index in range(10):
            chosen, rejected = (
                log_probability(after, example) - log_probability(before, example)
                for example in pairs[index]["examples"]
            )
            losses.append(-torch.nn.functional.logsigmoid(0.5 * (chosen - rejected)))
    assert history[1]["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["Full", "LoRA"])
def test_resumed_after_any_step_it_ends_with_the_same_weights(method: str, tmp_path: Path) -> None:
    training = TRAINING | {"method": method, "evaluateEverySteps": 1}
    run = Run.at(tmp_path / "run", training, rows=PAIRS, fraction=0.2)
    result = run.go()
    assert result["validationLoss"] is not None
    assert 0 <= run.record()["history"][-1]["validationAccuracy"] <= 1
    assert load_file(run.checkpoint(1) / "reference.safetensors")["train"].shape == (8, 2)
    for step in (1, 2):
        resumed = run.interrupted_after(step, tmp_path / f"resumed-{step}")
        resumed.go()
        assert same(resumed.weights(), run.weights())
        assert resumed.record()["history"] == run.record()["history"]
