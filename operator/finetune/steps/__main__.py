"""The entry point of `finetune-step` and `python -m finetune.steps`: a handler for SIGTERM, and only then any import.

The first process of a container ignores the signal until there is a handler; without one, a pod that is asked to go
while Python still starts would run on until it is killed.
"""

from __future__ import annotations

import sys

from finetune.steps.runtime import stop


def main(arguments: list[str] | None = None) -> int:
    """Run one step and return its exit code."""
    with stop.at_once():
        from finetune.steps.command import main as run

        return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
