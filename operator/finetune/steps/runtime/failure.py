"""How a step says what went wrong: one exception that carries exit code, reason, message and remedy."""

from __future__ import annotations

import errno
from typing import Any

from finetune.api.contract import ExitCode, StepError

_MISTAKES = (TypeError, AttributeError, NameError, ImportError, NotImplementedError)
"""What Python raises where code does not fit code: the same input meets it again."""


class StepFailure(Exception):
    """A step cannot do its work.

    `message` names the field and the value, `hint` the remedy; both reach the user through the job's status.
    The exit code decides whether the operator tries again (`contract.NEVER_RETRIED`). `result` is what the step has to
    report all the same: a preempted training names its checkpoint.
    """

    def __init__(
        self,
        code: ExitCode,
        reason: str,
        message: str,
        hint: str = "",
        *,
        result: dict[str, Any] | None = None,
        resumed_from_step: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.error = StepError(reason=reason, message=message, hint=hint)
        self.result = result
        self.resumed_from_step = resumed_from_step


def failure_of(error: Exception) -> StepFailure:
    """The failure that an exception amounts to: what the system says is kept in its own words."""
    if isinstance(error, StepFailure):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "DiskFull",
            f"No space left: {error}",
            "Enlarge spec.workspace.size (or the claim), delete and apply the job anew.",
        )
    if isinstance(error, OSError):
        return StepFailure(ExitCode.IO_ERROR, "IOError", str(error), "The operator tries again.")
    if isinstance(error, MemoryError):
        return StepFailure(
            ExitCode.UNAVAILABLE, "OutOfMemory", f"Out of memory: {error}", "Raise the memory in resources.limits."
        )
    if isinstance(error, _MISTAKES):
        return StepFailure(
            ExitCode.SOFTWARE,
            "InternalError",
            f"{type(error).__name__}: {error}",
            "Trying again would end the same way: this is a mistake in the code, ours or a library's. The pod's log "
            "holds the traceback.",
        )
    return StepFailure(
        ExitCode.UNAVAILABLE, "Crashed", f"{type(error).__name__}: {error}", "The pod's log holds the traceback."
    )
