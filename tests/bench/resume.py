"""`make bench-resume`: a run of `finetune-step train` that is killed twenty times, beside the same run left alone.

Each attempt is the real process. Kills come at seeded random moments: a quarter while the attempt starts, the others
while it trains, spread over the whole run; each is SIGKILL or SIGTERM by the throw of a coin. Then what a checkpoint
costs on a model of more than 100 MB: written while training waits, and beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.api.contract import PROGRESS_PREFIX, ExitCode
from finetune.steps.dataset.step import run as load_dataset
from tests.bench.table import FOLDER, Row, write
from tests.unit.steps.flow import Workshop

EVERY = 10
TRAINING = {
    "batchSize": 8,
    "microBatchSize": 4,
    "learningRate": 1e-3,
    "schedule": "Cosine",
    "warmupRatio": 0.1,
    "weightDecay": 0.01,
    "checkpoint": {"everySteps": EVERY, "keep": 2},
    "seed": 3,
}
ROWS = [
    {"prompt": f"{number} plus one is", "completion": f" {number + 1}." * (number % 9 + 1)} for number in range(500)
]
WHILE_STARTING = 0.25
"""Share of the kills that come before the attempt's first step."""

PARTS = {"imports": r"imports took ([\d.]+) s", "model and data": r"loading took ([\d.]+) s"}
FIRST_STEP = r"the first step took ([\d.]+) s"
STALLED = r"training stood still for (\d+) ms"

EVERY_STEP = """
import sys
if "finetune.steps.train.worker" in sys.orig_argv:
    from finetune.steps.runtime import progress
    progress.INTERVAL = 0.0
"""
"""A sitecustomize.py: progress is said after every step, so that kills can be told to the step."""

SYNCHRONOUS = """
import sys
from finetune.steps.train import worker
if sys.argv.pop(1) == "waiting":
    from finetune.steps.train.trainer import resumable
    resumable.available_memory = lambda: 0
sys.exit(worker.main())
"""
"""The training process, in one case of the mind that there is no memory for a copy."""


def ready(folder: Path, training: dict[str, Any], **model: Any) -> Workshop:
    """A workspace up to training; attention drops out, so that random numbers matter."""
    folder.mkdir()
    workshop = Workshop.at(folder, **model)
    config = workshop.layout.model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.1}))
    workshop.write("rows.jsonl", ROWS)
    job = workshop.job(training=training)
    workshop.layout.job_file.write_text(job.model_dump_json(by_alias=True))
    load_dataset(job, workshop.layout)
    return workshop


@dataclass
class Attempt:
    """One process, watched from outside."""

    process: subprocess.Popen[str]
    began: float
    seen: dict[int, float] = field(default_factory=dict)
    """When each step was done."""

    parts: dict[str, float] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    resumed: int = 0
    told: bool = False
    """Whether it has said where it goes on from."""

    ended: float = 0.0
    trains: threading.Event = field(default_factory=threading.Event)
    reader: threading.Thread = field(init=False)

    @classmethod
    def of(cls, workshop: Workshop) -> Attempt:
        paths = [str(workshop.folder), *(path for path in sys.path if path)]
        (workshop.folder / "sitecustomize.py").write_text(EVERY_STEP)
        environment = (
            os.environ | workshop.environment() | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        )
        command = [sys.executable, "-m", "finetune.steps", "train"]
        began = time.perf_counter()
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        attempt = cls(process, began)
        attempt.reader = threading.Thread(target=attempt._read, daemon=True)
        attempt.reader.start()
        return attempt

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            now = time.perf_counter()
            if line.startswith(PROGRESS_PREFIX):
                metrics = {item["name"]: item["value"] for item in json.loads(line[len(PROGRESS_PREFIX) :])["metrics"]}
                step = int(metrics["current"])
                self.resumed, self.told = int(metrics.get("resumed_from", 0)), True
                if step > self.resumed:
                    self.seen.setdefault(step, now)
                    self.trains.set()
                continue
            self.lines.append(line)
            for name, pattern in PARTS.items():
                if found := re.search(pattern, line):
                    self.parts[name] = float(found[1])
                    self.parts.setdefault("python", now - self.began - float(found[1]))
            if found := re.search(FIRST_STEP, line):
                self.parts["first step"] = float(found[1])
                self.parts["start"] = now - self.began
        self.trains.set()

    def end(self) -> int:
        """The exit code, once the process and all that it started are gone: nobody holds its output any more."""
        self.reader.join(timeout=600)
        self.ended = time.perf_counter()
        return self.process.wait(timeout=60)

    def train_beyond(self, step: int) -> None:
        """Until this step is done."""
        while self.newest < step and self.reader.is_alive():
            time.sleep(0.002)

    @property
    def newest(self) -> int:
        """The last step that was seen done."""
        return max(self.seen, default=self.resumed)


@dataclass(frozen=True)
class Kill:
    """One end that came from outside."""

    number: signal.Signals
    when: float
    """By the clock of the attempts."""

    seen: int
    """The last step that any attempt had done."""

    reached: int
    """The last step that this attempt had done, or where it would have gone on from."""

    seconds: float
    """From the signal to the end of the process."""


def undisturbed(workshop: Workshop) -> Attempt:
    attempt = Attempt.of(workshop)
    must_be(attempt, ExitCode.OK)
    return attempt


def must_be(attempt: Attempt, *codes: int) -> None:
    if (code := attempt.end()) not in codes:
        raise SystemExit(f"exit code {code} instead of {codes}\n{''.join(attempt.lines[-40:])}")


def disturbed(workshop: Workshop, kills: int, seed: int, peer: Attempt) -> tuple[list[Attempt], list[Kill]]:
    """The same run with kills at random moments, spread so that steps are left after the last."""
    chance, steps = random.Random(seed), max(peer.seen)
    attempts: list[Attempt] = []
    ends: list[Kill] = []
    done = 0
    while len(ends) < kills:
        attempt = Attempt.of(workshop)
        attempts.append(attempt)
        number = chance.choice((signal.SIGKILL, signal.SIGTERM))
        if chance.random() < WHILE_STARTING:
            attempt.trains.wait(chance.random() * peer.parts["start"])
        else:
            attempt.trains.wait(600)
            share = 2 * (steps - attempt.resumed) / (kills - len(ends) + 3)
            attempt.train_beyond(attempt.resumed + int(min(0.9, chance.random()) * share))
            time.sleep(chance.random() * (peer.seen[steps] - peer.seen[1]) / steps)
        when, seen = time.perf_counter(), max(done, attempt.newest)
        attempt.process.send_signal(number)
        must_be(attempt, -number, ExitCode.PREEMPTED)
        ends.append(Kill(number, when, max(seen, attempt.newest), attempt.newest, time.perf_counter() - when))
        done = max(done, attempt.newest)
    attempts.append(Attempt.of(workshop))
    must_be(attempts[-1], ExitCode.OK)
    return attempts, ends


def costs(attempts: Sequence[Attempt], kills: Sequence[Kill]) -> tuple[dict[signal.Signals, list[int]], list[float]]:
    """For each kill the steps of its attempt that had to be done again, and the seconds until the next step that was
    new. Kills that followed one another without a new step in between are one loss of time, from the first of them on.
    """
    repeated: dict[signal.Signals, list[int]] = {signal.SIGKILL: [], signal.SIGTERM: []}
    back: list[float] = []
    since: float | None = None
    for number, (kill, attempt, following) in enumerate(zip(kills, attempts, attempts[1:], strict=False)):
        since = kill.when if since is None else since
        if attempt.told and (heir := next((each for each in attempts[number + 1 :] if each.told), None)):
            repeated[kill.number].append(max(0, kill.reached - heir.resumed))
        if (new := following.seen.get(kill.seen + 1)) is not None:
            back.append(new - since)
            since = None
    return repeated, back


def new_steps(attempts: Sequence[Attempt]) -> float:
    """Seconds spent on steps that none before had done."""
    done, seconds = 0, 0.0
    for attempt in attempts:
        new = (step for step in attempt.seen if step > done and step - 1 in attempt.seen)
        seconds += sum(attempt.seen[step] - attempt.seen[step - 1] for step in new)
        done = max(done, attempt.newest)
    return seconds


def record(workshop: Workshop) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((workshop.layout.trained / "training.json").read_text())
    return document


def weights(workshop: Workshop) -> bytes:
    return (workshop.layout.trained / "model.safetensors").read_bytes()


def killed(folder: Path, kills: int, steps: int, seed: int) -> Iterator[Row]:
    """The run with kills beside the run without."""
    training = TRAINING | {"maxSteps": steps}
    calm, rough = (ready(folder / name, training) for name in ("calm", "rough"))
    peer = undisturbed(calm)
    attempts, ends = disturbed(rough, kills, seed, peer)
    repeated, back = costs(attempts, ends)
    equal = weights(calm) == weights(rough) and record(calm)["history"] == record(rough)["history"]
    case = f"{steps} steps, {kills} kills"
    yield Row(case, "weights and losses equal bit for bit to the undisturbed run", float(equal), "", "equal", equal)
    yield Row(case, "of them SIGKILL", float(sum(kill.number == signal.SIGKILL for kill in ends)), "")
    again = sum(map(sum, repeated.values()))
    yield Row(case, f"steps done again, a checkpoint every {EVERY}", float(again), "steps")
    most = max(repeated[signal.SIGKILL], default=0)
    yield Row(case, "most after one SIGKILL", float(most), "steps", f"<= {2 * EVERY}", most <= 2 * EVERY)
    most = max(repeated[signal.SIGTERM], default=0)
    yield Row(case, "most after one SIGTERM", float(most), "steps", "0", most == 0)
    stopping = [kill.seconds for kill in ends if kill.number == signal.SIGTERM]
    yield Row(case, "SIGTERM to the end of the process, longest", max(stopping, default=0.0), "s")
    yield Row(case, "kill to the next new step, median", statistics.median(back), "s")
    yield Row(case, "kill to the next new step, longest", max(back), "s")
    useful = new_steps(attempts)
    whole = attempts[-1].ended - attempts[0].began
    lost = (whole - useful) / kills
    yield Row(case, "seconds of new steps", useful, "s")
    yield Row(case, "goodput: new steps in all the time", useful / whole, "share")
    yield Row(case, "lost per kill, all told", lost, "s")
    yield Row(case, "goodput at one kill an hour", 1 - lost / 3600, "share", ">= 0.98", lost / 3600 <= 0.02)
    for name in ("python", *PARTS, "first step", "start"):
        values = [attempt.parts[name] for attempt in (peer, *attempts) if name in attempt.parts]
        label = {"python": "start: python, the plan", "start": "start: in all, to the end of the first step"}
        yield Row("a start, median", label.get(name, f"start: {name}"), statistics.median(values), "s")


def stalled(folder: Path) -> Iterator[Row]:
    """What a checkpoint costs training, on a model of more than 100 MB of weights in f32."""
    training = TRAINING | {"maxSteps": 13, "batchSize": 1, "microBatchSize": 1}
    small = {"everySteps": 3, "keep": 2}
    stops: dict[str, float] = {}
    for case in ("waiting", "beside"):
        workshop = ready(folder / case, training | {"checkpoint": small}, hidden=768, layers=6, vocabulary=512)
        outcome = folder / case / "outcome"
        outcome.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", SYNCHRONOUS, case, str(outcome)],
            env=os.environ
            | workshop.environment()
            | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        found = record(workshop)
        first, *later = map(float, re.findall(STALLED, done.stderr))
        stops[case] = statistics.median(later)
        name = f"checkpoint of {found['checkpoints']['bytes'] / 1e6:,.0f} MB"
        how = {"waiting": "training waits", "beside": "a thread writes a copy"}[case]
        yield Row(name, f"stalls a step, {how}, the first one", first, "ms")
        yield Row(name, f"stalls a step, {how}, the later ones", stops[case], "ms")
        yield Row(name, f"12 steps and 4 checkpoints, {how}", found["seconds"], "s")
        shutil.rmtree(folder / case)
    times = stops["waiting"] / stops["beside"]
    yield Row(name, "stall, times shorter", times, "x", ">= 2", times >= 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="resume-", dir=FOLDER))
    try:
        rows = [*stalled(folder), *killed(folder, arguments.kills, arguments.steps, arguments.seed)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    notes = [
        f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}; kills by seed {arguments.seed}, "
        f"{WHILE_STARTING:.0%} of them before the attempt's first step",
        "the first copy of the state also pays for the memory that the later ones use again",
        "goodput: this run is short, so most of its time is starts; the loss per kill is what carries over",
    ]
    return 0 if write("resume", rows, "Killed and resumed", notes) else 1


if __name__ == "__main__":
    sys.exit(main())
