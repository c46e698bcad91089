"""The attempts of a run as the workspace remembers them, for the report: status keeps the newest ten only, and a local
run has no status."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.steps.train.checkpoints.checkpoint import Checkpoint
from finetune.steps.workspace.staging import digest, flush

FILE = "attempts.json"
KEPT = 200
"""Attempts that are remembered, newest last."""

LOST = {"reason": "Killed", "message": "ended without a word: killed, out of memory, or its node is gone"}


@dataclass(frozen=True)
class Attempts:
    """The attempts of one run, in the folder of its checkpoints."""

    folder: Path
    inputs: dict[str, Any]
    """What the run depends on: another run's attempts are not this one's."""

    def begin(self, newest: Checkpoint | None) -> None:
        """Note that an attempt starts from `newest`. One that never said how it ended was killed."""
        former = [entry if "end" in entry else entry | {"end": None} | LOST for entry in self.entries()]
        entry = {
            "start": _now(),
            "resumedFromStep": newest.step if newest else 0,
            "passedOver": list(newest.passed_over) if newest else [],
        }
        self._write([*former, entry])

    def end(self, reason: str, message: str = "") -> None:
        """Note how it ended."""
        *former, last = self.entries()
        self._write([*former, last | {"end": _now(), "reason": reason, "message": message}])

    def entries(self) -> list[dict[str, Any]]:
        """All that is remembered of this run, oldest first; the last may still be running and has no `end` then."""
        try:
            content = json.loads((self.folder / FILE).read_text())
        except (OSError, ValueError):
            return []
        return list(content["attempts"]) if content.get("run") == digest(self.inputs) else []

    def ended(self) -> list[dict[str, Any]]:
        """The same, the last one as ended by now: what a record says that it writes as its last deed."""
        entries = self.entries()
        return [*entries[:-1], *({"end": _now()} | last for last in entries[-1:])]

    def warnings(self) -> list[str]:
        """Damaged checkpoints that attempts had to leave for an older one."""
        return [
            f"{what}: attempt {number} went back to step {entry['resumedFromStep']}"
            for number, entry in enumerate(self.entries(), 1)
            for what in entry["passedOver"]
        ]

    def _write(self, entries: list[dict[str, Any]]) -> None:
        partial = self.folder / f"{FILE}.partial"
        self.folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"run": digest(self.inputs), "attempts": entries[-KEPT:]}, indent=1))
        flush(partial)
        partial.rename(self.folder / FILE)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
