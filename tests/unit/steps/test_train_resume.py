"""The promise of training: killed or asked to stop, a run goes on and ends with the weights of an undisturbed one, bit
for bit. Real processes, a tiny model with dropout, gradient accumulation, epochs that end in the middle of a batch."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from finetune.api.contract import ExitCode
from finetune.api.status import TrainingStatus
from tests.unit.steps.flow import Workshop
from tests.unit.steps.processes import (
    EVERY,
    STEPS,
    TRAINING,
    finish,
    newest,
    ready,
    report,
    spoil,
    start,
    until,
    until_gone,
    weights,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    workshop = ready(tmp_path_factory.mktemp("undisturbed"))
    code, output = finish(start(workshop))
    assert code == 0, output
    return workshop


def test_an_undisturbed_run_reports_what_it_came_to(undisturbed: Workshop) -> None:
    result = report(undisturbed)["result"]
    status = TrainingStatus.model_validate(result)
    assert (status.steps, status.exact) == (STEPS, True)
    assert status.validation_loss is not None and status.loss is not None
    assert report(undisturbed)["resumedFromStep"] == 0
    record = json.loads((undisturbed.layout.trained / "training.json").read_text())
    assert [entry["step"] for entry in record["history"]] == list(range(1, STEPS + 1))
    assert [entry["step"] for entry in record["history"] if "validationLoss" in entry] == [*range(7, STEPS, 7), STEPS]
    assert record["history"][-1]["loss"] < record["history"][0]["loss"]


def test_killed_then_asked_to_stop_it_ends_with_the_same_weights(undisturbed: Workshop, tmp_path: Path) -> None:
    workshop = ready(tmp_path / "disturbed")

    process = start(workshop)
    until(lambda: newest(workshop) >= EVERY, process)
    process.kill()
    process.wait()
    until_gone(workshop)
    killed_at = newest(workshop)
    assert not workshop.layout.trained.exists()

    process = start(workshop)
    until(lambda: newest(workshop) > killed_at, process)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == ExitCode.PREEMPTED, output
    stopped = report(workshop)
    assert stopped["error"]["reason"] == "Preempted"
    assert stopped["resumedFromStep"] == killed_at
    stopped_at = stopped["result"]["checkpoint"]["step"]
    assert stopped_at == newest(workshop) > killed_at

    code, output = finish(start(workshop))
    assert code == 0, output
    finished = report(workshop)
    assert finished["resumedFromStep"] == stopped_at
    assert finished["result"]["exact"] is True
    assert weights(workshop) == weights(undisturbed)
    ours, theirs = (json.loads((each.layout.trained / "training.json").read_text()) for each in (workshop, undisturbed))
    assert ours["history"] == theirs["history"]
    assert ours["tokens"] == theirs["tokens"]
    assert ours["resumptions"] == [killed_at, stopped_at]


def test_a_finished_run_is_not_repeated(undisturbed: Workshop) -> None:
    before = (undisturbed.layout.trained / "model.safetensors").stat().st_mtime_ns
    code, output = finish(start(undisturbed))
    assert code == 0, output
    assert report(undisturbed)["result"]["reused"] is True
    assert (undisturbed.layout.trained / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("delay", [0.0, 0.5, 2.0])
def test_asked_to_stop_before_the_first_step_it_goes_at_once_and_says_preempted(tmp_path: Path, delay: float) -> None:
    workshop = ready(tmp_path / "early")
    process = start(workshop)
    until(lambda: listens(process.pid), process)
    time.sleep(delay)
    process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    code, output = finish(process)
    assert code == ExitCode.PREEMPTED, output
    assert time.monotonic() - begin < 10
    if delay:
        assert report(workshop)["error"]["reason"] == "Preempted"


def listens(process: int) -> bool:
    """Whether the process has a handler for SIGTERM."""
    caught = Path(f"/proc/{process}/status").read_text().partition("SigCgt:")[2].split()[0]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def test_a_changed_setting_starts_a_new_run_once_the_former_is_over(undisturbed: Workshop, tmp_path: Path) -> None:
    workshop = Workshop(tmp_path / "copy")
    shutil.copytree(undisturbed.folder, workshop.folder)
    former = weights(workshop)
    job = workshop.job(dataset={"validation": {"fraction": 0.1}}, training=TRAINING | {"learningRate": 2e-3})
    workshop.layout.job_file.write_text(job.model_dump_json(by_alias=True))
    code, output = finish(start(workshop))
    assert code == 0, output
    assert report(workshop)["resumedFromStep"] == 0
    assert weights(workshop) != former


def test_the_trained_model_has_the_bases_type_files_and_settings(undisturbed: Workshop) -> None:
    from safetensors import safe_open

    trained, base = undisturbed.layout.trained, undisturbed.layout.model
    with safe_open(trained / "model.safetensors", "np") as file:
        header = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert set(header.values()) == {"BF16"}
    assert "lm_head.weight" not in header
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (trained / name).read_bytes() == (base / name).read_bytes()


def test_a_loss_that_is_no_number_ends_the_run_with_the_step(tmp_path: Path) -> None:
    workshop = ready(tmp_path / "wild", dtype="float32")
    spoil(workshop)
    code, output = finish(start(workshop))
    assert code == ExitCode.BAD_DATA, output
    error = report(workshop)["error"]
    assert error["reason"] == "LossNotFinite"
    assert "step 1:" in error["message"]
