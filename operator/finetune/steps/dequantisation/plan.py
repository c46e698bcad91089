"""What a quantised checkpoint becomes: each of its tensors is used once, copied, or the checkpoint is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.steps.dequantisation import bitsandbytes, compressed_tensors, fp8, mxfp4
from finetune.steps.dequantisation.weights import PLAIN_DTYPES, NotDequantisable, Reader, Weight
from finetune.steps.model_files.config import quantised

METHODS: Mapping[str, Callable[[Mapping[str, Any], Reader], Iterator[Weight]]] = {
    "mxfp4": mxfp4.weights,
    "fp8": fp8.weights,
    "fbgemm_fp8": fp8.weights,
    "compressed-tensors": compressed_tensors.weights,
    "bitsandbytes": bitsandbytes.weights,
}
"""What quantization_config.quant_method may be."""

OF_ACTIVATIONS = re.compile(
    r"\.(?:activation_scale|(?:input|output)_(?:scale|zero_point)|(?:[qkv]|prob)_(?:scale|zero_point))$"
)
"""Scales of what is computed, not of weights: without quantisation nothing is scaled by them."""

OF_WEIGHTS = re.compile(
    r"_scale_inv$|\.weight_\w+$|_blocks$|_scales$|\.(?:qweight|qzeros|g_idx|SCB|absmax|quant_map)$|nested_|quant_state|"
    r"_global_scale$|zero_point$"
)
"""Parts of quantised weights by their names, whatever their types."""


COPIED = (*PLAIN_DTYPES, "BOOL", "I64")
"""Types of tensors that are no part of a quantised weight."""


@dataclass(frozen=True)
class Plan:
    """The weights that are made, by the name of the tensor with their codes; the tensors that are copied; those that
    are left out, as they are of no use without quantisation."""

    method: str
    dtype: str
    made: Mapping[str, Weight]
    copied: Collection[str]
    left_out: Sequence[str]


def require_known(config: Mapping[str, Any]) -> None:
    """Raise NotDequantisable when the checkpoint is quantised by a method that is not undone here."""
    method = quantised(config)
    if method is not None and method not in METHODS:
        raise NotDequantisable(f"its weights are quantised by {method}, which is not one of {', '.join(METHODS)}")


def planned(config: Mapping[str, Any], reader: Reader) -> Plan:
    """What becomes of each tensor of a quantised checkpoint; `config` is its config.json.

    Raises NotDequantisable when a tensor would be used twice or not at all, or is not what its method makes.
    """
    require_known(config)
    method = quantised(config) or ""
    found = config.get("quantization_config") or config.get("compression_config")
    settings = {"quantization_config": found if isinstance(found, dict) else {}}
    weights = list(METHODS[method]({**config, **settings}, reader))
    if not weights:
        raise NotDequantisable(f"config.json says {method}, and no tensor is quantised so")
    used: set[str] = set()
    for weight in weights:
        if weight.name in reader.tensors and weight.name not in weight.parts:
            raise NotDequantisable(f"{weight.name} is there, and {weight.parts[0]} makes it too")
        if twice := used.intersection(weight.parts):
            raise NotDequantisable(f"{min(twice)} would be used for two weights")
        used.update(weight.parts)
    rest = [name for name in reader.tensors if name not in used]
    left_out = [name for name in rest if OF_ACTIVATIONS.search(name)]
    copied = set(rest).difference(left_out)
    for name in sorted(copied):
        if reader.tensors[name].dtype not in COPIED or OF_WEIGHTS.search(name):
            raise NotDequantisable(f"{name} ({reader.tensors[name].dtype}) belongs to no weight that {method} makes")
    return Plan(method, _dtype(config), {weight.parts[0]: weight for weight in weights}, copied, left_out)


def _dtype(config: Mapping[str, Any]) -> str:
    """bf16; f16 for a model of that type, whose numbers it holds more closely."""
    said = config.get("dtype") or config.get("torch_dtype")
    return "F16" if said == "float16" else "BF16"
