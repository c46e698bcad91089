"""The model as a phase of the run trains it: whole, or frozen with an adapter.

Weights that are trained are f32, always: in bf16 an update at a small learning rate is mostly rounded away. Weights
that are not keep their own type on a GPU. The new rows are trained with whatever else is: under LoRA, and in the
embedding's warm-up, as rows that replace those of the frozen matrix, so that no other row can move.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

from finetune.api.contract import ExitCode
from finetune.api.spec import LoRA, Method
from finetune.steps.model_files.adapter import ADAPTER_WEIGHTS
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.train.checkpoints.checkpoint import Checkpoint
from finetune.steps.train.methods.targets import all_linear, is_all_that_peft_takes
from finetune.steps.train.phase import Phase, PhaseName
from finetune.steps.train.plan import Plan

ALL_LINEAR = "all-linear"
"""peft's word for every linear layer but the head."""

log = logging.getLogger(__name__)


def model_of(plan: Plan, phase: Phase, checkpoint: Checkpoint | None, sharing: Mapping[str, Any]) -> Any:
    """The model at the beginning of the phase, or at a checkpoint inside it. `checkpoint` may also be the one that
    ended the phase before. `sharing` holds the options of loading that divide a whole model among devices."""
    inside = checkpoint is not None and checkpoint.step > phase.first
    if phase.name == PhaseName.TRAINING and plan.training.method == Method.FULL:
        if checkpoint is not None and inside:
            return loaded(checkpoint.folder, **sharing)
        model = loaded(plan.model, **sharing)
        return model if checkpoint is None else _with_rows(model, checkpoint).requires_grad_(True)
    from peft import PeftModel, get_peft_model

    base = _frozen(plan)
    if checkpoint is not None and inside:
        return with_bias(PeftModel.from_pretrained(base, checkpoint.folder, is_trainable=True))
    if checkpoint is not None:
        base = _with_rows(base, checkpoint)
    config = _adapter(base, plan, phase)
    set_seed(plan.training.seed)
    try:
        return with_bias(get_peft_model(base, config))
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        experts = getattr(config, "target_parameters", None) and config.lora_dropout
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "LoRANotPossible",
            f"spec.training.lora: {error}",
            "Set spec.training.lora.dropout: 0, which experts need, or name modules without experts in "
            "spec.training.lora.targets."
            if experts
            else "Name modules of this model in spec.training.lora.targets, or leave it out for all linear layers.",
        ) from error


def with_bias(model: Any) -> Any:
    """The model, the bias of its head included: peft's layer for trained rows computes without it (0.21)."""
    for _, layer in _token_layers(model):
        if getattr(layer.get_base_layer(), "bias", None) is not None:
            layer.register_forward_hook(_add_bias)
    return model


def require_no_bias(model: Any) -> None:
    """Raise StepFailure where an adapter with new rows would compute otherwise when peft loads it than it did here."""
    for name, layer in _token_layers(model):
        if getattr(layer.get_base_layer(), "bias", None) is not None:
            raise StepFailure(
                ExitCode.BAD_CONFIGURATION,
                "AdapterWithoutBias",
                f"spec.output.format: Adapter, but {name.rpartition('base_model.model.')[2]} has a bias, which peft "
                "leaves out of a layer with trained rows",
                "Use format Merged; or train an adapter without spec.tokens.",
            )


def _add_bias(layer: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
    if layer.disable_adapters or layer.merged or not layer.active_adapters:
        return None  # the base layer computed it
    bias: torch.Tensor = layer.get_base_layer().bias
    return output + bias


def trained_weights(model: Any) -> dict[str, torch.Tensor]:
    """The weights that a checkpoint needs, as they lie in memory: the model's, or the adapter's alone."""
    if not is_adapted(model):
        weights: dict[str, torch.Tensor] = model.state_dict()
        return weights
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def write_weights(model: Any, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write such weights, or a copy of them, as safetensors, with what it takes to load them again."""
    if is_adapted(model):
        model.peft_config["default"].save_pretrained(folder)
        # A tied head shares the embedding's rows, and safetensors refuses what is shared.
        save_file({name: values.detach().clone() for name, values in weights.items()}, folder / ADAPTER_WEIGHTS)
    else:
        model.save_pretrained(folder, state_dict=weights)


def is_adapted(model: Any) -> bool:
    """Whether it is a frozen model with an adapter."""
    return hasattr(model, "peft_config")


def new_rows_moved(model: Any) -> dict[str, int]:
    """How many of the new rows an adapter changed, by matrix.

    Raises StepFailure when a frozen matrix could have been changed, or the head's rows are all as they were: each step
    makes every new token likelier or less likely, so one of them moves unless something is broken."""
    moved = {}
    for name, layer in _row_layers(model):
        if layer.get_base_layer().weight.requires_grad:
            raise _broken(f"the old rows of {name} were trained as well")
        rows = layer.trainable_tokens_delta["default"].detach()
        moved[name] = int((rows != layer.trainable_tokens_original["default"].to(rows)).any(dim=1).sum())
    base = model.get_base_model()
    embedding, head = (_weight(module) for module in (base.get_input_embeddings(), base.get_output_embeddings()))
    if base.config.get_text_config().tie_word_embeddings and embedding is not head:
        raise _broken("embedding and head are no longer one matrix")
    if moved and not list(moved.values())[-1]:
        raise _broken("no new row has moved")
    return moved


def _row_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """peft's layers that hold new rows, the embedding's first; a tied head shares the embedding's and is left out."""
    for name, module in _token_layers(model):
        if module.tied_adapter is None:
            yield name.removesuffix(".token_adapter"), module


def _token_layers(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for name, module in model.named_modules():
        if isinstance(module, TrainableTokensLayer):
            yield name, module


def _weight(module: Any) -> Any:
    while (inner := getattr(module, "token_adapter", None) or getattr(module, "base_layer", None)) is not None:
        module = inner
    return module.weight


def _broken(what: str) -> StepFailure:
    return StepFailure(
        ExitCode.BAD_DATA,
        "NewRowsNotTrained",
        what,
        "Report the model's name as a fault of the operator; method Full trains its new rows in any case.",
    )


def _adapter(model: Any, plan: Plan, phase: Phase) -> Any:
    from peft import LoraConfig, TaskType, TrainableTokensConfig

    modules, rows = _token_modules(model), list(plan.new_rows)
    if phase.name == PhaseName.EMBEDDING_WARMUP:
        return TrainableTokensConfig(token_indices=rows, target_modules=modules, task_type=TaskType.CAUSAL_LM)
    settings = plan.training.lora or LoRA()
    targets, experts = (settings.targets, []) if settings.targets else all_linear(model)
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=ALL_LINEAR if not experts and is_all_that_peft_takes(model, targets) else targets,
        target_parameters=experts or None,
        # a bare list would leave the rows of a head of its own untrained
        trainable_token_indices=dict.fromkeys(modules, rows) if rows else None,
        task_type=TaskType.CAUSAL_LM,
    )


def _token_modules(model: Any) -> list[str]:
    """The names of the modules with one row for each token: the embedding, and the head unless that is tied to it."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = [embedding, *([head] if head is not None and head.weight is not embedding.weight else [])]
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    return [names[id(module)] for module in modules]


def _with_rows(base: Any, checkpoint: Checkpoint) -> Any:
    """The model with the new rows that the warm-up ended with."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, checkpoint.folder).merge_and_unload()


def _frozen(plan: Plan) -> Any:
    """The model beneath an adapter."""
    cuda = torch.cuda.is_available()
    dtype = base_dtype(plan.model) if cuda else torch.float32
    if plan.training.method != Method.QLORA:
        return loaded(plan.model, dtype)
    eight = plan.training.lora is not None and plan.training.lora.bits == 8
    quantisation = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_8bit=eight,
        load_in_4bit=not eight,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if cuda else torch.float32,
    )
    place = {"device_map": {"": torch.cuda.current_device()}} if cuda else {}
    return loaded(plan.model, dtype, quantization_config=quantisation, **place)


def loaded(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The model in a folder, whole. Raises StepFailure when weights are missing or of another shape."""
    both: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
    )
    model, report = both
    for problem in ("missing_keys", "mismatched_keys"):
        if report[problem]:
            names = ", ".join(sorted(map(str, report[problem]))[:5])
            raise StepFailure(
                ExitCode.BAD_DATA,
                "WeightsIncomplete",
                f"{folder}: {problem.replace('_', ' ')}: {names}",
                "The model's files do not belong together.",
            )
    return model


def base_dtype(base: Path) -> torch.dtype:
    """The type of the base's weights, as its configuration says; bfloat16 where it is silent."""
    config = json.loads((base / "config.json").read_text())
    nested = config.get("text_config", {})
    name = next((c[key] for c in (config, nested) for key in ("dtype", "torch_dtype") if c.get(key)), "bfloat16")
    dtype = getattr(torch, str(name), None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.bfloat16
