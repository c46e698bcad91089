"""Training runs of tiny models as processes of their own, which can be killed and asked to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.api.contract import ExitCode
from finetune.steps.dataset.step import run as load_dataset
from tests.unit.steps.flow import Workshop

STEPS, EVERY = 32, 6
TRAINING = {
    "maxSteps": STEPS,
    "batchSize": 4,
    "microBatchSize": 2,
    "learningRate": 1e-3,
    "schedule": "Cosine",
    "warmupRatio": 0.1,
    "weightDecay": 0.01,
    "evaluateEverySteps": 7,
    "checkpoint": {"everySteps": EVERY, "keep": 2},
    "seed": 3,
}
ROWS = [{"prompt": f"{number} plus one is", "completion": f" {number + 1}." * (number % 3 + 1)} for number in range(33)]
DEADLINE = 180
TWO = {"FINETUNE_DEVICES": "2"}


def ready(folder: Path, dtype: str = "bfloat16", **training: Any) -> Workshop:
    """A workspace up to training."""
    folder.mkdir(exist_ok=True)
    workshop = Workshop.at(folder, dtype=dtype)
    config = workshop.layout.model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.1}))
    workshop.write("rows.jsonl", ROWS)
    job = workshop.job(dataset={"validation": {"fraction": 0.1}}, training=TRAINING | training)
    workshop.layout.job_file.write_text(job.model_dump_json(by_alias=True))
    load_dataset(job, workshop.layout)
    return workshop


def start(workshop: Workshop, **environment: str) -> subprocess.Popen[str]:
    """`finetune-step train` as a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "finetune.steps", "train"],
        env=os.environ | workshop.environment() | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=DEADLINE)
    return process.returncode, output


def report(workshop: Workshop) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(workshop.layout.report_file.read_text())
    return document


def weights(workshop: Workshop) -> bytes:
    return (workshop.layout.trained / "model.safetensors").read_bytes()


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def newest(workshop: Workshop) -> int:
    names = (path.parent.name.removeprefix("step-") for path in workshop.layout.checkpoints.glob("step-*/COMPLETE"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def until_gone(workshop: Workshop) -> None:
    """The worker dies with its parent; nobody may still be writing."""
    folder = str(workshop.layout.checkpoints)
    deadline = time.monotonic() + 10
    while any(folder in path.read_bytes().decode(errors="replace") for path in command_lines()):
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.05)


def command_lines() -> list[Path]:
    return [path for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]


def stopped(workshop: Workshop, **environment: str) -> None:
    """Train until there is a checkpoint, and ask to stop."""
    process = start(workshop, **environment)
    until(lambda: newest(workshop) >= EVERY, process)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == ExitCode.PREEMPTED, output


def finished(workshop: Workshop, **environment: str) -> None:
    """Train to the end."""
    code, output = finish(start(workshop, **environment))
    assert code == 0, output


def spoil(workshop: Workshop) -> None:
    """Make a weight infinite."""
    from safetensors.numpy import load_file

    from tests.models import write_safetensors

    path = workshop.layout.model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = float("inf")
    write_safetensors(path, tensors, "float32")
