"""Two ranks that share the work: they stop together, and whatever the method, a run goes on bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.unit.steps.processes import EVERY, TWO, finished, ready, report, stopped, weights
from tests.unit.steps.runs import Run, same

pytestmark = pytest.mark.slow

PAIRS = [
    {"prompt": f"{number} plus one is", "chosen": f" {number + 1}.", "rejected": " no" * (number % 3 + 1)}
    for number in range(12)
]


def test_two_ranks_stop_together_and_go_on_with_the_same_weights(tmp_path: Path) -> None:
    undisturbed, disturbed = ready(tmp_path / "one", maxSteps=14), ready(tmp_path / "other", maxSteps=14)
    finished(undisturbed, **TWO)
    stopped(disturbed, **TWO)
    finished(disturbed, **TWO)
    assert report(disturbed)["resumedFromStep"] >= EVERY
    assert weights(disturbed) == weights(undisturbed)


def go(run: Run) -> None:
    """On two ranks, from the newest checkpoint, if there is one."""
    run.workshop.layout.job_file.write_text(run.job.model_dump_json(by_alias=True))
    finished(run.workshop, **TWO)


def test_a_warm_up_and_a_moving_average_go_on_inside_each_phase_and_at_their_boundary(tmp_path: Path) -> None:
    """In the warm-up only new rows move: decay would show in any other."""
    training: dict[str, Any] = {
        "maxSteps": 2,
        "weightDecay": 0.5,
        "ema": {"decay": 0.9},
        "embeddingWarmup": {"steps": 2, "learningRate": 0.1},
    }
    run = Run.at(tmp_path / "undisturbed", training, model={"dtype": "float32"})
    go(run)
    base, rows = load_file(run.base / "model.safetensors"), load_file(run.checkpoint(2) / "adapter_model.safetensors")
    assert all("trainable_tokens_delta" in name for name in rows)
    new = list(run.plan.new_rows)
    embedding = next(values for name, values in rows.items() if "embed_tokens" in name)
    assert (embedding - base["model.embed_tokens.weight"][new]).abs().max() > 0.05
    for step in (1, 2, 3):
        resumed = run.interrupted_after(step, tmp_path / f"resumed-{step}")
        go(resumed)
        assert same(resumed.weights(), run.weights()), f"after step {step}"
        assert resumed.record()["exact"] is True


def test_preferences_are_measured_by_both_ranks_and_learned_again_bit_for_bit(tmp_path: Path) -> None:
    training = {"objective": "Preference", "maxSteps": 2}
    run, alone = (Run.at(tmp_path / name, training, rows=PAIRS) for name in ("undisturbed", "alone"))
    go(run)
    alone.go()
    both, one = (load_file(each.checkpoint(1) / "reference.safetensors")["train"] for each in (run, alone))
    torch.testing.assert_close(both, one, rtol=1e-5, atol=1e-5)
    resumed = run.interrupted_after(1, tmp_path / "resumed")
    go(resumed)
    assert same(resumed.weights(), run.weights())
