"""transformers' Trainer, with checkpoints that are complete or absent, an evaluation that disturbs nothing, and an end
at the first loss that is not a number.

What is overridden is what Trainer does to the outside world; the arithmetic of a step is its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import Trainer, set_seed

from finetune.api.contract import ExitCode
from finetune.steps.dataset.encode import IGNORED
from finetune.steps.failure import StepFailure
from finetune.steps.train.checkpoint import Checkpoints
from finetune.steps.train.examples import tokens_in
from finetune.steps.train.stop import StopRequest

log = logging.getLogger(__name__)


class ResumableTrainer(Trainer):
    """A Trainer that can be killed at any moment and asked to stop between any two steps."""

    model: Any
    eval_dataset: Any
    data_collator: Any

    def __init__(
        self,
        *,
        checkpoints: Checkpoints,
        stop: StopRequest,
        facts: dict[str, Any],
        run: dict[str, Any],
        reseed: bool = False,
        **options: Any,
    ) -> None:
        """`facts` go into every checkpoint, `run` too with its seconds and tokens brought up to date. `reseed` is for
        a resumption whose random states do not fit (another number of devices)."""
        self.checkpoints, self.stop = checkpoints, stop
        self._facts, self._run, self._reseed = facts, run, reseed
        self._started = time.monotonic()
        self._tokens: torch.Tensor | int = 0
        self.stopping = False
        super().__init__(**options)

    # ---- one step

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """As in Trainer; a loss that is no number stops the run before it spoils the weights."""
        self._tokens = self._tokens + tokens_in(inputs)
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._must_be_finite(loss, "loss")
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm: Any = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        self._must_be_finite(norm, "norm of the gradient")
        return norm

    def _must_be_finite(self, value: Any, what: str) -> None:
        if value is not None and not np.isfinite(float(value)):
            step = self.state.global_step + 1
            newest = self.checkpoints.latest()
            raise StepFailure(
                ExitCode.BAD_DATA,
                "LossNotFinite",
                f"step {step}: the {what} is {float(value)}",
                "Lower spec.training.learningRate, set maxGradNorm, or look for broken rows in the dataset.",
                result={"steps": self.state.global_step} | ({"checkpoint": newest.status()} if newest else {}),
            )

    # ---- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss per learned token over the held-out rows. Uses no random numbers, so that whether and when it runs
        changes nothing; broken off when asked to stop."""
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.no_grad():
            for batch in self._held_out():
                if self.should_stop():
                    self.end_training()
                    return {}
                inputs = self._prepare_inputs(batch)
                learned = (inputs["labels"][:, 1:] != IGNORED).sum()
                if learned:
                    with self.accelerator.autocast():
                        loss = self.model(**inputs).loss
                    total += torch.stack((loss.double() * learned, learned.double()))
        if self.args.world_size > 1:
            dist.all_reduce(total)
        metrics = {f"{metric_key_prefix}_loss": float(total[0] / total[1])}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

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
        if self.stopping or self.state.global_step < self.state.max_steps:  # else the trained model itself comes next
            self.save_checkpoint()

    def save_checkpoint(self) -> None:
        """Write the state after this step as a complete checkpoint; every rank has to call this."""
        step, main = self.state.global_step, self.args.should_save
        folder = self.checkpoints.folder / f"step-{step}.partial"
        failure = None
        if main:
            try:
                self.checkpoints.begin(step, self._needed())
            except StepFailure as error:
                failure = error
        if self._any(failure is not None):
            raise failure or StepFailure(ExitCode.BAD_CONFIGURATION, "DiskFull", "see rank 0", "")
        if main:
            self.accelerator.unwrap_model(self.model).save_pretrained(folder)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_rng_state(str(folder))
        if main:
            self.state.save_to_json(str(folder / "trainer_state.json"))
        self._any(False)  # everybody has written
        if main:
            self.checkpoints.seal(folder, self._facts, self.progress())
            log.info("checkpoint after step %d", step)
        self._any(False)  # nobody leaves before it is sealed

    def _any(self, flag: bool) -> bool:
        if self.args.world_size == 1:
            return flag
        value = torch.tensor(int(flag), device=self.args.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value)

    def _needed(self) -> int:
        """Bytes of a checkpoint: the weights, and two moments of each that is trained."""
        sizes = ((each.numel() * each.element_size(), each.requires_grad) for each in self.model.parameters())
        return sum(size * (3 if trained else 1) for size, trained in sizes)

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

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self._reseed:
            set_seed(seed_after(self.args.seed, self.state.global_step, self.args.process_index))
            return
        super()._load_rng_state(checkpoint)


def seed_after(seed: int, step: int, rank: int) -> int:
    """A seed for a resumption whose random states do not fit: each step and rank its own."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])
