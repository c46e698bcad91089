"""Checkpoints are complete or absent, and what is lost is said, never passed over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from finetune.api.contract import ExitCode
from finetune.steps.dataset.step import run as load_dataset
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.train.checkpoints.checkpoint import Checkpoint, Checkpoints
from finetune.steps.train.plan import Plan
from tests.unit.steps.flow import Workshop

FILES = ("model.safetensors", "config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
INPUTS = {"model": "m", "data": "d", "training": {"learningRate": 1e-5, "seed": 0}}
FACTS = {"worldSize": 1}
RUN = {"seconds": 1.5, "tokens": 10, "resumptions": [], "exact": True, "changes": []}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2, inputs=INPUTS)


def write(checkpoints: Checkpoints, step: int, files: tuple[str, ...] = FILES) -> Checkpoint:
    folder = checkpoints.begin(step, needed=100)
    for name in files:
        (folder / name).write_text(f"{name} after {step}")
    return checkpoints.seal(folder, FACTS, RUN)


def names(checkpoints: Checkpoints) -> set[str]:
    return {path.name for path in checkpoints.folder.iterdir()}


def newest_step(checkpoints: Checkpoints) -> int:
    newest = checkpoints.newest()
    assert newest is not None
    return newest.step


def refusal(checkpoints: Checkpoints) -> StepFailure:
    with pytest.raises(StepFailure) as failure:
        checkpoints.newest()
    return failure.value


def test_without_any_checkpoint_a_run_starts_fresh(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest() is None


def test_the_newest_is_the_highest_step_and_remembers_what_was_recorded(checkpoints: Checkpoints) -> None:
    for step in (9, 10):
        write(checkpoints, step)
    newest = checkpoints.newest()
    assert newest is not None
    assert (newest.step, newest.facts, newest.run) == (10, FACTS, RUN)


def test_as_many_as_asked_are_kept_and_no_more(checkpoints: Checkpoints) -> None:
    for step in (5, 10, 15):
        write(checkpoints, step)
    assert names(checkpoints) == {"step-10", "step-15"}


def test_an_interrupted_one_counts_for_nothing_and_is_removed(checkpoints: Checkpoints) -> None:
    write(checkpoints, 5)
    folder = checkpoints.begin(10, needed=100)
    (folder / "model.safetensors").write_text("half")
    assert newest_step(checkpoints) == 5
    assert names(checkpoints) == {"step-5"}


def test_one_whose_removal_was_interrupted_counts_for_nothing(checkpoints: Checkpoints) -> None:
    write(checkpoints, 5)
    (write(checkpoints, 10).folder / "COMPLETE").unlink()
    assert newest_step(checkpoints) == 5


def test_a_torn_file_means_one_step_back(checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture) -> None:
    write(checkpoints, 5)
    (write(checkpoints, 10).folder / "optimizer.pt").write_text("to")
    assert newest_step(checkpoints) == 5
    assert "step-10 is torn: optimizer.pt has 2 bytes instead of 21: going back to step-5" in caplog.text
    assert names(checkpoints) == {"step-5"}


def test_when_every_checkpoint_is_torn_there_is_an_error_and_no_fresh_start(checkpoints: Checkpoints) -> None:
    (write(checkpoints, 5).folder / "optimizer.pt").write_text("to")
    failure = refusal(checkpoints)
    assert (failure.code, failure.error.reason) == (ExitCode.BAD_DATA, "CheckpointDamaged")
    assert names(checkpoints) == {"step-5"}


PIECES = {
    "model.safetensors": "weights",
    "optimizer.pt": "optimizer state",
    "scheduler.pt": "scheduler state",
    "rng_state.pth": "random state",
    "trainer_state.json": "trainer state",
}


def lose(checkpoints: Checkpoints, step: int, lost: str, when: str) -> None:
    """A checkpoint without one of its files."""
    if when == "deleted":
        (write(checkpoints, step).folder / lost).unlink()
    else:
        write(checkpoints, step, tuple(name for name in FILES if name != lost))


@pytest.mark.parametrize("lost", PIECES)
@pytest.mark.parametrize("when", ["deleted", "never written"])
def test_a_lost_piece_of_state_is_an_error_that_names_it(checkpoints: Checkpoints, lost: str, when: str) -> None:
    lose(checkpoints, 10, lost, when)
    failure = refusal(checkpoints)
    assert (failure.code, failure.error.reason) == (ExitCode.BAD_DATA, "CheckpointDamaged")
    assert f"step-10 lacks the {PIECES[lost]}" in failure.error.message
    assert names(checkpoints) == {"step-10"}


@pytest.mark.parametrize("lost", PIECES)
@pytest.mark.parametrize("when", ["deleted", "never written"])
def test_with_an_older_one_the_run_goes_back_to_it_and_says_what_is_lost(
    checkpoints: Checkpoints, lost: str, when: str
) -> None:
    write(checkpoints, 5)
    lose(checkpoints, 10, lost, when)
    newest = checkpoints.newest()
    assert newest is not None and newest.step == 5
    assert newest.passed_over[0].startswith(f"step-10 lacks the {PIECES[lost]}")
    assert names(checkpoints) == {"step-5"}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data": "e"}, "another data: d instead of e"),
        ({"model": "n"}, "another model: m instead of n"),
        ({"training": {"learningRate": 2e-5, "seed": 0}}, "another training: learningRate 1e-05 instead of 2e-05"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(checkpoints: Checkpoints, changed: dict[str, Any], words: str) -> None:
    write(checkpoints, 5)
    failure = refusal(Checkpoints(checkpoints.folder, 2, INPUTS | changed))
    assert (failure.code, failure.error.reason) == (ExitCode.BAD_CONFIGURATION, "CheckpointOfAnotherRun")
    assert words in failure.error.message


def test_the_refusal_of_changed_data_says_which_source_changed(tmp_path: Path) -> None:
    workshop = Workshop.at(tmp_path)
    workshop.write("a.jsonl", [{"text": f"a {n}"} for n in range(3)])
    workshop.write("b.jsonl", [{"text": f"b {n}"} for n in range(3)])
    sources = [{"uri": "pvc://data/a.jsonl"}, {"uri": "pvc://data/b.jsonl"}]

    def checkpoints(**dataset: Any) -> Checkpoints:
        job = workshop.job(dataset={"sources": sources} | dataset)
        load_dataset(job, workshop.layout)
        plan = Plan.of(job, workshop.layout)
        return Checkpoints(tmp_path / "checkpoints", 2, plan.inputs, plan.parts)

    write(checkpoints(), 5)
    workshop.write("b.jsonl", [{"text": f"c {n}"} for n in range(3)])
    words = "with another data: spec.dataset.sources[1] (pvc://data/b.jsonl) changed"
    assert refusal(checkpoints()).error.message.endswith(words)
    workshop.write("b.jsonl", [{"text": f"b {n}"} for n in range(3)])
    assert newest_step(checkpoints()) == 5
    message = refusal(checkpoints(validation={"fraction": 0.4})).error.message
    assert message.endswith("with another data: spec.dataset.validation.fraction is 0.4 and was 0.0")


def test_checkpoints_of_a_run_that_is_over_make_room_for_the_next(checkpoints: Checkpoints) -> None:
    write(checkpoints, 5)
    following = Checkpoints(checkpoints.folder, 2, INPUTS | {"data": "e"})
    following.forget_other_runs()
    assert following.newest() is None
    write(following, 5)
    following.forget_other_runs()
    assert newest_step(following) == 5


class Usage(NamedTuple):
    free: int


def test_a_full_disk_is_met_before_writing_and_the_older_checkpoint_is_safe(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (5, 10):
        write(checkpoints, step)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free=1 << 20))
    with pytest.raises(StepFailure) as failure:
        checkpoints.begin(15, needed=1 << 30)
    assert failure.value.error.reason == "DiskFull"
    assert "takes 1,073,741,824 bytes" in failure.value.error.message
    assert "has 1,048,576 bytes (1.0 MiB) left; the one after step 10 is safe" in failure.value.error.message
    assert failure.value.result is not None and failure.value.result["checkpoint"]["step"] == 10
    assert newest_step(checkpoints) == 10


def test_room_is_made_by_older_checkpoints_first(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (5, 10):
        write(checkpoints, step)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda folder: Usage(free=1 << 20 if (folder / "step-5").exists() else 1 << 30)
    )
    checkpoints.begin(15, needed=1 << 20)
    assert names(checkpoints) == {"step-10", "step-15.partial"}


def test_the_marker_is_written_last(checkpoints: Checkpoints) -> None:
    marker = json.loads((write(checkpoints, 5).folder / "COMPLETE").read_text())
    assert set(marker["files"]) == set(FILES)
