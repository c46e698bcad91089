"""The flow on this machine: each step a process, by the contract that the pods keep."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.api.contract import ExitCode, Step, StepError, StepReport
from finetune.api.spec import FineTuneJobSpec
from finetune.cli.folder import WorkFolder
from finetune.cli.picture import Line, Picture, State, duration, size
from finetune.cli.process import StepProcess
from finetune.cli.results import summary


@dataclass
class Outcome:
    """How the flow ended."""

    code: int = int(ExitCode.OK)
    reports: dict[Step, StepReport] = field(default_factory=dict)
    failed: Step | None = None
    error: StepError | None = None
    last_words: str = ""
    stopped: bool = False


def steps_of(spec: FineTuneJobSpec) -> list[Step]:
    """The steps that the job needs, in order."""
    return [step for step in Step if step != Step.ADD_TOKENS or spec.tokens]


class Runner:
    """Runs the steps one after the other and keeps the picture true."""

    def __init__(
        self, folder: WorkFolder, environment: Callable[[Step], dict[str, str]], picture: Picture,
        on_change: Callable[[Line], None],
    ) -> None:  # fmt: skip
        self._folder = folder
        self._environment = environment
        self._picture = picture
        self._on_change = on_change
        self._process: StepProcess | None = None
        self._stops = 0

    def run(self) -> Outcome:
        """All steps until one fails or somebody asks to stop."""
        outcome = Outcome()
        with self._stoppable():
            for line in self._picture.lines:
                if line.state == State.SKIPPED:
                    continue
                if self._stops:
                    outcome.code, outcome.stopped = int(ExitCode.PREEMPTED), True
                    break
                if not self._step(line, outcome):
                    break
        return outcome

    def _step(self, line: Line, outcome: Outcome) -> bool:
        started = time.monotonic()
        line.state = State.RUNNING
        self._on_change(line)
        self._process = StepProcess(line.step, self._folder, self._environment(line.step))
        if self._stops:
            self._process.stop()
        code = self._process.follow(lambda status: self._progress(line, status))
        report = self._process.report()
        line.seconds, line.percent = time.monotonic() - started, None
        if report:
            outcome.reports[line.step] = report
        if code == ExitCode.OK:
            line.state = State.DONE
            line.summary = summary(line.step, report.result or {} if report else {})
            if report and report.resumed_from_step:
                line.summary += f", resumed from step {report.resumed_from_step}"
        else:
            stopped = self._stops > 0 or code == ExitCode.PREEMPTED
            line.state = State.STOPPED if stopped else State.FAILED
            outcome.code = int(ExitCode.PREEMPTED) if stopped else code if code > 0 else 128 - code
            outcome.failed, outcome.stopped = line.step, stopped
            outcome.error = (report.error if report else None) or unreported(code)
            outcome.last_words = self._process.last_words()
            line.summary = _stopped(report) if stopped else outcome.error.reason
        self._process = None
        self._on_change(line)
        return code == ExitCode.OK

    def _progress(self, line: Line, status: Mapping[str, Any]) -> None:
        line.percent = status.get("percent")
        line.summary = progress_words(status)
        self._picture.see_loss(status.get("loss"))

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM ask the step for a checkpoint; asked again, they kill it."""

        def stop(*_: object) -> None:
            self._stops += 1
            if self._stops == 1:
                self._picture.message = "stopping after a checkpoint; Ctrl-C again ends it at once"
            if self._process:
                (self._process.stop if self._stops == 1 else self._process.kill)()

        former = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


def progress_words(status: Mapping[str, Any]) -> str:
    """120/562 steps, 1 min 5 s left; bytes as sizes."""
    current, total, unit = status.get("current"), status.get("total"), status.get("unit")
    words = []
    if isinstance(current, float) and unit == "byte":
        words.append(f"{size(current)} of {size(total)}" if isinstance(total, float) else size(current))
    elif isinstance(current, float):
        counted = f"{current:,.0f}/{total:,.0f}" if isinstance(total, float) else f"{current:,.0f}"
        words.append(f"{counted} {unit}s" if unit else counted)
    if (rate := status.get("tokens_per_second")) is not None:
        words.append(f"{rate:,.0f} tokens/s")
    if status.get("remaining"):
        words.append(f"{duration(status['remaining'])} left")
    return ", ".join(words)


def _stopped(report: StepReport | None) -> str:
    checkpoint = ((report.result if report else None) or {}).get("checkpoint") or {}
    return f"stopped, checkpoint after step {checkpoint['step']}" if "step" in checkpoint else "stopped"


def unreported(code: int) -> StepError:
    if code == -signal.SIGKILL:
        return StepError(
            reason="Killed",
            message="The step was killed by signal 9, most likely because memory ran out.",
            hint="Lower training.microBatchSize or dataset.maxLength, or enable training.gradientCheckpointing.",
        )
    how = f"ended with exit code {code}" if code >= 0 else f"was ended by signal {-code}"
    return StepError(reason="Crashed", message=f"The step {how} and left no report.", hint="Its log says more.")


def output_place(spec: FineTuneJobSpec, folder: WorkFolder, claims: Path) -> str:
    """Where the result lies on this machine, or the store it went to."""
    if spec.output is None:
        return str(folder.workspace / "output")
    if spec.output.uri.startswith("pvc://"):
        return str(claims / spec.output.uri.removeprefix("pvc://"))
    return spec.output.uri
