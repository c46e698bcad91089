"""What watches a training run: progress for whoever looks, and the request to stop."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from finetune.steps.runtime.progress import Progress
from finetune.steps.train.pulse import beat

if TYPE_CHECKING:
    from finetune.steps.train.trainer.resumable import ResumableTrainer


log = logging.getLogger(__name__)


class Watch(TrainerCallback):
    """Reports and gives a sign of life after every step, and ends training after a step when asked to stop."""

    def __init__(self, progress: Progress | None) -> None:
        """`progress` only on the first rank."""
        self._progress = progress
        self._trainer: ResumableTrainer | None = None
        self._since = 0.0
        self._stepped = False
        self._validation_loss: float | None = None

    def watch(self, trainer: ResumableTrainer) -> None:
        """Make this the trainer's callback."""
        self._trainer = trainer
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._since = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self._trainer is not None
        beat()
        if not self._stepped:
            self._stepped = True
            log.info("the first step took %.1f s", time.monotonic() - self._since)
        if self._trainer.should_stop():
            self._trainer.end_training()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        beat()

    def on_evaluate(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        self._validation_loss = event["metrics"]["eval_loss"]

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._update(state)

    def on_log(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        logs = event["logs"]
        self._update(state, loss=logs.get("loss"), learning_rate=logs.get("learning_rate"))

    def _update(self, state: Any, **metrics: float | None) -> None:
        if self._progress is None or self._trainer is None:
            return
        trainer = self._trainer
        newest = trainer.checkpoints.latest()
        seconds = time.monotonic() - self._since
        self._progress.update(
            trainer.step,
            trainer.total,
            phase=trainer.phase.name,
            **metrics,
            validation_loss=self._validation_loss,
            tokens_per_second=round(trainer.tokens_seen() / seconds, 1) if seconds else None,
            checkpoint_step=newest.step if newest else None,
        )
