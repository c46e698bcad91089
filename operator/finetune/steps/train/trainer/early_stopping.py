"""When training should end because it no longer helps: read off the validation losses that the run has logged, which
every checkpoint carries anyhow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

from finetune.api.spec import EarlyStopping


def exhausted(log_history: Sequence[Mapping[str, Any]], rule: EarlyStopping) -> bool:
    """Whether the newest `patience` evaluations all failed to improve on the best before them."""
    best, waited = float("inf"), 0
    for entry in log_history:
        loss = entry.get("eval_loss")
        if loss is None:
            continue
        if loss < best - rule.minimum_improvement:
            best, waited = loss, 0
        else:
            waited += 1
    return waited >= rule.patience


class StopEarly(TrainerCallback):
    """Ends training after the evaluation that exhausts the user's patience."""

    def __init__(self, rule: EarlyStopping) -> None:
        self._rule = rule

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if exhausted(state.log_history, self._rule):
            control.should_training_stop = True
