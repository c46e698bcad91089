"""Proof that packed examples do not see one another, on the job's own model and rows, before a step is taken.

Whether a model keeps them apart depends on its architecture, its attention kernel and the version of transformers, and
a model that does not would learn from wrong contexts without a sign of it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from finetune.api.contract import ExitCode
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.train.data.examples import Collator, Example, Examples

TOLERANCE = 1e-3
"""Of logits in f32: isolated examples differ by less than 1e-4 (other shapes round otherwise), others by far more."""

COARSE = 0.25
"""Of logits where weights are not f32: bf16 under an adapter, or quantised."""

LENGTH = 64
"""Tokens of an example that take part."""

EXAMPLES = 3
ROWS = 64
"""Rows that are searched for two examples in one."""


def require_isolated(model: Any, examples: Examples, collator: Collator) -> float:
    """The largest difference between an example's logits in a packed row and by itself; a StepFailure where that is
    beyond `TOLERANCE`. 0 where no row has two examples. The model is left as it was, and no random number is drawn."""
    row = next((parts for index in range(min(ROWS, len(examples))) if len(parts := _parts(examples[index])) > 1), None)
    if row is None:
        return 0.0
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise _refusal(model, "it takes no position_ids")
    was_training = model.training
    model.eval()
    try:
        together = _logits(model, collator([{name: torch.cat([part[name] for part in row]) for name in row[0]}]))
        difference, start = 0.0, 0
        for part in row:
            length = len(part["input_ids"])
            alone = _logits(model, {"input_ids": part["input_ids"][None], "use_cache": False})
            apart = (together[0, start : start + length] - alone[0, :length]).abs().max()
            difference, start = max(difference, float(apart)), start + length
    finally:
        model.train(was_training)
    in_f32 = all(weight.dtype == torch.float32 for weight in model.parameters())
    if not difference <= (TOLERANCE if in_f32 else COARSE):
        raise _refusal(model, f"the logits of packed examples differ by {difference:.2g} from those of the same alone")
    return difference


def _logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    inputs = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}
    inputs.pop("labels", None)
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs).logits.float()
    return logits


def _parts(row: Example) -> list[Example]:
    """The first examples of a packed row, the beginning of each."""
    starts = (row["position_ids"] == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], len(row["input_ids"])]
    spans = [slice(start, min(end, start + LENGTH)) for start, end in zip(starts, ends, strict=True)][:EXAMPLES]
    return [{name: values[span] for name, values in row.items()} for span in spans]


def _refusal(model: Any, why: str) -> StepFailure:
    return StepFailure(
        ExitCode.BAD_CONFIGURATION,
        "PackingNotIsolated",
        f"spec.dataset.packing: Enabled, but {type(model).__name__} does not keep packed examples apart: {why}",
        "Use packing: Disabled.",
    )
