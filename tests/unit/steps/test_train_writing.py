"""A checkpoint is written beside training where memory allows, and a disk that fills costs the new one only."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.api.contract import ExitCode, Layout
from finetune.steps.dataset.step import run as load_dataset
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.train.checkpoints import checkpoint
from finetune.steps.train.checkpoints.checkpoint import Checkpoints
from finetune.steps.train.checkpoints.snapshot import Snapshot, size_of
from finetune.steps.train.checkpoints.writer import Writer
from finetune.steps.train.loop import Loop
from finetune.steps.train.plan import Plan
from finetune.steps.train.trainer import resumable as trainer
from finetune.steps.workspace.token_record import TokenRecord, write_record
from tests.unit.steps.flow import Workshop

pytestmark = pytest.mark.slow

ROWS = [{"prompt": f"{number} plus one is", "completion": f" {number + 1}."} for number in range(12)]
TRAINING = {"maxSteps": 5, "batchSize": 2, "microBatchSize": 2, "checkpoint": {"everySteps": 2, "keep": 5}}


def test_one_piece_of_work_at_a_time() -> None:
    writer, go, done = Writer(), threading.Event(), []
    writer.start(lambda: (go.wait(), done.append("first")))
    second = threading.Thread(target=lambda: writer.start(lambda: done.append("second")))
    second.start()
    assert done == []
    go.set()
    second.join()
    writer.wait()
    assert done == ["first", "second"]


def test_what_goes_wrong_beside_training_is_raised_once_where_training_looks() -> None:
    def fail() -> None:
        raise OSError("the volume is gone")

    writer = Writer()
    writer.start(fail)
    with pytest.raises(OSError, match="the volume is gone"):
        writer.wait()
    writer.look()


def test_a_copy_stays_as_it_was_and_the_next_one_takes_its_memory() -> None:
    weight = torch.arange(6.0)
    state = {"embedding": weight, "head": weight, "nested": [{"step": torch.tensor(1.0)}, "name", 3]}
    snapshot = Snapshot()
    copy = snapshot.of(state)
    weight += 1
    assert copy["embedding"].tolist() == [0, 1, 2, 3, 4, 5]
    assert copy["embedding"] is copy["head"]
    assert copy["nested"][1:] == ["name", 3]
    assert snapshot.size == size_of(state) == 6 * 4 + 4
    again = snapshot.of(state)
    assert again["head"].data_ptr() == copy["head"].data_ptr()
    assert again["head"].tolist() == [1, 2, 3, 4, 5, 6]


def ready(folder: Path) -> Workshop:
    workshop = Workshop.at(folder)
    workshop.write("rows.jsonl", ROWS)
    load_dataset(workshop.job(training=TRAINING), workshop.layout)
    return workshop


def train(workshop: Workshop, training: dict[str, Any] = TRAINING) -> Checkpoints:
    """A run in this process, with nobody who asks it to stop."""
    layout: Layout = workshop.layout
    plan = Plan.of(workshop.job(training=training), layout)
    checkpoints = Checkpoints(layout.checkpoints, plan.training.checkpoint.keep, plan.inputs)
    stop: Any = SimpleNamespace(requested=False, defer=lambda: None)
    Loop(plan, layout, checkpoints, checkpoints.newest(), stop, None).run()
    return checkpoints


def test_written_from_a_copy_or_while_training_waits_a_checkpoint_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, list[str]] = {"beside": [], "waiting": []}
    seal = Checkpoints.seal
    for case, names in threads.items():

        def sealed(*arguments: Any, names: list[str] = names) -> Any:
            names.append(threading.current_thread().name)
            return seal(*arguments)

        monkeypatch.setattr(Checkpoints, "seal", sealed)
        train(ready(tmp_path / case))
        monkeypatch.setattr(trainer, "available_memory", lambda: 100 << 20)
    assert threads == {"beside": ["checkpoint"] * 2, "waiting": ["MainThread"] * 2}
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        for step in ("step-2", "step-4"):
            ours, theirs = (tmp_path / case / "workspace/checkpoints" / step / name for case in threads)
            assert ours.read_bytes() == theirs.read_bytes(), name


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 66 MiB: room for one checkpoint of a tiny model beside what stays free."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    folder = tmp_path / "work/workspace/checkpoints"
    workshop = ready(tmp_path / "work")
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=66m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this container may not mount")
    yield workshop.folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_too_small_for_the_second_checkpoint_ends_the_run_and_the_first_is_safe(small_disk: Path) -> None:
    workshop = Workshop(small_disk)
    with pytest.raises(StepFailure) as failure:
        train(workshop)
    assert (failure.value.code, failure.value.error.reason) == (ExitCode.BAD_CONFIGURATION, "DiskFull")
    assert "the checkpoint after step 4 takes" in failure.value.error.message
    assert "the one after step 2 is safe" in failure.value.error.message
    assert [path.name for path in workshop.layout.checkpoints.glob("step-*")] == ["step-2"]


@pytest.mark.parametrize("room", [2 << 10, 200 << 10, 1200 << 10])
def test_a_disk_that_fills_while_a_checkpoint_is_written_costs_that_one_only(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    workshop = Workshop(small_disk)
    begin = Checkpoints.begin

    def filled(self: Checkpoints, step: int, needed: int) -> Path:
        partial = begin(self, step, needed)
        if step == 4:
            statistics = os.statvfs(self.folder)
            (self.folder / "of-somebody-else").write_bytes(bytes(statistics.f_bavail * statistics.f_frsize - room))
        return partial

    monkeypatch.setattr(Checkpoints, "begin", filled)
    monkeypatch.setattr(checkpoint, "SPARE", 0)
    with pytest.raises(StepFailure) as failure:
        train(workshop)
    assert failure.value.error.reason == "DiskFull", failure.value.error.message
    assert "the one after step 2 is safe" in failure.value.error.message
    assert [path.name for path in workshop.layout.checkpoints.glob("step-*")] == ["step-2"]


def test_a_loss_that_is_no_number_names_the_rows_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row whose text overflows: its loss is infinite, and that of its neighbours is not."""
    from transformers import LlamaForCausalLM

    workshop = ready(tmp_path / "work")
    rows = workshop.layout.dataset / "train"
    from finetune.steps.train.data.examples import Examples

    broken = Examples(rows)[7]["input_ids"]
    forward = LlamaForCausalLM.forward

    def overflowing(self: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        output = forward(self, input_ids=input_ids, **options)
        if any(torch.equal(row[: len(broken)], broken) for row in input_ids):
            output.loss = output.loss * float("inf")
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", overflowing)
    with pytest.raises(StepFailure) as failure:
        train(workshop)
    assert (failure.value.code, failure.value.error.reason) == (ExitCode.BAD_DATA, "LossNotFinite")
    assert "in question: row 8 of train in pvc://data/rows.jsonl ('7 plus one is" in failure.value.error.message


def test_prompts_are_answered_before_and_after_and_a_resumed_attempt_does_not_ask_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.steps.train.reporting import samples

    settings = TRAINING | {"learningRate": 1e-2, "samples": {"prompts": ["2 plus one is", "Why?"], "maxTokens": 5}}
    workshop = ready(tmp_path / "work")
    asked = []
    answers = samples.answers

    def counted(*arguments: Any, **options: Any) -> Any:
        asked.append(arguments)
        return answers(*arguments, **options)

    monkeypatch.setattr(samples, "answers", counted)
    train(workshop, settings)
    record = json.loads((workshop.layout.trained / "training.json").read_text())
    assert [each["prompt"] for each in record["samples"]] == ["2 plus one is", "Why?"]
    assert all(each["before"] != each["after"] for each in record["samples"])
    assert len(asked) == 1

    shutil.rmtree(workshop.layout.trained)
    shutil.rmtree(workshop.layout.checkpoints / "step-4")
    train(workshop, settings)
    again = json.loads((workshop.layout.trained / "training.json").read_text())
    assert again["samples"] == record["samples"]
    assert again["resumptions"] == [2]
    assert len(asked) == 1


def test_asking_changes_nothing_of_the_training(tmp_path: Path) -> None:
    settings = TRAINING | {"samples": {"prompts": ["Why?"]}}
    one, other = ready(tmp_path / "one"), ready(tmp_path / "other")
    train(one, settings)
    train(other)
    ours, theirs = ((each.layout.trained / "model.safetensors").read_bytes() for each in (one, other))
    assert ours == theirs


def test_after_training_a_new_tokens_chance_is_that_of_the_trained_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    workshop = ready(tmp_path / "work")
    write_record(workshop.layout.model, [TokenRecord("think", 300, False, False, {})])
    workshop.layout.proof.write_text(json.dumps({"message": "Why?", "probabilities": []}))
    train(workshop)
    [said] = json.loads((workshop.layout.trained / "training.json").read_text())["probabilities"]
    model = AutoModelForCausalLM.from_pretrained(workshop.layout.trained, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(workshop.layout.trained).apply_chat_template(
        [{"role": "user", "content": "Why?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0, -1].softmax(-1)[300]
    assert said["token"] == "think"
    assert said["withPrompt"] == pytest.approx(float(expected), rel=1e-3)
