"""`finetune-step train`: starts the training processes, passes on a request to stop, and says how it ended.

This process never imports torch: it is there within a fraction of a second, takes the signal that a pod gets, and turns
whatever becomes of the workers into the right exit code.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from finetune.api.contract import (
    CLAIMS,
    DEVICES,
    JOB_FILE,
    NODES,
    WORKSPACE,
    ExitCode,
    Layout,
    Step,
    StepJob,
    StepReport,
)
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.runtime.stop import PREEMPTED
from finetune.steps.train.checkpoints.checkpoint import Checkpoint, Checkpoints
from finetune.steps.train.checkpoints.environment import pinned
from finetune.steps.train.distributed.outcome import Outcome, read_outcomes
from finetune.steps.train.distributed.peers import Place, met
from finetune.steps.train.plan import Plan
from finetune.steps.train.pulse import PULSE, Watchman
from finetune.steps.train.reporting.attempts import Attempts
from finetune.steps.train.stop import die_with_parent
from finetune.steps.workspace.staging import published

WORKER = "finetune.steps.train.worker"

log = logging.getLogger(__name__)


def run(job: StepJob, layout: Layout) -> StepReport:
    """Train into `trained/`, from the newest complete checkpoint if there is one."""
    plan = Plan.of(job, layout)
    if (done := published(layout.trained, plan.inputs)) is not None:
        return StepReport(step=Step.TRAIN, result={**done, "reused": True})
    checkpoints = Checkpoints(layout.checkpoints, job.spec.training.checkpoint.keep, plan.inputs, plan.parts)
    attempts = Attempts(layout.checkpoints, plan.inputs)
    place = Place.of()
    newest = _newest(checkpoints, layout) if place.rank == 0 else None
    agree = {"checkpoint": newest.step if newest else 0, "dataset": plan.inputs["data"]}
    with met(place, f"{job.uid}/{job.attempt}", agree) as (peers, agreed):
        if place.rank == 0:
            attempts.begin(newest)
        else:
            newest = _as_agreed(checkpoints.latest(), agreed, plan)
        resumed = newest.step if newest else 0
        folder = layout.checkpoints / (f".run-{place.rank}" if place.nodes > 1 else ".run")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "job.json").write_text(job.model_dump_json(by_alias=True, exclude_none=True))
        environment = _environment(layout, folder, plan, newest)
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as pulse,
            _workers(plan, place, folder, environment | {PULSE: pulse}) as workers,
        ):
            peers.watch(workers.abandon)
            returned = workers.wait(plan.training.progress_deadline_seconds, Path(pulse))
        outcome = _outcome(returned, workers, read_outcomes(folder), checkpoints, plan)
        outcome = peers.why(outcome)
        peers.farewell(outcome)
    shutil.rmtree(folder, ignore_errors=True)
    if place.rank == 0:
        attempts.end(*(("Succeeded",) if outcome.error is None else (outcome.error.reason, outcome.error.message)))
    if outcome.error is None and outcome.code == ExitCode.OK:
        result = published(layout.trained, plan.inputs) if place.rank == 0 else None
        return StepReport(step=Step.TRAIN, result=result, resumed_from_step=resumed)
    assert outcome.error is not None
    raise StepFailure(
        outcome.code,
        outcome.error.reason,
        outcome.error.message,
        outcome.error.hint,
        result=outcome.result,
        resumed_from_step=resumed,
    )


def _newest(checkpoints: Checkpoints, layout: Layout) -> Checkpoint | None:
    """The checkpoint to go on from; removes what no run will go on from."""
    if published(layout.trained) is not None:
        checkpoints.forget_other_runs()
    return checkpoints.newest()


def _as_agreed(found: Checkpoint | None, agreed: dict[str, Any], plan: Plan) -> Checkpoint | None:
    """What this pod finds in the workspace, if it is what the first pod found."""
    step = found.step if found else 0
    if (step, plan.inputs["data"]) != (agreed["checkpoint"], agreed["dataset"]):
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "WorkspaceNotShared",
            f"the training pods see different files in the workspace: the first one the checkpoint of step "
            f"{agreed['checkpoint']}, this one that of step {step}",
            "spec.workspace needs a volume that all nodes share (ReadWriteMany, for example NFS or CephFS).",
        )
    return found


class _Workers:
    """The running training processes, as one."""

    def __init__(self, process: subprocess.Popen[bytes], several: bool) -> None:
        self.stopped = False
        self.hung = False
        self._process = process
        self._several = several

    def wait(self, patience: int | None, pulse: Path) -> int:
        """Their common exit code; negative for a signal. With patience for so many seconds they are ended when none of
        them has got on for longer."""
        if patience is None:
            return self._process.wait()
        watchman = Watchman(pulse, patience, self._ranks, self.abandon)
        try:
            return self._process.wait()
        finally:
            watchman.dismiss()
            self.hung = watchman.found_hanging

    def abandon(self) -> None:
        """End them at once: another pod is gone, and nothing that they still do will come to an end."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """A signal handler that passes the request on. torchrun itself would grant its workers 30 seconds only, so it
        is asked only before it has any."""
        self.stopped = True
        for process in self._ranks() or [self._process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)

    def _ranks(self) -> list[int]:
        """The training processes; none yet while torchrun starts them."""
        return _children(self._process.pid) if self._several else [self._process.pid]


@contextlib.contextmanager
def _workers(plan: Plan, place: Place, folder: Path, environment: dict[str, str]) -> Iterator[_Workers]:
    """Start one worker, or one for each device under torchrun, and pass on signals while they run."""
    command = [sys.executable, "-m"]
    if plan.devices > 1:
        command += ["torch.distributed.run", *_rendezvous(place), f"--nproc-per-node={plan.devices_here}", "-m"]
    # A request to stop that comes between the fork and the handlers must not be lost either.
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.pthread_sigmask(signal.SIG_BLOCK, former)
    try:
        process = subprocess.Popen(
            [*command, WORKER, str(folder)],
            env=environment,
            start_new_session=True,
            preexec_fn=_in_the_child,
        )
        workers = _Workers(process, plan.devices > 1)
        for number in former:
            signal.signal(number, workers.stop)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, former)
    try:
        yield workers
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for number, handler in former.items():
            signal.signal(number, handler)


def _rendezvous(place: Place) -> list[str]:
    """torchrun's arguments for finding the other pods. They are known by name and index, so nothing is negotiated."""
    if place.nodes == 1:
        return ["--standalone"]
    where = [f"--master-addr={place.host}", f"--master-port={place.port + 1}"]
    return [f"--nnodes={place.nodes}", f"--node-rank={place.rank}", *where]


def _in_the_child() -> None:
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))


def _environment(layout: Layout, folder: Path, plan: Plan, newest: Checkpoint | None) -> dict[str, str]:
    recorded: dict[str, Any] = newest.facts.get("pinned", {}) if newest else {}
    settings = {
        JOB_FILE: str(folder / "job.json"),
        WORKSPACE: str(layout.workspace),
        CLAIMS: str(layout.claims),
        DEVICES: str(plan.devices_here),
        NODES: str(plan.nodes),
        "HF_HUB_OFFLINE": "1",
        "DISABLE_KUBEFLOW_INTEGRATION": "TRUE",  # our callback reports; the stock one would report besides
        "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**os.environ, **settings, **pinned(os.environ, recorded, plan.devices_here)}


def _children(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def _outcome(
    returned: int, workers: _Workers, outcomes: list[Outcome], checkpoints: Checkpoints, plan: Plan
) -> Outcome:
    """How the run ended, from what the workers left and how they went."""
    stopped, expected = workers.stopped, plan.devices_here
    if workers.hung:
        return Outcome.of(_hung(plan, checkpoints.latest()))
    if outcomes and outcomes[0].code not in (ExitCode.OK, ExitCode.PREEMPTED):
        return outcomes[0]
    if returned == 0 and len(outcomes) == expected and all(outcome.code == ExitCode.OK for outcome in outcomes):
        return outcomes[0]
    preempted = [outcome for outcome in outcomes if outcome.code == ExitCode.PREEMPTED]
    if preempted and (stopped or returned in (0, PREEMPTED)):
        return preempted[0]
    if stopped or returned == PREEMPTED:
        return Outcome.of(_preempted(checkpoints.latest()))
    if returned == -signal.SIGKILL:
        return Outcome.of(
            StepFailure(
                ExitCode.UNAVAILABLE,
                "OutOfMemory",
                "the training process was killed (SIGKILL), most likely for want of memory",
                "Raise memory in spec.training.resources.limits, or lower microBatchSize or spec.dataset.maxLength.",
            )
        )
    how = f"by signal {signal.Signals(-returned).name}" if returned < 0 else f"with exit code {returned}"
    return Outcome.of(
        StepFailure(ExitCode.UNAVAILABLE, "Crashed", f"the training process ended {how}", "The pod's log says more.")
    )


def _hung(plan: Plan, newest: Checkpoint | None) -> StepFailure:
    where = f"; the checkpoint after step {newest.step} is safe" if newest else ""
    seconds = plan.training.progress_deadline_seconds
    return StepFailure(
        ExitCode.UNAVAILABLE,
        "Hung",
        f"no step was done for {seconds} s, spec.training.progressDeadlineSeconds{where}",
        "The pod's log has the stacks of all threads. Raise the deadline if loading, a step or an evaluation is slow.",
        result={"checkpoint": newest.status()} if newest else None,
    )


def _preempted(newest: Checkpoint | None) -> StepFailure:
    where = f"the checkpoint after step {newest.step} is the newest" if newest else "there is no checkpoint yet"
    return StepFailure(
        ExitCode.PREEMPTED,
        "Preempted",
        f"stopped on request before training went on; {where}",
        "The operator goes on from there.",
        result={"checkpoint": newest.status()} if newest else None,
    )
