"""A training that hangs says where, and ends; one that gets on is left alone, however slow it is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.api.contract import ExitCode
from finetune.steps.train.pulse import PULSE, Watchman
from tests.unit.steps.processes import EVERY, finish, ready, report, start

DEADLINE = 60
BEATING = """
import sys, time
from finetune.steps.train.pulse import beat, show_stacks_when_asked
show_stacks_when_asked()

def stands_still():
    time.sleep(3600)

for _ in range(int(sys.argv[1])):
    beat()
    time.sleep(0.2)
stands_still()
"""
HANGS_AFTER = 9
SITE = f"""
import time
import finetune.steps.train.pulse as pulse

beat, calls = pulse.beat, []

def hangs_in_an_operation():
    time.sleep(3600)

def counted():
    calls.append(beat())
    if len(calls) == {HANGS_AFTER}:
        hangs_in_an_operation()

pulse.beat = counted
"""
"""Has a training process hang in the middle of a run, from outside our code."""


def process(folder: Path, beats: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BEATING, str(beats)],
        env=os.environ | {PULSE: str(folder), "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_process_that_stands_still_shows_its_stacks_and_is_ended(tmp_path: Path) -> None:
    with process(tmp_path, beats=3) as running:
        watchman = Watchman(tmp_path, 3, lambda: [running.pid], running.kill)
        _, said = running.communicate(timeout=DEADLINE)
    assert watchman.found_hanging
    assert "in stands_still" in said


def test_one_that_gets_on_is_left_alone_for_longer_than_the_deadline(tmp_path: Path) -> None:
    with process(tmp_path, beats=10_000) as running:
        until = time.monotonic() + DEADLINE
        while not any(tmp_path.iterdir()):
            assert time.monotonic() < until
            time.sleep(0.01)
        watchman = Watchman(tmp_path, 2, lambda: [running.pid], running.kill)
        time.sleep(6)
        assert running.poll() is None
        watchman.dismiss()
        running.kill()
    assert not watchman.found_hanging


@pytest.mark.slow
def test_a_run_that_hangs_fails_so_that_it_is_tried_again_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    workshop = ready(tmp_path / "hangs", progressDeadlineSeconds=40)
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    code, output = finish(start(workshop, PYTHONPATH=str(site)))
    assert code == ExitCode.UNAVAILABLE, output
    assert "in hangs_in_an_operation" in output
    said = report(workshop)
    assert said["error"]["reason"] == "Hung"
    assert "40 s, spec.training.progressDeadlineSeconds" in said["error"]["message"]
    assert said["result"]["checkpoint"]["step"] == EVERY
    code, output = finish(start(workshop))
    assert code == 0, output
    assert report(workshop)["resumedFromStep"] == EVERY
