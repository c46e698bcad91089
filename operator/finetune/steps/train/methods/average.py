"""An exponential moving average of the trained weights (B. T. Polyak, A. B. Juditsky, 1992; as the "mean teacher" of
A. Tarvainen, H. Valpola, 2017): steadier than the weights of any one step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

FILE = "ema.safetensors"


class WeightAverage(TrainerCallback):
    """Follows the trained weights: average <- decay * average + (1 - decay) * weights, after every step, in f32."""

    def __init__(self, decay: float, checkpoint: Path | None = None) -> None:
        """`checkpoint` is the folder of the one to go on from."""
        self._decay = decay
        self._checkpoint = checkpoint
        self._weights: dict[str, torch.Tensor] = {}
        self._average: dict[str, torch.Tensor] = {}

    def follow(self, model: Any) -> None:
        """Start with the model's trained weights as they are, or with the average in the checkpoint."""
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        if self._checkpoint:
            loaded = load_file(self._checkpoint / FILE)
            self._average = {name: loaded[name].to(weight.device) for name, weight in self._weights.items()}
        else:
            self._average = {name: weight.detach().float().clone() for name, weight in self._weights.items()}

    def on_train_begin(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        self.follow(event["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        share = 1 - decay_after(state.global_step, self._decay)
        weights = [weight.detach().float() for weight in self._weights.values()]
        torch._foreach_lerp_(list(self._average.values()), weights, share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with its average as weights, and as it was afterwards."""
        former = {name: weight.data for name, weight in self._weights.items()}
        try:
            for name, weight in self._weights.items():
                weight.data = self._average[name].to(weight.dtype)
            yield
        finally:
            for name, weight in self._weights.items():
                weight.data = former[name]

    def state(self) -> dict[str, torch.Tensor]:
        """The average, by the names of the weights."""
        return self._average

    def write(self, state: dict[str, torch.Tensor], folder: Path) -> None:
        """As a piece of a checkpoint."""
        save_file({name: value.contiguous() for name, value in state.items()}, folder / FILE)


def decay_after(step: int, decay: float) -> float:
    """The decay at a step, from 1 on: small at first, so that the average forgets where it started (as in TensorFlow's
    ExponentialMovingAverage with num_updates)."""
    return min(decay, (1 + step) / (10 + step))
