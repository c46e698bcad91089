"""How several devices share a model: each holds all of it (DDP), or each a part of every tensor (FSDP2).

What differs between the two is here: how the model is loaded, what a checkpoint takes from memory and gives back, and
how one sees that the model is shared as the spec says. Frameworks fall back in silence: accelerate, for one, makes DDP
of FSDP on a CPU. Checkpoints hold whole tensors in both cases, so a run goes on with any number of devices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from finetune.api.contract import ExitCode
from finetune.api.spec import Parallelism
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.train.methods.model import trained_weights, write_weights

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Copies:
    """Each device holds the model; gradients are averaged (torch's DistributedDataParallel)."""

    together = False
    """Whether a forward pass needs all devices."""

    def __init__(self, devices: int) -> None:
        self.devices = devices

    def loading(self) -> dict[str, Any]:
        """Options of from_pretrained."""
        return {}

    def weights(self, model: Any) -> dict[str, torch.Tensor]:
        """The whole weights by name, on the first rank at least; every rank has to call this."""
        return trained_weights(model)

    def moments(self, model: Any, optimizer: Any) -> dict[str, Any]:
        """The whole state of the optimizer, likewise."""
        found: dict[str, Any] = optimizer.state_dict()
        return found

    def give_back(self, model: Any, optimizer: Any, moments: dict[str, Any]) -> None:
        """Put an optimizer's whole state back."""
        optimizer.load_state_dict(moments)

    def write(self, model: Any, base: Path, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Write such weights, or a copy of them, with what it takes to load them; the first rank does it by itself."""
        write_weights(model, weights, folder)

    def whole(self, model: Any, base: Path) -> Any:
        """The trained model in one piece; every rank has to call this, and only the first may use the result."""
        return model

    def verify(self, wrapped: Any) -> None:
        """Raise a StepFailure unless the prepared model is shared as the spec says."""
        if isinstance(wrapped, DistributedDataParallel) != (self.devices > 1):
            raise _not_shared("DDP", wrapped, self.devices)


class Shards(Copies):
    """Each device holds a part of every weight, gradient and moment; a layer is gathered while it is needed (FSDP2,
    Zhao et al. 2023, arXiv:2304.11277, as torch's `fully_shard`). With one device there is nothing to divide."""

    @property
    def together(self) -> bool:  # type: ignore[override]
        return self.devices > 1

    def loading(self) -> dict[str, Any]:
        return {"distributed_config": DistributedConfig(fsdp_size=self.devices)} if self.devices > 1 else {}

    def weights(self, model: Any) -> dict[str, torch.Tensor]:
        found: dict[str, Any] = get_model_state_dict(model, options=WHOLE)
        return found

    def moments(self, model: Any, optimizer: Any) -> dict[str, Any]:
        return get_optimizer_state_dict(model, _plain(optimizer), options=WHOLE)

    def give_back(self, model: Any, optimizer: Any, moments: dict[str, Any]) -> None:
        set_optimizer_state_dict(model, _plain(optimizer), moments, options=WHOLE)

    def write(self, model: Any, base: Path, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """On a sharded model `save_pretrained` waits for the other ranks; a model without memory knows the names."""
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(base)
            skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        skeleton.save_pretrained(folder, state_dict=weights)

    def whole(self, model: Any, base: Path) -> Any:
        weights = self.weights(model)
        if not weights:
            return None
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
        plain.load_state_dict(weights)
        return plain

    def verify(self, wrapped: Any) -> None:
        if self.devices == 1:
            return super().verify(wrapped)
        divided = all(isinstance(weight, DTensor) for weight in wrapped.parameters())
        if not (isinstance(wrapped, FSDPModule) and divided):
            raise _not_shared("FSDP", wrapped, self.devices)
        return None


def sharing_of(parallelism: Parallelism, devices: int) -> Copies:
    """What the spec asks for."""
    return Shards(devices) if parallelism == Parallelism.FSDP else Copies(devices)


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _not_shared(wanted: str, wrapped: Any, devices: int) -> StepFailure:
    found = type(wrapped).__name__
    return StepFailure(
        ExitCode.BAD_CONFIGURATION,
        "NotSharedAsAsked",
        f"spec.training.parallelism: {wanted} over {devices} devices, but the prepared model is a {found}",
        "The versions of torch, transformers and accelerate do not fit together: use the operator's own image.",
    )
