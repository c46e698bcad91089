"""Direct preference optimisation (R. Rafailov et al., "Direct Preference Optimization", 2023, equation 7).

The loss of a pair is -log sigmoid(beta * ((log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected)))): p
are probabilities under the model, q under the model as it was when this began. The q of all pairs are computed once,
before the first step, and every checkpoint carries them: no second model takes memory, and nothing is lost with a
process. (trl's DPOTrainer reads a head's bias that tied weights under peft do not have.)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, logsigmoid

from finetune.steps.train.data.examples import Collator, Example, Examples
from finetune.steps.train.trainer.resumable import ResumableTrainer
from finetune.steps.workspace.training_data import IGNORED

FILE = "reference.safetensors"

log = logging.getLogger(__name__)


class Pairs(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows that hold two examples each, chosen and rejected, with the log-probabilities of both before training."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples
        self.reference = torch.zeros(len(examples), 2)
        """Of shape (pairs, 2): log q of the chosen and of the rejected answer."""

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._examples[index]
        (start,) = (row["position_ids"][1:] == 0).nonzero().flatten().tolist()
        parts = [slice(0, start + 1), slice(start + 1, None)]
        examples = [{name: row[name][part] for name in ("input_ids", "labels")} for part in parts]
        return {"number": index, "examples": examples, "reference": self.reference[index]}


class PairCollator:
    """A batch of n pairs: 2 n rows, the chosen ones first, `reference` of shape (2, n), and the pairs' `numbers`."""

    def __init__(self, collator: Collator) -> None:
        self._collator = collator

    def __call__(self, pairs: Sequence[dict[str, Any]]) -> Example:
        """The batch."""
        rows = [pair["examples"][which] for which in (0, 1) for pair in pairs]
        return {
            **self._collator(rows),
            "reference": torch.stack([pair["reference"] for pair in pairs], dim=1),
            "numbers": torch.tensor([pair["number"] for pair in pairs]),
        }


class Reference:
    """The log-probabilities of all pairs before training, for the checkpoints."""

    def __init__(self, parts: Mapping[str, Pairs]) -> None:
        self._parts = parts

    def state(self) -> dict[str, torch.Tensor]:
        """By part of the dataset."""
        return {name: pairs.reference for name, pairs in self._parts.items()}

    def write(self, state: dict[str, torch.Tensor], folder: Path) -> None:
        """As a piece of a checkpoint."""
        save_file(state, folder / FILE)

    def load(self, checkpoint: Path) -> None:
        """As they were when the run began."""
        for name, values in load_file(checkpoint / FILE).items():
            self._parts[name].reference = values

    def measure(self, trainer: PreferenceTrainer) -> None:
        """By the trainer's model as it is; every rank computes its share."""
        started = time.monotonic()
        for pairs in self._parts.values():
            trainer.measure(pairs)
        total = sum(map(len, self._parts.values()))
        log.info("the reference log-probabilities of %d pairs took %.1f s", total, time.monotonic() - started)


class PreferenceTrainer(ResumableTrainer):
    """Trains on pairs. Every pair of the global batch weighs the same, however its micro-batches fall."""

    MEASURES = ("loss", "accuracy")
    """The accuracy is the share of pairs of which the chosen answer gained more than the rejected one."""

    loss_is_scaled_for_ga = True

    def __init__(self, *, beta: float, reference: Reference, **options: Any) -> None:
        self._beta = beta
        super().__init__(pieces=[*options.pop("pieces", ()), reference], **options)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum over these pairs, divided by the number of pairs in the global batch."""
        losses, _ = self._judged(model, inputs)
        return losses.sum() / num_items_in_batch * self.args.world_size  # DDP takes the mean over ranks

    def in_question(self, batches: list[dict[str, Any]]) -> str:
        """The pairs in these batches know their numbers."""
        return self._culprits.named(sorted({int(number) for batch in batches for number in batch["numbers"]}))

    def _without_a_loss(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        return [batch]

    def measured(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Sums of loss and accuracy, and the number of pairs."""
        losses, margins = self._judged(self.model, inputs)
        pairs = (inputs["labels"][:, 1:] != IGNORED).any(dim=1).view(2, -1)[0]  # others only fill up a rank's batch
        sums = (losses[pairs].sum(), (margins[pairs] > 0).sum(), pairs.sum())
        return torch.stack([each.double() for each in sums])

    def measure(self, pairs: Pairs) -> None:
        """Fill in the reference of these pairs."""
        self.model.eval()
        size, world, rank = self.args.per_device_eval_batch_size, self.args.world_size, self.args.process_index
        values = torch.zeros(len(pairs), 2, device=self.args.device)
        with torch.no_grad():
            for start in range(rank * size, len(pairs), world * size):
                numbers = range(start, min(start + size, len(pairs)))
                inputs = self._prepare_inputs(self.data_collator([pairs[number] for number in numbers]))
                with self.accelerator.autocast():
                    values[numbers.start : numbers.stop] = _log_probabilities(self.model, inputs).T
        if world > 1:
            dist.all_reduce(values)
        pairs.reference = values.cpu()

    def _judged(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each pair, and by how much more the chosen answer gained than the rejected one (in nats)."""
        chosen, rejected = _log_probabilities(model, inputs) - inputs["reference"]
        margins = chosen - rejected
        return -logsigmoid(self._beta * margins), margins

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        pairs = torch.tensor(sum(batch["reference"].shape[1] for batch in batch_samples), device=device)
        if self.args.world_size > 1:
            dist.all_reduce(pairs)
        return pairs


def _log_probabilities(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """log p of every answer's learned tokens together, f32, of shape (2, pairs): chosen, rejected."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    labels = inputs["labels"][:, 1:]
    losses = cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return -losses.sum(dim=1).view(2, -1)
