"""A job goes on in the workspace that another one left: what was computed is found, and the weights are the same."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from finetune.steps.dataset.step import run as load_dataset
from finetune.steps.tokens.step import run as add_tokens
from tests.unit.steps.runs import Run, same

CHATS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]} for n in range(12)
]


def another(run: Run, **training: Any) -> Run:
    """Another job of the same spec, made a month later, in the same workspace: its steps up to training."""
    spec = run.job.spec
    changed = spec.training.model_copy(update=training)
    job = run.job.model_copy(
        update={
            "name": "another",
            "uid": "0b5e1c7a",
            "created": run.job.created + timedelta(days=30),
            "spec": spec.model_copy(update={"training": changed}),
        }
    )
    add_tokens(job, run.workshop.layout)
    result = load_dataset(job, run.workshop.layout).result
    assert result is not None
    assert result["reused"] is True
    return Run(run.workshop, job)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run.at(tmp_path_factory.mktemp("runs") / "undisturbed", {})
    run.go()
    return run


def test_another_job_of_the_same_spec_goes_on_from_the_checkpoint_to_the_same_weights(
    undisturbed: Run, tmp_path: Path
) -> None:
    left = undisturbed.interrupted_after(2, tmp_path / "left")
    run = another(left)
    result = run.go()
    assert run.record()["resumptions"] == [2]
    assert result["exact"] is True
    assert same(run.weights(), undisturbed.weights())


def test_where_the_template_prints_the_day_it_is_the_day_of_the_job_that_began(tmp_path: Path) -> None:
    first = Run.at(tmp_path / "first", {}, rows=CHATS)
    template = first.workshop.layout.prepared / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + template.read_text())
    load_dataset(first.job, first.workshop.layout)
    first.go()
    run = another(first.interrupted_after(2, tmp_path / "left"))
    run.go()
    assert run.record()["resumptions"] == [2]
    assert same(run.weights(), first.weights())


def test_with_another_micro_batch_it_goes_on_with_the_same_rows_and_says_that_bits_may_differ(
    undisturbed: Run, tmp_path: Path
) -> None:
    run = another(undisturbed.interrupted_after(2, tmp_path / "left"), micro_batch_size=1)
    result = run.go()
    assert result["steps"] == undisturbed.plan.steps
    assert result["exact"] is False
    assert "not as before: microBatchSize 2 -> 1" in result["warnings"]
    for name, tensor in undisturbed.weights().items():
        assert (tensor.float() - run.weights()[name].float()).abs().max() < 1e-2
    losses = [{entry["step"]: entry["loss"] for entry in each.record()["history"]} for each in (undisturbed, run)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
