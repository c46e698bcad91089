"""The report in a container's termination message, as far as the kubelet left it whole.

Of the file it keeps the last 4 KiB; of 12 KiB that all containers of a pod share it then keeps each one's beginning. A
step of ours stays below both. A foreign trainer may not know, and what it reported must not vanish without a word.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from finetune.api.contract import Step, StepReport

_OF_CONTAINER, _OF_POD = 4096, 12 * 1024
_ROUGHLY = 4
"""A character that was cut through may have changed its length."""


def read(message: str, step: Step, code: int, containers: int) -> tuple[StepReport | None, str]:
    """The step's report, in parts where it was cut, and what has to be said about it; (None, "") without one."""
    report = StepReport.from_json(message)
    if report is not None:
        return (report if report.step == step else None), ""
    limit = min(_OF_CONTAINER, _OF_POD // max(1, containers))
    looks_like_one = code == 0 or message.startswith("{") or message.rstrip().endswith("}")
    if len(message.encode()) < limit - _ROUGHLY or not looks_like_one:
        return None, ""
    left = _left(message, step)
    said = "nothing of it" if left is None else "only its whole parts"
    note = f"the report was cut by the kubelet, and {said} could be read: keep it below {limit} bytes"
    return (left if left is None or left.step == step else None), note


def _left(message: str, step: Step) -> StepReport | None:
    """What is whole in a report that lost its end, or else its beginning."""
    parts = _without_end(message) if message.startswith("{") else _without_beginning(message)
    try:
        return StepReport.model_validate({"step": step} | parts) if parts else None
    except ValidationError:
        return None


def _without_end(message: str) -> dict[str, Any]:
    """All values but those that the cut went through. It may have gone through a number and left another one, so what
    comes after the last comma is left out."""
    try:
        found = from_json(message[: message.rfind(",") + 1], allow_partial=True)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _without_beginning(message: str) -> dict[str, Any]:
    """The report's own fields that follow the cut: the longest end that, with a brace before it, is an object."""
    start = message.find(",")
    while start >= 0:
        try:
            found = from_json("{" + message[start + 1 :])
        except ValueError:
            start = message.find(",", start + 1)
        else:
            return found if isinstance(found, dict) else {}
    return {}
