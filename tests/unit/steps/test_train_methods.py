"""LoRA, QLoRA, embedding warm-up, moving average, early stopping: what learns, what must not, and that a resumed run is
the undisturbed one bit for bit."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.api.contract import ExitCode, Step
from finetune.api.spec import EarlyStopping
from finetune.api.status import TrainingStatus
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.runtime.progress import Progress
from finetune.steps.train.checkpoints.checkpoint import Checkpoints, required
from finetune.steps.train.methods.average import decay_after
from finetune.steps.train.trainer.early_stopping import exhausted
from tests.unit.steps.runs import Run, same

pytestmark = pytest.mark.slow

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WARMUP = {"embeddingWarmup": {"steps": 2, "learningRate": 1e-2}}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA with dropout": {"method": "LoRA", "lora": {"rank": 4, "dropout": 0.1}},
    "QLoRA in 4 bits": {"method": "QLoRA", "lora": {"rank": 4}},
    "QLoRA in 8 bits": {"method": "QLoRA", "lora": {"rank": 4, "bits": 8}},
    "warm-up, then all weights": WARMUP,
    "warm-up, then LoRA": {"method": "LoRA"} | WARMUP,
    "moving average": {"ema": {"decay": 0.9}},
    "moving average of LoRA": {"method": "LoRA", "ema": {"decay": 0.9}},
    "8-bit AdamW": {"optimizer": "AdamW8bit"},
}


@pytest.mark.parametrize("name", METHODS)
def test_resumed_after_any_step_a_run_ends_with_the_same_weights(name: str, tmp_path: Path) -> None:
    run = Run.at(tmp_path / "undisturbed", METHODS[name] | {"maxSteps": 3})
    run.go()
    for step in range(1, run.plan.steps):
        resumed = run.interrupted_after(step, tmp_path / f"resumed-{step}")
        result = resumed.go()
        assert result["exact"] is True
        assert same(resumed.weights(), run.weights()), f"after step {step}"
        assert resumed.record()["history"] == run.record()["history"]


@pytest.mark.parametrize("tied", [True, False])
def test_lora_trains_the_new_rows_and_no_old_one(tied: bool, tmp_path: Path) -> None:
    run = Run.at(tmp_path, {"method": "LoRA"}, model={"tied": tied})
    run.go()
    new, base = list(run.plan.new_rows), load_file(run.base / "model.safetensors")
    assert len(new) == 2
    rows = {name: values for name, values in run.weights().items() if "trainable_tokens_delta" in name}
    assert len(rows) == (1 if tied else 2)
    for name, values in rows.items():
        matrix = base[HEAD if "lm_head" in name else EMBEDDING]
        assert values.shape == (2, matrix.shape[1])
        assert (values != matrix[new].float()).any(dim=1).all()
    assert list(run.record()["newRowsMoved"].values()) == [2] * len(rows)
    assert len([name for name in run.weights() if "lora_A" in name]) == 14  # each linear layer of two blocks


def test_lora_adapts_the_modules_that_the_spec_names(tmp_path: Path) -> None:
    run = Run.at(tmp_path, {"method": "LoRA", "lora": {"rank": 2, "alpha": 8, "targets": ["q_proj", "v_proj"]}})
    run.go()
    adapted = {name.split(".")[-3] for name in run.weights() if "lora_A" in name}
    assert adapted == {"q_proj", "v_proj"}
    assert {values.shape[0] for name, values in run.weights().items() if "lora_A" in name} == {2}


def test_modules_that_the_model_lacks_are_named(tmp_path: Path) -> None:
    run = Run.at(tmp_path, {"method": "LoRA", "lora": {"targets": ["query_key_value"]}})
    with pytest.raises(StepFailure, match="query_key_value") as failure:
        run.go()
    assert (failure.value.code, failure.value.error.reason) == (ExitCode.BAD_CONFIGURATION, "LoRANotPossible")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["Full", "LoRA"])
def test_in_the_warmup_only_new_rows_move(tied: bool, method: str, tmp_path: Path) -> None:
    """Weight decay and a large rate would show in any row that they reach."""
    run = Run.at(
        tmp_path,
        {"method": method, "maxSteps": 1, "weightDecay": 0.5, "embeddingWarmup": {"steps": 3, "learningRate": 0.1}},
        model={"tied": tied, "dtype": "float32"},
    )
    run.go()
    trained = load_file(run.checkpoint(3) / "adapter_model.safetensors")
    assert all("trainable_tokens_delta" in name for name in trained)
    optimizer = torch.load(run.checkpoint(3) / "optimizer.pt", weights_only=True)
    assert len(optimizer["state"]) == (1 if tied else 2)
    assert {group["weight_decay"] for group in optimizer["param_groups"]} == {0.0}
    if method == "Full":  # the next phase begins with the rows that the warm-up ended with
        first = load_file(run.checkpoint(3) / "adapter_model.safetensors")
        base, after = load_file(run.base / "model.safetensors"), run.weights()
        new = list(run.plan.new_rows)
        for name, rows in first.items():
            matrix = HEAD if "lm_head" in name and not tied else EMBEDDING
            assert (rows - base[matrix][new]).abs().max() > 0.05
            assert (rows - after[matrix][new]).abs().max() < 0.01


def test_the_warmup_is_a_phase_that_progress_and_history_tell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.at(tmp_path, WARMUP | {"maxSteps": 3, "schedule": "Linear"})
    with Progress(Step.TRAIN, "step") as progress:
        result = run.go(progress)
    assert result["steps"] == run.plan.steps == 5
    history = run.record()["history"]
    assert [entry["step"] for entry in history] == [1, 2, 3, 4, 5]
    assert [entry["learningRate"] for entry in history] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
    last = json.loads(capsys.readouterr().out.splitlines()[-1].partition(" ")[2])
    metrics = {metric["name"]: metric["value"] for metric in last["metrics"]}
    assert (metrics["phase"], metrics["current"], metrics["total"]) == ("Training", "5", "5")


def test_a_warmup_without_new_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StepFailure) as failure:
        _ = Run.at(tmp_path, WARMUP, tokens=[{"content": "<|im_start|>"}]).plan
    assert failure.value.error.reason == "NoNewRows"


@pytest.mark.parametrize("bf16", [False, True])
def test_nearly_every_weight_moves_at_a_small_rate(bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The master weights are f32, under autocast too. In bf16 most of these updates would be rounded away."""
    if bf16:
        import finetune.steps.train.loop as module

        arguments = module.TrainingArguments
        monkeypatch.setattr(module, "TrainingArguments", lambda **options: arguments(**options | {"bf16": True}))
    run = Run.at(tmp_path, {"learningRate": 1e-5, "maxSteps": 3})
    run.go()
    base, after = load_file(run.base / "model.safetensors"), load_file(run.checkpoint(2) / "model.safetensors")
    moved = sum(int((after[name] != base[name].float()).sum()) for name in base)
    assert all(values.dtype == torch.float32 for values in after.values())
    assert moved / sum(values.numel() for values in base.values()) > 0.99
    assert {values.dtype for values in run.weights().values()} == {torch.bfloat16}


def test_the_saved_weights_are_the_moving_average_of_all_steps(tmp_path: Path) -> None:
    decay = 0.7
    run = Run.at(tmp_path, {"ema": {"decay": decay}}, fraction=0.2, model={"dtype": "float32"})
    result = run.go()
    average = load_file(run.base / "model.safetensors")
    for step in (1, 2, 3):
        weights, share = load_file(run.checkpoint(step) / "model.safetensors"), 1 - decay_after(step, decay)
        average = {name: torch.lerp(average[name], weights[name], share) for name in average}
        saved = load_file(run.checkpoint(step) / "ema.safetensors")
        assert same(average, saved)
    ours = run.weights()
    assert not same(ours, average)  # the fourth step is in it as well
    assert max((ours[name] - average[name]).abs().max() for name in ours) < 1e-2
    assert result["validationLoss"] == pytest.approx(_loss(run), rel=1e-5)


def _loss(run: Run) -> float:
    """The validation loss of the published model, by plain transformers."""
    from transformers import AutoModelForCausalLM

    from finetune.steps.train.data.examples import Examples

    model = AutoModelForCausalLM.from_pretrained(run.trained, dtype=torch.float32).eval()
    total = count = 0.0
    rows = Examples(run.workshop.layout.dataset / "validation")
    for row in (rows[index] for index in range(len(rows))):
        learned = int((row["labels"][1:] != -100).sum())
        with torch.no_grad():
            loss = model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.item()
        total, count = total + loss * learned, count + learned
    return total / count


def test_the_average_forgets_where_it_started() -> None:
    assert decay_after(1, 0.999) == pytest.approx(2 / 11)
    assert decay_after(10**6, 0.999) == 0.999


@pytest.mark.parametrize(
    ("losses", "patience", "improvement", "stops"),
    [
        ([3.0, 2.0, 1.0], 1, 0.0, False),
        ([3.0, 3.1], 1, 0.0, True),
        ([3.0, 3.1, 2.9], 2, 0.0, False),
        ([3.0, 3.1, 3.2], 2, 0.0, True),
        ([3.0, 2.95, 2.91], 2, 0.1, True),
        ([3.0, 2.95, 2.85], 2, 0.1, False),
        ([float("nan"), float("nan")], 2, 0.0, True),
        ([], 1, 0.0, False),
    ],
)
def test_patience_counts_evaluations_without_improvement(
    losses: list[float], patience: int, improvement: float, stops: bool
) -> None:
    history: list[dict[str, Any]] = []
    for loss in losses:
        history += [{"loss": 1.0}, {"eval_loss": loss}]
    assert exhausted(history, EarlyStopping(patience=patience, minimum_improvement=improvement)) is stops


def test_training_ends_early_when_the_validation_loss_no_longer_falls_and_resumes_so(tmp_path: Path) -> None:
    rule = {"patience": 2, "minimumImprovement": 100.0}
    run = Run.at(tmp_path / "run", {"maxSteps": 9, "evaluateEverySteps": 1, "earlyStopping": rule}, fraction=0.2)
    result = run.go()
    assert (result["steps"], result["stoppedEarly"]) == (3, True)
    TrainingStatus.model_validate(result)
    for step in (1, 2, 3):
        resumed = run.interrupted_after(step, tmp_path / f"resumed-{step}")
        assert resumed.go()["steps"] == 3
        assert same(resumed.weights(), run.weights())
        assert resumed.record()["history"] == run.record()["history"]


def test_gradient_checkpointing_changes_nothing_under_lora(tmp_path: Path) -> None:
    plain, saving = (
        Run.at(tmp_path / switch, {"method": "LoRA", "gradientCheckpointing": switch, "maxSteps": 2})
        for switch in ("Disabled", "Enabled")
    )
    plain.go()
    saving.go()
    ours, theirs = saving.weights(), plain.weights()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


@pytest.mark.parametrize(
    ("training", "step", "piece"),
    [
        ({"method": "LoRA"}, 2, "adapter_model.safetensors"),
        ({"ema": {"decay": 0.9}}, 2, "ema.safetensors"),
        (WARMUP, 2, "adapter_model.safetensors"),
        (WARMUP, 3, "warmup_state.json"),
        (WARMUP, 2, "optimizer.pt"),
    ],
)
def test_a_lone_checkpoint_that_lost_a_piece_is_an_error(
    training: dict[str, Any], step: int, piece: str, tmp_path: Path
) -> None:
    run = Run.at(tmp_path / "run", training | {"maxSteps": 2 if "embeddingWarmup" in training else 3})
    run.go()
    broken = run.interrupted_after(step, tmp_path / "broken")
    for older in broken.workshop.layout.checkpoints.glob("step-*"):
        if older != broken.checkpoint(step):
            shutil.rmtree(older)
    marker = broken.checkpoint(step) / "COMPLETE"
    document = json.loads(marker.read_text())
    del document["files"][piece]  # lost before the marker was written, so to say
    marker.write_text(json.dumps(document))
    with pytest.raises(StepFailure) as failure:
        broken.go()
    assert failure.value.error.reason == "CheckpointDamaged"


def test_what_a_checkpoint_needs_depends_on_the_settings_and_the_phase() -> None:
    settings = {"embeddingWarmup": {"steps": 5}, "ema": {"decay": 0.9}}
    plain = required({}, 1).keys()
    assert required(settings, 5).keys() == plain
    assert required(settings, 6).keys() - plain == {"history of the warm-up", "moving average"}


def test_runs_with_other_methods_do_not_share_checkpoints(tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{}, {"method": "LoRA"}, {"method": "LoRA", "lora": {"rank": 3}}, {"ema": {}}]
    inputs = [
        Run.at(tmp_path / str(index), training).plan.inputs["training"] for index, training in enumerate(settings)
    ]
    assert all(one != other for one, other in itertools.combinations(inputs, 2))
    assert Checkpoints(tmp_path / "none", 1, inputs[0]).newest() is None
