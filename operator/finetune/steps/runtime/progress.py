"""Live progress to whoever watches: the operator over HTTPS, or the local runner over standard output.

The wire format is the one of stock transformers' KubeflowCallback. Losing a report never fails a step.
"""

from __future__ import annotations

import json
import logging
import os
import ssl
import sys
import threading
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.api.contract import PROGRESS_CA, PROGRESS_PREFIX, PROGRESS_TOKEN, PROGRESS_URL, Step

INTERVAL = 2.0
"""Seconds between reports."""

log = logging.getLogger(__name__)


class Progress:
    """Reports of one step. `update` is cheap and may be called often; a thread sends the newest state now and then."""

    def __init__(self, step: Step, unit: str | None = None) -> None:
        self.step = step
        self._state: dict[str, Any] = {"step": step.value, "unit": unit}
        self._started = time.monotonic()
        self._changed = threading.Event()
        self._closed = threading.Event()
        self._sender = threading.Thread(target=self._send_changes, name="progress", daemon=True)
        self._sender.start()

    def update(self, current: int, total: int | None = None, **metrics: float | str | None) -> None:
        """Say that `current` of `total` units are done, with further metrics (loss, learning_rate, ...). When another
        unit is counted from now on, the time that is left is reckoned anew."""
        state = {**self._state, **{key: value for key, value in metrics.items() if value is not None}}
        if state["unit"] != self._state["unit"]:
            self._started = time.monotonic()
        state["current"] = current
        if total is not None:
            state["total"] = total
        self._state = state
        self._changed.set()

    def close(self) -> None:
        """Send what was not sent yet and stop."""
        self._closed.set()
        self._changed.set()
        self._sender.join(timeout=6)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send_changes(self) -> None:
        while not self._closed.is_set():
            self._changed.wait()
            self._changed.clear()
            self._send(self._state)
            self._closed.wait(INTERVAL)
        if self._changed.is_set():
            self._send(self._state)

    def _send(self, state: dict[str, Any]) -> None:
        if "current" not in state:
            return
        status = _trainer_status(state, time.monotonic() - self._started)
        sys.stdout.write(f"{PROGRESS_PREFIX}{json.dumps(status)}\n")  # at once: print writes the end of the line later
        sys.stdout.flush()
        url = os.environ.get(PROGRESS_URL)
        if url is None:
            return
        try:
            token = Path(os.environ[PROGRESS_TOKEN]).read_text().strip()
            request = urllib.request.Request(  # noqa: S310 - the operator's own address
                url,
                data=json.dumps({"trainerStatus": status}).encode(),
                headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
            )
            context = ssl.create_default_context(cafile=os.environ.get(PROGRESS_CA))
            with urllib.request.urlopen(request, timeout=5, context=context):  # noqa: S310
                pass
        except Exception as error:
            log.debug("progress was not delivered: %s", error)


def _trainer_status(state: dict[str, Any], elapsed: float) -> dict[str, Any]:
    current, total = state["current"], state.get("total")
    status: dict[str, Any] = {
        "lastUpdatedTime": datetime.now(UTC).isoformat(),
        "metrics": [{"name": key, "value": str(value)} for key, value in state.items() if value is not None],
    }
    if total:
        status["progressPercentage"] = min(100, current * 100 // total)
        done = current - state.get("resumed_from", 0)
        if done > 0 and elapsed > 0:
            status["estimatedRemainingSeconds"] = int(elapsed / done * max(0, total - current))
    return status
