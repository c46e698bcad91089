"""A request to stop, from the first moment of a process on.

Standard library only: the handler has to stand before the slow imports, and a pod's first process ignores SIGTERM
until there is one.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType

from finetune.steps.runtime.stop import PREEMPTED

_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Whether somebody asked this process to stop. Until `defer` there is nothing to lose, and it stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def defer(self) -> None:
        """From now on a request is noted only; whoever works looks at `requested` where work can be made safe."""
        self._deferred = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self._deferred:
            os._exit(PREEMPTED)


def die_with_parent() -> None:
    """Have the kernel end this process when its parent dies, so that a killed step leaves nobody writing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
