"""One step as a process: its progress as it comes, everything else in a log file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.api.contract import PROGRESS_PREFIX, Step, StepReport
from finetune.cli.folder import WorkFolder

COMMAND = (sys.executable, "-m", "finetune.steps")
"""What the step's name is appended to."""

REPORT = '{"step":'
"""How the line with the report begins, which steps print last."""


class StepProcess:
    """A running step. It has a session of its own, so that Ctrl-C reaches it through `stop` only."""

    def __init__(self, step: Step, folder: WorkFolder, environment: dict[str, str], *options: str) -> None:
        self.step = step
        self._log = folder.log(step)
        self._report = folder.report(step)
        self._report.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            [*COMMAND, step.value, *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def follow(self, on_progress: Callable[[dict[str, Any]], None]) -> int:
        """Read until the step ends; its exit code (negative: the signal that killed it)."""
        assert self._process.stdout is not None
        with self._log.open("wb") as log:
            for line in self._process.stdout:
                text = line.decode(errors="replace")
                if text.startswith(PROGRESS_PREFIX):
                    on_progress(_status(text.removeprefix(PROGRESS_PREFIX)))
                else:
                    log.write(line)
                    log.flush()
        return self._process.wait()

    def stop(self) -> None:
        """Ask for a checkpoint and an end, as the kubelet does."""
        if self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """End it and whatever it started, now."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def report(self) -> StepReport | None:
        """What the step left behind."""
        try:
            return StepReport.from_json(self._report.read_text())
        except FileNotFoundError:
            return None

    def whole_report(self) -> StepReport | None:
        """What the step printed last: its report with all that a termination log has no room for."""
        printed = [line for line in self._log.read_text(errors="replace").splitlines() if line.startswith(REPORT)]
        return StepReport.from_json(printed[-1]) if printed else None

    def last_words(self, lines: int = 12) -> str:
        """The end of its log."""
        return tail(self._log, lines)


def tail(path: Path, lines: int) -> str:
    """The last lines of a text file, without the report that steps print last."""
    try:
        text = path.read_bytes()[-64_000:].decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join([line for line in text if not line.startswith(REPORT)][-lines:])


def _status(text: str) -> dict[str, Any]:
    """A progress report as one flat mapping: percent, seconds left, and the metrics, numbers where they are numbers."""
    try:
        status = json.loads(text)
    except json.JSONDecodeError:
        return {}
    result = {metric["name"]: _number(metric["value"]) for metric in status.get("metrics", [])}
    result["percent"] = status.get("progressPercentage")
    result["remaining"] = status.get("estimatedRemainingSeconds")
    return result


def _number(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value
