"""The command `finetune-step STEP`, which every step container runs.

Reads the job, runs the step, leaves a report in the termination log and ends with the exit code that says whether
trying again can help.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import traceback
from collections.abc import Callable

from pydantic import ValidationError

from finetune.api.contract import ExitCode, Layout, Step, StepError, StepJob, StepReport
from finetune.steps.runtime import stop
from finetune.steps.runtime.failure import StepFailure, failure_of

MODULES = {
    Step.DOWNLOAD: ("finetune.steps.download.step", "fetch the base model into the workspace"),
    Step.ADD_TOKENS: ("finetune.steps.tokens.step", "add the job's tokens to tokenizer and embedding matrices"),
    Step.RELOAD: ("finetune.steps.reload.step", "prove that the extended model loads and works"),
    Step.LOAD_DATASET: ("finetune.steps.dataset.step", "turn the dataset into token ids and labels"),
    Step.TRAIN: ("finetune.steps.train.step", "train, from the newest complete checkpoint if there is one"),
    Step.SAVE: ("finetune.steps.save.step", "publish the trained model"),
}
"""Each step's module has `run(job: StepJob, layout: Layout) -> StepReport`. Imported when needed: torch is slow."""

DRY_RUNS = {Step.ADD_TOKENS: "finetune.steps.tokens.preview"}
"""What a step would do, where it can say so without doing it."""


def main(arguments: list[str] | None = None) -> int:
    """Run one step and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="finetune-step",
        description="Runs one step of a FineTuneJob. The job is read from $FINETUNE_JOB (/etc/finetune/job.json), "
        "the step works in $FINETUNE_WORKSPACE (/workspace).",
        epilog="Exit codes: 0 done; 64, 65, 66, 70, 78 somebody has to change something; 69, 74 worth trying again; "
        "75 stopped on request after a checkpoint.",
    )
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    for step, (_, purpose) in MODULES.items():
        command = steps.add_parser(step.value, help=purpose, description=purpose)
        command.set_defaults(dry_run=False)
        if step in DRY_RUNS:
            command.add_argument("--dry-run", action="store_true", help="print what would be done, and write nothing")
    parsed = parser.parse_args(arguments)
    step = Step(parsed.step)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    layout = Layout.from_environment()
    stop.report_with(lambda: _leave(_stopped(step), layout))
    report, code = _outcome(step, DRY_RUNS[step] if parsed.dry_run else MODULES[step][0], layout)
    _leave(report, layout)
    print(report.model_dump_json(by_alias=True, exclude_none=True), flush=True)
    return code


def _leave(report: StepReport, layout: Layout) -> None:
    try:
        layout.report_file.write_text(report.to_json())
    except OSError as error:
        logging.getLogger("finetune").warning("the report could not be written to %s: %s", layout.report_file, error)


def _stopped(step: Step) -> StepReport:
    """Whatever a step has not published yet it does again, or goes on with, in the next attempt."""
    error = StepError(reason="Preempted", message=f"{step} was stopped on request", hint="The next attempt goes on.")
    return StepReport(step=step, error=error)


def _outcome(step: Step, module: str, layout: Layout) -> tuple[StepReport, ExitCode]:
    try:
        job = _read_job(layout)
        run: Callable[[StepJob, Layout], StepReport] = importlib.import_module(module).run
        return run(job, layout), ExitCode.OK
    except Exception as error:
        failure = failure_of(error)
        if not isinstance(error, StepFailure):
            traceback.print_exc()
        logging.getLogger("finetune").error("%s %s", failure.error.message, failure.error.hint)
        report = StepReport(
            step=step, error=failure.error, result=failure.result, resumed_from_step=failure.resumed_from_step
        )
        return report, failure.code


def _read_job(layout: Layout) -> StepJob:
    try:
        return StepJob.model_validate_json(layout.job_file.read_bytes())
    except FileNotFoundError as error:
        raise StepFailure(
            ExitCode.USAGE, "NoJob", f"{layout.job_file} does not exist", "Set FINETUNE_JOB to the job's file."
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION, "InvalidJob", f"{field}: {first['msg']}", "Mend the spec."
        ) from error
