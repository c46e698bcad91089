"""One training process: `python -m finetune.steps.train.worker FOLDER`, started by `finetune-step train`.

The order of things matters here: first the signal handler, then progress (so that a resumed run says at once where it
goes on), and only then the slow imports.
"""

import time

from finetune.steps.train.stop import StopRequest, die_with_parent

STARTED = time.monotonic()
STOP = StopRequest()
die_with_parent()

import gc  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from finetune.api.contract import ExitCode, Layout, Step, StepJob  # noqa: E402
from finetune.steps.runtime.failure import StepFailure, failure_of  # noqa: E402
from finetune.steps.runtime.progress import Progress  # noqa: E402
from finetune.steps.train.checkpoints.checkpoint import Checkpoint, Checkpoints  # noqa: E402
from finetune.steps.train.distributed.outcome import Outcome  # noqa: E402
from finetune.steps.train.plan import Plan  # noqa: E402
from finetune.steps.train.pulse import show_stacks_when_asked  # noqa: E402

UNUSED = ("datasets", "sklearn", "tensorboard", "pandas")
"""Packages that transformers imports when they are there. This training uses none; each would lengthen every start."""


def main() -> int:
    """Train, leave the outcome in the folder, and return the exit code."""
    folder = Path(sys.argv[1])
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    show_stacks_when_asked()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        outcome = Outcome(ExitCode.OK, _train(rank))
    except Exception as error:
        if not isinstance(error, StepFailure):
            traceback.print_exc()
        outcome = Outcome.of(_failure_of(error))
    outcome.write(folder, rank)
    # Under torchrun the first non-zero exit has the other ranks killed, and they may still be writing the checkpoint.
    return 0 if world > 1 and outcome.code == ExitCode.PREEMPTED else int(outcome.code)


def _train(rank: int) -> dict[str, Any] | None:
    layout = Layout.from_environment()
    job = StepJob.model_validate_json(layout.job_file.read_bytes())
    plan = Plan.of(job, layout)
    checkpoints = Checkpoints(layout.checkpoints, job.spec.training.checkpoint.keep, plan.inputs, plan.parts)
    checkpoint = checkpoints.latest()
    progress = Progress(Step.TRAIN, "step") if rank == 0 else None
    if progress:
        resumed = checkpoint.step if checkpoint else 0
        progress.update(resumed, plan.steps, resumed_from=resumed or None, checkpoint_step=resumed or None)
    try:
        return _run(plan, layout, checkpoints, checkpoint, progress)
    finally:
        if progress:
            progress.close()


def _run(
    plan: Plan, layout: Layout, checkpoints: Checkpoints, checkpoint: Checkpoint | None, progress: Progress | None
) -> dict[str, Any] | None:
    for package in (*UNUSED, *(() if plan.adapts else ("peft",))):
        sys.modules[package] = None  # type: ignore[assignment]  # what Python takes as "not installed"
    gc.disable()  # thousands of modules, and nothing of them is garbage: looking costs a fifth of the imports
    from finetune.steps.train.loop import Loop

    gc.enable()
    gc.freeze()
    logging.getLogger(__name__).info("imports took %.1f s", time.monotonic() - STARTED)
    return Loop(plan, layout, checkpoints, checkpoint, STOP, progress).run()


def _failure_of(error: Exception) -> StepFailure:
    if type(error).__name__ == "OutOfMemoryError":
        return StepFailure(
            ExitCode.UNAVAILABLE,
            "OutOfMemory",
            str(error).splitlines()[0],
            "Lower spec.training.microBatchSize or spec.dataset.maxLength, or enable gradientCheckpointing.",
        )
    return failure_of(error)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is on disk; libraries that are torn down would have the last, puzzling words in the pod's log
