"""Which weights LoRA adapts when the spec names none, and what is said of it in status.

peft's "all-linear" takes every nn.Linear, also those of a vision tower that text never reaches, and routers, which are
linear layers that return tuples; experts, which transformers keep as stacks of matrices, it takes for some families.
Here it is all that a text passes through on its way: the linear layers of the text model, and its experts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""How configurations call the number of experts."""

LISTED = 16
"""Patterns in status."""


def all_linear(model: Any) -> tuple[list[str], list[str]]:
    """The linear layers and the stacks of experts that LoRA adapts, by name.

    Layers that peft would take for others are left out: it renames targets that are called as an expert's matrices used
    to be (a shared expert's, those of dense layers) into the experts' own."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    from transformers.conversion_mapping import get_model_conversion_mapping

    text, head = _text_model(model), model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if _is_plain_linear(module) and module is not head]
    names = [name for name in names if name.startswith(text)]
    kept = LoraConfig(target_modules=names)
    convert_peft_config_for_transformers(kept, model=model, conversions=get_model_conversion_mapping(model))
    known = set(kept.target_modules or ())
    return [name for name in names if name in known], [name for name in _experts(model) if name.startswith(text)]


def is_all_that_peft_takes(model: Any, names: Iterable[str]) -> bool:
    """Whether peft's own word for all linear layers means the same."""
    head = model.get_output_embeddings()
    linear = {name for name, module in model.named_modules() if _is_linear(module) and module is not head}
    return linear == set(names)


def left_out(model: Any, adapted: Iterable[str]) -> list[str]:
    """The linear layers and experts of a model (the one that was adapted, before it was) that are not adapted."""
    known, head = set(adapted), model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if _is_linear(module) and module is not head]
    return [name for name in [*linear, *_experts(model)] if name not in known]


def beyond_text(model: Any) -> list[str]:
    """The weights that text never reaches: those of a model's other parts."""
    text, head = _text_model(model), model.get_output_embeddings()
    own = {id(weight) for weight in head.parameters()} if head is not None else set()
    return [name for name, weight in model.named_parameters() if not name.startswith(text) and id(weight) not in own]


def in_short(names: Iterable[str]) -> list[str]:
    """Many names in few lines: those of all layers once, with their number."""
    groups: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for name in names:
        parent, _, leaf = re.sub(r"\.\d+(?=\.)", ".*", name).rpartition(".")
        groups[parent][leaf] += 1
    lines = [_line(parent, leaves) for parent, leaves in groups.items()]
    return lines if len(lines) <= LISTED else [*lines[: LISTED - 1], f"and {len(lines) - LISTED + 1} further kinds"]


def tensors_in_short(names: Iterable[str]) -> list[str]:
    """Tensors of the files by the layers that they lie in: `mtp.layers.0 (12 tensors)`."""
    layers: dict[str, dict[int | None, int]] = defaultdict(lambda: defaultdict(int))
    for name in names:
        numbered = re.match(r"(.*?)\.(\d+)\.", name)
        place, number = (numbered[1], int(numbered[2])) if numbered else (name.rpartition(".")[0] or name, None)
        layers[place][number] += 1
    lines = []
    for place, counts in layers.items():
        numbers = sorted(number for number in counts if number is not None)
        which = f".{numbers[0]}" + (f"-{numbers[-1]}" if len(numbers) > 1 else "") if numbers else ""
        lines.append(f"{place}{which} ({(total := sum(counts.values()))} tensor{'s' if total > 1 else ''})")
    return lines if len(lines) <= LISTED else [*lines[: LISTED - 1], f"and {len(lines) - LISTED + 1} further parts"]


def _line(parent: str, leaves: Mapping[str, int]) -> str:
    count = sum(leaves.values())
    return f"{parent}{'.' if parent else ''}{'|'.join(leaves)}" + (f" ({count})" if count > 1 else "")


def _text_model(model: Any) -> str:
    """The name that what belongs to the text part begins with."""
    decoder = model.get_decoder()
    return next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")


def _is_linear(module: Any) -> bool:
    return isinstance(module, (torch.nn.Linear, Conv1D))


def _is_plain_linear(module: Any) -> bool:
    """Whether it returns the product alone: routers are linear layers, too, and return tuples. One whose class is its
    family's own (Falcon's) is asked."""
    if not _is_linear(module):
        return False
    if type(module).__name__ in ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt"):
        return True
    weight = module.weight
    try:
        with torch.no_grad():
            answer = module(torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=weight.device))
    except (RuntimeError, ValueError, TypeError):
        return False
    return torch.is_tensor(answer) and answer.shape == (1, weight.shape[0])


def _experts(model: Any) -> Iterator[str]:
    """Stacks of matrices, one for each expert."""
    config = model.config.get_text_config()
    counts = {getattr(config, name, None) for name in EXPERTS} - {None}
    for name, parameter in model.named_parameters():
        if (
            parameter.ndim == 3
            and parameter.shape[0] in counts
            and "conv" not in name
            and parameter.is_floating_point()
        ):
            yield name
