"""transformers' Trainer, with checkpoints that are complete or absent, an evaluation that disturbs nothing, and an end
at the first loss that is not a number.

What is overridden is what Trainer does to the outside world; the arithmetic of a step is its own.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import Trainer, set_seed

from finetune.api.contract import ExitCode
from finetune.steps.runtime.disk import in_words
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.runtime.memory import available_memory
from finetune.steps.train.checkpoints.checkpoint import Checkpoints
from finetune.steps.train.checkpoints.snapshot import Snapshot, size_of
from finetune.steps.train.checkpoints.writer import Writer
from finetune.steps.train.data.culprits import Culprits, alone
from finetune.steps.train.data.examples import tokens_in
from finetune.steps.train.distributed.sharing import Copies
from finetune.steps.train.methods.average import WeightAverage
from finetune.steps.train.phase import Phase
from finetune.steps.train.stop import StopRequest
from finetune.steps.workspace.training_data import IGNORED

SPARE_MEMORY = 256 << 20
"""Bytes of memory that stay free beside a copy of the state."""

log = logging.getLogger(__name__)


class Piece(Protocol):
    """What a checkpoint carries besides what every Trainer has."""

    def state(self) -> dict[str, torch.Tensor]:
        """What training changes of it, as it lies in memory."""

    def write(self, state: dict[str, torch.Tensor], folder: Path) -> None:
        """Write it, with that state or a copy of it, as a file of its own."""


class ResumableTrainer(Trainer):
    """A Trainer that can be killed at any moment and asked to stop between any two steps. It trains one phase."""

    MEASURES: tuple[str, ...] = ("loss",)
    """What an evaluation measures."""

    model: Any
    optimizer: Any
    lr_scheduler: Any
    train_dataset: Any
    eval_dataset: Any
    data_collator: Any

    def __init__(
        self,
        *,
        phase: Phase,
        total: int,
        checkpoints: Checkpoints,
        sharing: Copies,
        stop: StopRequest,
        facts: dict[str, Any],
        run: dict[str, Any],
        base: Path,
        culprits: Culprits,
        average: WeightAverage | None = None,
        pieces: Sequence[Piece] = (),
        reseed: bool = False,
        **options: Any,
    ) -> None:
        """`total` is the steps of all phases. `facts` go into every checkpoint, `run` too with its seconds and tokens
        brought up to date, and `pieces`. `average` is measured instead of the weights. `base` is the folder of the
        model as it was before training; `culprits` names broken rows. `reseed` is for a resumption whose random states
        do not fit (another number of devices)."""
        self.phase, self.total = phase, total
        self.checkpoints, self.sharing, self.stop = checkpoints, sharing, stop
        self.average = average
        self._pieces = [*pieces, *([average] if average else [])]
        self._facts, self._run, self._reseed = facts, run, reseed
        self._base = base
        self._culprits = culprits
        self._started = time.monotonic()
        self._tokens: torch.Tensor | int = 0
        self._batches: tuple[int, list[dict[str, Any]]] = (-1, [])
        """The step that is being worked on, and what it has seen so far."""
        self.writer, self._snapshot = Writer(), Snapshot()
        self.stopping = False
        super().__init__(**options)
        if average:
            self.add_callback(average)

    @property
    def step(self) -> int:
        """Steps done, those of earlier phases included."""
        return self.phase.first + int(self.state.global_step)

    # ---- one step

    def _run_epoch(self, **arguments: Any) -> None:  # type: ignore[override]
        """As in Trainer, unless the evaluation at the start has ended training already."""
        if not self.control.should_training_stop:
            super()._run_epoch(**arguments)  # type: ignore[no-untyped-call]

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """As in Trainer; a loss that is no number stops the run before it spoils the weights."""
        self.writer.look()
        self._tokens = self._tokens + tokens_in(inputs)
        if self._batches[0] != self.state.global_step:
            self._batches = (self.state.global_step, [])
        self._batches[1].append(inputs)
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._must_be_finite(loss, "loss", lambda: self._without_a_loss(inputs))
        return loss

    def _prepare_for_training(self, *arguments: Any, **options: Any) -> Any:
        prepared = super()._prepare_for_training(*arguments, **options)  # type: ignore[no-untyped-call]
        self.sharing.verify(self.model_wrapped)
        return prepared

    def _clip_grad_norm(self, model: Any) -> Any:
        norm: Any = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._must_be_finite(norm, "norm of the gradient", lambda: self._batches[1])
        return norm

    def _must_be_finite(self, value: Any, what: str, suspects: Callable[[], list[dict[str, Any]]]) -> None:
        if value is None or np.isfinite(float(value)):
            return
        rows = self.in_question(suspects())
        self.writer.wait()
        newest = self.checkpoints.latest()
        raise StepFailure(
            ExitCode.BAD_DATA,
            "LossNotFinite",
            f"step {self.step + 1}: the {what} is {float(value)}{rows}",
            "Lower spec.training.learningRate, set maxGradNorm, or look for broken rows in the dataset.",
            result={"steps": self.step} | ({"checkpoint": newest.status()} if newest else {}),
        )

    def in_question(self, batches: list[dict[str, Any]]) -> str:
        """Which rows of the dataset these batches hold, as the end of a sentence."""
        return self._culprits.sentence(batches)

    def _without_a_loss(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """The rows of a batch that alone have no finite loss either; all of them where that tells nothing."""
        rows = [alone(batch, row) for row in range(len(batch["input_ids"]))]
        if self.args.world_size > 1:
            return rows  # a pass on this rank alone would wait for the others
        with torch.no_grad():
            bad = [row for row in rows if not torch.isfinite(self.model(**self._prepare_inputs(row)).loss)]
        return bad or rows

    # ---- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The means over the held-out rows. Uses no random numbers, so that whether and when it runs changes nothing;
        broken off when asked to stop."""
        self.model.eval()
        total = torch.zeros(len(self.MEASURES) + 1, dtype=torch.float64, device=self.args.device)
        with torch.no_grad(), self.average.applied() if self.average else nullcontext():
            for batch in self._held_out():
                if self.should_stop():
                    self.end_training()
                    return {}
                inputs = self._prepare_inputs(batch)
                with self.accelerator.autocast():
                    total += self.measured(inputs)
        if self.args.world_size > 1:
            dist.all_reduce(total)
        means = (total[:-1] / total[-1]).tolist()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in zip(self.MEASURES, means, strict=True)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measured(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Of a batch: the sum of each measure, and the number that it is a sum over: learned tokens."""
        learned = (inputs["labels"][:, 1:] != IGNORED).sum().double()
        nothing = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        if not learned and not self.sharing.together:
            return nothing
        loss = self.model(**inputs).loss.double()
        return torch.stack((loss * learned, learned)) if learned else nothing

    def _held_out(self) -> Iterator[dict[str, torch.Tensor]]:
        """This rank's batches, the same number on every rank."""
        size, world, rank = self.args.per_device_eval_batch_size, self.args.world_size, self.args.process_index
        rows = self.eval_dataset
        for start in range(0, len(rows), size * world):
            mine = range(start + rank * size, min(start + (rank + 1) * size, len(rows)))
            batch = self.data_collator([rows[index] for index in mine] or [rows[0]])
            if not mine:
                batch["labels"].fill_(IGNORED)
            yield batch

    # ---- stopping

    def should_stop(self) -> bool:
        """Whether any rank was asked to stop; every rank gets the same answer."""
        if self.args.world_size == 1:
            return self.stop.requested
        flag = torch.tensor(int(self.stop.requested), device=self.args.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def end_training(self) -> None:
        """End after this step, with a checkpoint."""
        self.stopping = True
        self.control.should_evaluate = False
        self.control.should_save = self.control.should_training_stop = True

    # ---- checkpoints

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        # At the run's last step the trained model itself comes next; a phase's last step is where the next one begins.
        if self.stopping or self.step < self.total:
            self.save_checkpoint()

    def save_checkpoint(self) -> None:
        """Make the state after this step a complete checkpoint; every rank has to call this.

        Where memory allows, training stands still only while the state is copied, and a thread writes the copy. At
        most one is being written; what goes wrong in the thread ends the run at the next step.
        """
        started = time.monotonic()
        self.writer.wait()
        step, main = self.step, self.args.should_save
        newest = self.checkpoints.latest() if main else None
        if self._any(newest is not None and newest.step == step):
            return  # an evaluation was broken off after it was written; that changed nothing
        folder = self.checkpoints.folder / f"step-{step}.partial"
        state = self._weights_and_moments()
        size = size_of(state)
        failure = None
        if main:
            try:
                self.checkpoints.begin(step, size)
            except StepFailure as error:
                failure = error
        if self._any(failure is not None):
            raise failure or StepFailure(ExitCode.BAD_CONFIGURATION, "DiskFull", "see rank 0", "")
        with self.checkpoints.writing(folder, size):
            self._save_rng_state(str(folder))
            if main:
                torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")
        self._any(False)  # everybody has written
        if main:
            history = copy.copy(self.state)
            history.log_history = list(self.state.log_history)
            write = partial(self._write, folder, size, history, self.progress())
            aside = not self.stopping and self._memory_allows(size)
            if aside:
                self.writer.start(partial(write, self._snapshot.of(state)))
            else:
                write(state)
            stalled = time.monotonic() - started
            self._count_checkpoint(stalled, size)
            log.info(
                "checkpoint after step %d: %s, %s, training stood still for %.0f ms",
                step, in_words(size), "a copy is being written" if aside else "written", 1000 * stalled,
            )  # fmt: skip
        if self.stopping:
            self._any(False)  # nobody leaves before it is sealed

    def _weights_and_moments(self) -> dict[str, Any]:
        """What is large in a checkpoint, in whole tensors: as it lies in memory, or gathered from all ranks. Every rank
        has to call this."""
        model = self.accelerator.unwrap_model(self.model)
        return {
            "weights": self.sharing.weights(model),
            "moments": self.sharing.moments(model, self.optimizer),
            "pieces": [piece.state() for piece in self._pieces],
        }

    def _write(self, folder: Path, size: int, history: Any, run: dict[str, Any], state: dict[str, Any]) -> None:
        """Write what is not there yet and seal the checkpoint. Uses nothing that training changes."""
        with self.checkpoints.writing(folder, size):
            model = self.accelerator.unwrap_model(self.model)
            self.sharing.write(model, self._base, state["weights"], folder)
            for piece, tensors in zip(self._pieces, state["pieces"], strict=True):
                piece.write(tensors, folder)
            torch.save(state["moments"], folder / "optimizer.pt")
            history.save_to_json(str(folder / "trainer_state.json"))
            self.checkpoints.seal(folder, self._facts, run)

    def _memory_allows(self, size: int) -> bool:
        """Whether a copy of the state fits beside it."""
        needed, free = size - self._snapshot.size + SPARE_MEMORY, available_memory()
        if needed <= free:
            return True
        log.warning(
            "a copy of the state takes %s of memory, %s are free: training waits while the checkpoint is written "
            "(spec.training.resources.limits.memory)",
            in_words(needed), in_words(free),
        )  # fmt: skip
        return False

    def whole_model(self) -> Any:
        """The trained model in one piece; every rank has to call this, and only the first may use the result."""
        return self.sharing.whole(self.accelerator.unwrap_model(self.model), self._base)

    def _any(self, flag: bool) -> bool:
        if self.args.world_size == 1:
            return flag
        value = torch.tensor(int(flag), device=self.args.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value)

    def _count_checkpoint(self, stalled: float, size: int) -> None:
        former = self._run["checkpoints"]
        self._run["checkpoints"] = {
            "written": former["written"] + 1,
            "stalledSeconds": round(former["stalledSeconds"] + stalled, 3),
            "bytes": size,
        }

    def progress(self) -> dict[str, Any]:
        """What the run knows about itself by now, earlier attempts included."""
        return {
            **self._run,
            "seconds": round(self._run["seconds"] + time.monotonic() - self._started, 3),
            "tokens": self._run["tokens"] + self.tokens_seen(),
        }

    def tokens_seen(self) -> int:
        """Tokens that this attempt trained on, padding not counted, over all ranks."""
        return int(self._tokens) * int(self.args.world_size)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: the model was loaded from the checkpoint in the first place."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        moments, schedule = (
            torch.load(Path(checkpoint, name), map_location="cpu", weights_only=True)
            for name in ("optimizer.pt", "scheduler.pt")
        )
        self.sharing.give_back(self.accelerator.unwrap_model(self.model), self.optimizer, moments)
        self.lr_scheduler.load_state_dict(schedule)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self._reseed:
            set_seed(seed_after(self.args.seed, self.step, self.args.process_index))
            return
        super()._load_rng_state(checkpoint)


def seed_after(seed: int, step: int, rank: int) -> int:
    """A seed for a resumption whose random states do not fit: each step and rank its own."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])
