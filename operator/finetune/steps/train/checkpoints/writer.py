"""Work beside the training path: one piece at a time, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Writer:
    """Runs what it is given in a thread. What goes wrong there is raised where somebody looks or waits, once."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Begin with `work`, once the former work is done."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint")
        self._thread.start()

    def look(self) -> None:
        """Raise what went wrong so far. Does not wait."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Until nothing is under way. Raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.look()

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error
