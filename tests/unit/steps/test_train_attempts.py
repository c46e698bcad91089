"""The workspace remembers every attempt: how it began, how it ended, and that it never said how."""

from __future__ import annotations

from pathlib import Path

from finetune.steps.train.checkpoints.checkpoint import Checkpoint
from finetune.steps.train.reporting.attempts import KEPT, Attempts

RUN = {"data": "d"}


def checkpoint(step: int, *passed_over: str) -> Checkpoint:
    return Checkpoint(Path("step"), {"step": step}, passed_over)


def test_an_attempt_that_never_said_how_it_ended_was_killed(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path, RUN)
    attempts.begin(None)
    attempts.begin(checkpoint(10))
    attempts.end("Preempted", "stopped on request after step 14")
    attempts.begin(checkpoint(14))
    first, second, third = attempts.entries()
    assert (first["reason"], first["end"], first["resumedFromStep"]) == ("Killed", None, 0)
    assert (second["reason"], second["resumedFromStep"]) == ("Preempted", 10)
    assert "end" not in third
    assert attempts.ended()[:2] == [first, second]
    assert attempts.ended()[2]["end"] >= third["start"]


def test_damaged_checkpoints_are_warnings_with_the_step_that_was_gone_back_to(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path, RUN)
    attempts.begin(None)
    attempts.begin(checkpoint(5, "step-10 lacks the weights"))
    assert attempts.warnings() == ["step-10 lacks the weights: attempt 2 went back to step 5"]


def test_another_run_begins_with_no_attempts(tmp_path: Path) -> None:
    Attempts(tmp_path, RUN).begin(None)
    other = Attempts(tmp_path, {"data": "e"})
    assert other.entries() == []
    other.begin(None)
    assert len(other.entries()) == 1


def test_so_many_are_kept_and_the_newest_is_among_them(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path, RUN)
    for step in range(KEPT + 3):
        attempts.begin(checkpoint(step))
    assert len(attempts.entries()) == KEPT
    assert attempts.entries()[-1]["resumedFromStep"] == KEPT + 2
