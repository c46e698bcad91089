"""The pieces of training: sizes, batches, losses, and how an end is read from what the workers left."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.api.contract import ExitCode
from finetune.api.spec import Training
from finetune.steps.dataset.step import run as load_dataset
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.train.checkpoints.checkpoint import Checkpoints
from finetune.steps.train.data.examples import Collator, Examples
from finetune.steps.train.distributed.outcome import Outcome, read_outcomes
from finetune.steps.train.loop import Loop
from finetune.steps.train.methods.model import base_dtype
from finetune.steps.train.plan import Plan
from finetune.steps.train.step import _outcome
from finetune.steps.train.trainer.resumable import seed_after
from tests.unit.steps.flow import Workshop

ROWS = [{"prompt": f"{number} plus one is", "completion": f" {number + 1}." * (number % 5 + 1)} for number in range(10)]


def loaded(folder: Path, fraction: float = 0.0, **training: Any) -> tuple[Workshop, Plan]:
    """A workspace with a dataset, and the plan of its training."""
    workshop = Workshop.at(folder)
    workshop.write("rows.jsonl", ROWS)
    job = workshop.job(dataset={"validation": {"fraction": fraction}}, training={"maxSteps": 3} | training)
    load_dataset(job, workshop.layout)
    return workshop, Plan.of(job, workshop.layout)


class NeverStop:
    """Nobody asks to stop. (The real one takes over this process's signals.)"""

    requested = False

    def defer(self) -> None:
        pass


def trained(workshop: Workshop, plan: Plan) -> list[float]:
    """Train in this process and return the loss of each step."""
    checkpoints = Checkpoints(workshop.layout.checkpoints, 1, plan.inputs)
    Loop(plan, workshop.layout, checkpoints, None, NeverStop(), None).run()  # type: ignore[arg-type]
    record = json.loads((workshop.layout.trained / "training.json").read_text())
    return [entry["loss"] for entry in record["history"]]


def test_a_batch_is_filled_up_with_what_carries_no_loss_even_if_the_pad_is_a_token_to_learn() -> None:
    end = 2
    rows = ([5, 6, end], [-100, 6, end]), ([7], [-100])
    examples = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)} for ids, labels in rows]
    batch = Collator(pad=end)(examples)
    assert batch["input_ids"].tolist() == [[5, 6, end], [7, end, end]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, end], [-100, -100, -100]]


def test_a_batch_is_as_long_as_tensor_cores_like_it() -> None:
    example = {"input_ids": torch.arange(9), "labels": torch.arange(9)}
    assert Collator(pad=0, multiple=8)([example])["input_ids"].shape == (1, 16)


def test_the_examples_on_disk_are_those_that_were_encoded(tmp_path: Path) -> None:
    import datasets

    workshop, _ = loaded(tmp_path)
    ours, theirs = (
        Examples(workshop.layout.dataset / "train"),
        datasets.load_from_disk(workshop.layout.dataset / "train"),
    )
    assert len(ours) == len(theirs) == 10
    for index in range(10):
        assert ours[index]["input_ids"].tolist() == theirs[index]["input_ids"]
        assert ours[index]["labels"].tolist() == theirs[index]["labels"]


@pytest.mark.parametrize(
    ("examples", "training", "devices", "steps"),
    [
        (10, {"epochs": 1, "batchSize": 4, "microBatchSize": 2}, 1, 3),
        (10, {"epochs": 1.5, "batchSize": 4, "microBatchSize": 2}, 1, 5),
        (10, {"epochs": 3, "batchSize": 4, "microBatchSize": 1}, 2, 9),
        (1000, {"epochs": 2, "batchSize": 32, "microBatchSize": 4}, 4, 64),
        (10, {"epochs": 0.01, "batchSize": 4, "microBatchSize": 4}, 1, 1),
        (10, {"maxSteps": 7, "batchSize": 4, "microBatchSize": 4}, 1, 7),
    ],
)
def test_the_number_of_steps(examples: int, training: dict[str, Any], devices: int, steps: int) -> None:
    plan = Plan(Training.model_validate(training), Path(), devices, examples, 0, False, {})
    assert plan.steps == steps
    assert plan.accumulation * plan.training.micro_batch_size * devices == plan.training.batch_size


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_DEVICES", "3")
    with pytest.raises(StepFailure, match="not divisible by microBatchSize 1 x 3 devices"):
        loaded(tmp_path, batchSize=4)


def test_training_before_the_dataset_is_there_says_which_step_is_missing(tmp_path: Path) -> None:
    workshop = Workshop.at(tmp_path)
    with pytest.raises(StepFailure) as failure:
        Plan.of(workshop.job(), workshop.layout)
    assert (failure.value.code, failure.value.error.reason) == (ExitCode.NO_INPUT, "StepMissing")
    assert "finetune-step load-dataset" in failure.value.error.hint


def test_accumulated_micro_batches_weigh_every_token_alike(tmp_path: Path) -> None:
    """Rows of 1 to 5 answers: a mean of means would differ from the mean over the batch."""
    losses = [
        trained(*loaded(tmp_path / str(size), batchSize=5, microBatchSize=size, learningRate=1e-3)) for size in (1, 5)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_first_loss_is_the_mean_over_the_learned_tokens(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    workshop, plan = loaded(tmp_path, batchSize=10, microBatchSize=2)
    model = AutoModelForCausalLM.from_pretrained(workshop.layout.model, dtype=torch.float32)
    total, count = 0.0, 0
    for example in (Examples(workshop.layout.dataset / "train")[index] for index in range(10)):
        with torch.no_grad():
            logits = model(input_ids=example["input_ids"][None]).logits[0, :-1]
        chances = logits.log_softmax(-1)
        for position, label in enumerate(example["labels"][1:].tolist()):
            if label != -100:
                total, count = total - chances[position, label].item(), count + 1
    assert trained(workshop, plan)[0] == pytest.approx(total / count, rel=1e-5)


def test_evaluating_more_often_does_not_change_what_is_learned(tmp_path: Path) -> None:
    often, never = (
        trained(*loaded(tmp_path / name, 0.2, maxSteps=6, learningRate=1e-3, **options))
        for name, options in {"often": {"evaluateEverySteps": 1}, "never": {}}.items()
    )
    assert often == never
    weights = [(tmp_path / name / "workspace/trained/model.safetensors").read_bytes() for name in ("often", "never")]
    assert weights[0] == weights[1]


def test_the_bases_type_is_read_from_its_configuration(tmp_path: Path) -> None:
    for config, expected in (
        ({"dtype": "float16"}, torch.float16),
        ({"torch_dtype": "float32"}, torch.float32),
        ({"text_config": {"dtype": "bfloat16"}}, torch.bfloat16),
        ({"dtype": "int8"}, torch.bfloat16),
        ({}, torch.bfloat16),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert base_dtype(tmp_path) == expected


def test_each_step_and_rank_is_reseeded_differently_and_always_alike() -> None:
    seeds = {seed_after(7, step, rank) for step in range(50) for rank in range(4)}
    assert len(seeds) == 200
    assert seed_after(7, 3, 1) == seed_after(7, 3, 1)


DONE = Outcome(ExitCode.OK, {"steps": 3})
STOPPED = Outcome.of(StepFailure(ExitCode.PREEMPTED, "Preempted", "after step 3"))
BROKEN = Outcome.of(StepFailure(ExitCode.BAD_DATA, "LossNotFinite", "step 3"))
FELL = Outcome.of(StepFailure(ExitCode.UNAVAILABLE, "Crashed", "connection closed by peer"))


@pytest.mark.parametrize(
    ("returned", "stopped", "left", "code", "reason"),
    [
        (0, False, [DONE], ExitCode.OK, None),
        (0, True, [DONE], ExitCode.OK, None),
        (75, True, [STOPPED], ExitCode.PREEMPTED, "Preempted"),
        (75, False, [STOPPED], ExitCode.PREEMPTED, "Preempted"),
        (75, False, [], ExitCode.PREEMPTED, "Preempted"),
        (-signal.SIGTERM, True, [], ExitCode.PREEMPTED, "Preempted"),
        (0, True, [STOPPED, STOPPED], ExitCode.PREEMPTED, "Preempted"),
        (0, False, [], ExitCode.UNAVAILABLE, "Crashed"),
        (1, False, [STOPPED], ExitCode.UNAVAILABLE, "Crashed"),
        (1, True, [FELL, BROKEN], ExitCode.BAD_DATA, "LossNotFinite"),
        (1, False, [FELL, FELL], ExitCode.UNAVAILABLE, "Crashed"),
        (-signal.SIGKILL, False, [], ExitCode.UNAVAILABLE, "OutOfMemory"),
        (-signal.SIGSEGV, False, [], ExitCode.UNAVAILABLE, "Crashed"),
    ],
)
def test_an_end_is_read_from_what_the_workers_left(
    tmp_path: Path, returned: int, stopped: bool, left: list[Outcome], code: ExitCode, reason: str | None
) -> None:
    for rank, outcome in enumerate(left):
        outcome.write(tmp_path, rank)
    outcome = ended(returned, stopped, tmp_path, max(1, len(left)))
    assert outcome.code == code
    assert (outcome.error.reason if outcome.error else None) == reason


def ended(returned: int, stopped: bool, folder: Path, expected: int) -> Outcome:
    """The end of a run of so many workers that did not hang."""
    workers: Any = SimpleNamespace(stopped=stopped, hung=False)
    plan: Any = SimpleNamespace(devices_here=expected)
    return _outcome(returned, workers, read_outcomes(folder), Checkpoints(folder / "none", 1, {}), plan)


def test_a_rank_that_left_nothing_is_no_success(tmp_path: Path) -> None:
    DONE.write(tmp_path, 0)
    outcome = ended(0, False, tmp_path, expected=2)
    assert outcome.code == ExitCode.UNAVAILABLE


def test_the_schedules_end_where_they_should(tmp_path: Path) -> None:
    for schedule, last in (("Linear", 0.25), ("Cosine", (1 + math.cos(math.pi * 0.75)) / 2), ("Constant", 1.0)):
        workshop, plan = loaded(tmp_path / schedule, maxSteps=4, schedule=schedule, learningRate=1e-3)
        trained(workshop, plan)
        record = json.loads((workshop.layout.trained / "training.json").read_text())
        assert record["history"][-1]["learningRate"] == pytest.approx(1e-3 * last)


@pytest.mark.parametrize("fact", [{"threads": 77}, {"worldSize": 2}, {"torch": "1.0"}])
def test_a_resumption_in_another_environment_goes_on_and_says_that_it_is_not_exact(
    tmp_path: Path, fact: dict[str, Any]
) -> None:
    workshop, plan = loaded(tmp_path, maxSteps=4, checkpoint={"everySteps": 2, "keep": 1})
    trained(workshop, plan)
    shutil.rmtree(workshop.layout.trained)
    checkpoints = Checkpoints(workshop.layout.checkpoints, 1, plan.inputs)
    marker = workshop.layout.checkpoints / "step-2/COMPLETE"
    document = json.loads(marker.read_text())
    marker.write_text(json.dumps(document | {"facts": document["facts"] | fact}))
    checkpoint = checkpoints.newest()
    assert checkpoint is not None
    result = Loop(plan, workshop.layout, checkpoints, checkpoint, NeverStop(), None).run()  # type: ignore[arg-type]
    assert result is not None
    assert (result["steps"], result["exact"]) == (4, False)
    record = json.loads((workshop.layout.trained / "training.json").read_text())
    ((name, value),) = fact.items()
    assert record["changes"] == [f"{name} {value} -> {document['facts'][name]}"]


def test_no_pickle_is_ever_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every torch.load of a resumption asks for weights only."""
    workshop, plan = loaded(tmp_path, maxSteps=4, checkpoint={"everySteps": 2, "keep": 1})
    trained(workshop, plan)
    shutil.rmtree(workshop.layout.trained)
    asked = []
    load = torch.load

    def watched(*arguments: Any, **options: Any) -> Any:
        asked.append(options.get("weights_only"))
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", watched)
    checkpoints = Checkpoints(workshop.layout.checkpoints, 1, plan.inputs)
    Loop(plan, workshop.layout, checkpoints, checkpoints.newest(), NeverStop(), None).run()  # type: ignore[arg-type]
    assert asked == [True] * 3
