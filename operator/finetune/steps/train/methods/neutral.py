"""Proof that an adapter changes nothing before it has learned anything, on the job's own model, before a step is taken.

LoRA begins with a change of zero, and trained rows with the values that they have. Where the adapted model answers
otherwise than its base does, the adapter computes something else than what is published in the end: peft's layers are
made for plain modules, and drop what others add (a bias, a scale).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from finetune.api.contract import ExitCode
from finetune.steps.runtime.failure import StepFailure

TOLERANCE = 1e-4
"""Of the largest logit, in f32."""

COARSE = 5e-2
"""The same where weights are not f32: bf16 under an adapter, or quantised."""

OLD_IDS = 8
NEW_IDS = 8


def require_neutral(model: Any, new_rows: Sequence[int]) -> float:
    """How far the logits of the adapted model are from those of its base, as a share of the largest; a StepFailure
    where that is more than rounding, or where the model cannot compute with its adapter. It is left as it was."""
    ids = torch.tensor([[*range(OLD_IDS), *new_rows[:NEW_IDS]]], device=model.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            adapted = model(input_ids=ids, use_cache=False).logits.float()
            with model.disable_adapter():
                plain = model(input_ids=ids, use_cache=False).logits.float()
    except (TypeError, AttributeError, ValueError, LookupError, NotImplementedError) as error:
        raise _refusal(f"{type(error).__name__}: {error}"[:300]) from error
    finally:
        model.train(was_training)
    difference = float((adapted - plain).abs().max() / plain.abs().max().clamp_min(1e-9))
    in_f32 = all(weight.dtype == torch.float32 for weight in model.parameters())
    if not difference <= (TOLERANCE if in_f32 else COARSE):
        raise _refusal(
            f"with an adapter that has learned nothing its logits are off by {difference:.2g} of the largest"
        )
    return difference


def _refusal(what: str) -> StepFailure:
    return StepFailure(
        ExitCode.BAD_CONFIGURATION,
        "LoRANotPossible",
        f"spec.training.method: this model cannot be trained by an adapter: {what}",
        "Name modules without experts or routers in spec.training.lora.targets, or use method Full.",
    )
