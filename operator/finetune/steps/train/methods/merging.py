"""Where what an adapter changes lies in the files of its base: known before the first step, so that no adapter is
trained that cannot be merged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune.api.contract import ExitCode
from finetune.steps.model_files.floats import EDITABLE_DTYPES
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.weight_names.correspondence import Correspondence
from finetune.steps.workspace.merge_record import Adapted, Block

ADAPTER = "default"
PREFIX = "base_model.model."


def adapted_layers(model: Any, names: Correspondence) -> list[Adapted]:
    """The layers of a model's adapter, each with the blocks of the base's files that it changes.

    Raises StepFailure when one of them cannot be merged."""
    return list(_layers(model, names))


def weights_adapted(model: Any) -> list[str]:
    """The layers that LoRA adapts, and the stacks of experts, by their names in the model without an adapter."""
    return [weight.removesuffix(".weight") for _, weight, _ in _lora(model)]


def _layers(model: Any, names: Correspondence) -> Iterator[Adapted]:
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for layer, weight, module in _lora(model):
        if not module.lora_A:
            raise _not_mergeable(f"{layer} is no matrix that rows are multiplied with")
        if len(names.twins.get(weight, ())) > 1:
            raise _not_mergeable(f"{weight} is one matrix with {names.twins[weight][0]}, which would change with it")
        shape: tuple[int, ...] = ()
        if isinstance(module, ParamWrapper):
            shape = tuple(getattr(module.get_base_layer(), module.parameter_name).shape)
        stacked = len(shape) == 3
        inputs_first = stacked and getattr(module.get_base_layer(), "is_transposed", False)
        yield Adapted(
            layer,
            _blocks(weight, names),
            scale=module.scaling[ADAPTER],
            experts=shape[0] if stacked else None,
            inputs_first=bool(inputs_first or (not shape and module.fan_in_fan_out)),
        )
    for name, module in model.named_modules():
        if isinstance(module, TrainableTokensLayer) and module.tied_adapter is None:
            layer = name.removeprefix(PREFIX)
            weight = f"{layer.removesuffix('.token_adapter')}.weight"
            yield Adapted(layer, _blocks(weight, names), ids=tuple(module.token_indices[ADAPTER]))


def _lora(model: Any) -> Iterator[tuple[str, str, Any]]:
    """Name, weight and module of each layer of LoRA."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer = name.removeprefix(PREFIX)
            own = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            yield layer, f"{layer.replace('.base_layer', '')}.{own}", module


def _blocks(weight: str, names: Correspondence) -> tuple[Block, ...]:
    blocks = names.blocks.get(weight, ())
    if not blocks:
        raise _not_mergeable(f"where {weight} lies in the model's files cannot be told")
    for block in blocks:
        if (dtype := names.tensors[block.tensor].dtype) not in EDITABLE_DTYPES:
            raise _not_mergeable(f"{block.tensor} is {dtype}, not one of {', '.join(EDITABLE_DTYPES)}")
    return blocks


def _not_mergeable(what: str) -> StepFailure:
    return StepFailure(
        ExitCode.BAD_CONFIGURATION,
        "NotMergeable",
        f"spec.output.format: Merged, but the adapter could not be merged into the model: {what}",
        "Set spec.output.format: Adapter, or name other modules in spec.training.lora.targets.",
    )
