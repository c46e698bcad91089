"""How a training process tells its parent how it ended.

torchrun turns every exit code of a worker into 1, and a signal has no message; so each rank leaves a file, and the
parent decides from the files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.api.contract import NEVER_RETRIED, ExitCode, StepError
from finetune.steps.runtime.failure import StepFailure


@dataclass(frozen=True)
class Outcome:
    """The end of one rank: a result, or a failure with an exit code."""

    code: ExitCode
    result: dict[str, Any] | None = None
    error: StepError | None = None

    @classmethod
    def of(cls, failure: StepFailure) -> Outcome:
        """The outcome that a failure is."""
        return cls(failure.code, failure.result, failure.error)

    def write(self, folder: Path, rank: int) -> None:
        """Leave it in the folder, whole or not at all."""
        content = {"code": self.code, "result": self.result, "error": self.error and self.error.model_dump()}
        partial = folder / f"outcome-{rank}.partial"
        partial.write_text(json.dumps(content))
        partial.rename(folder / f"outcome-{rank}.json")


def read_outcomes(folder: Path) -> list[Outcome]:
    """What the ranks left, those that failed first, in rank order."""
    outcomes = []
    for path in sorted(folder.glob("outcome-*.json"), key=lambda path: int(path.stem.removeprefix("outcome-"))):
        content = json.loads(path.read_text())
        error = StepError.model_validate(content["error"]) if content["error"] else None
        outcomes.append(Outcome(ExitCode(content["code"]), content["result"], error))
    return sorted(outcomes, key=_weight)


def _weight(outcome: Outcome) -> int:
    """A rank that knows what is wrong comes before those that fell with it, and both before those that did not fail."""
    if outcome.code in (ExitCode.OK, ExitCode.PREEMPTED):
        return 2
    return 0 if outcome.code in NEVER_RETRIED else 1
