"""What a model computes in f32, whatever its weights are kept in, without a second copy of them.

In bf16 a logit has eight bits: from one step to the next a probability changes by a sixteenth and more, and the
processor's instructions decide which step it is. So nothing that is reported as a probability is computed in bf16. The
weights are widened, which is exact, part by part: a decoder layer while it computes, the embedding, the head. What
comes out is what transformers gives for the model loaded in f32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

NARROW = (torch.bfloat16, torch.float16)

NARROW_BYTES = {"BF16": 2, "F16": 2}
"""The same, as safetensors names them, and their bytes a number."""

Weights = Sequence[tuple[MutableMapping[str, Any], str, torch.Tensor]]
"""Narrow tensors of a module, and where they belong."""


@contextmanager
def in_single_precision(model: nn.Module) -> Iterator[None]:
    """Within it the model's forward passes are computed in f32. For inference only.

    Products of weights that are quantised to 8 bits stay those of bitsandbytes, which rounds what goes in as well.
    """
    narrow = {module: found for module in model.modules() if (found := _narrow_weights(module))}
    with ExitStack() as end:
        for weights in narrow.values():
            end.callback(_put, weights)
            _hide(weights)
        for module in model.modules():
            if (dtype := getattr(module, "compute_dtype", None)) in NARROW:  # bitsandbytes' layers of 4 bits
                end.callback(setattr, module, "compute_dtype", dtype)
                setattr(module, "compute_dtype", torch.float32)  # noqa: B010
        for root, modules in _parts(model):
            part = _Part([narrow[module] for module in modules if module in narrow])
            end.callback(root.register_forward_pre_hook(part.widen).remove)
            end.callback(root.register_forward_hook(part.narrow, always_call=True).remove)
        yield


def largest_part(tensors: Mapping[str, Any]) -> int:
    """Bytes that the largest part takes in f32, from the tensors of a checkpoint by name; 0 when they are f32."""
    sizes: Counter[str] = Counter()
    for name, tensor in tensors.items():
        if bytes_each := NARROW_BYTES.get(tensor.dtype):
            sizes[_part_of(name)] += tensor.size // bytes_each * 4
    return max(sizes.values(), default=0)


def _part_of(name: str) -> str:
    """`model.layers.7` of a tensor's name below it; of a tensor outside any list its whole name."""
    pieces = name.split(".")
    number = next((index for index, piece in enumerate(pieces) if piece.isdigit()), len(pieces))
    return ".".join(pieces[: number + 1])


def _parts(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Modules that compute one after another, each with those whose weights it may use. Whole layers, because some use
    the weights of a module within them without calling it."""
    if isinstance(module, nn.ModuleList):
        yield from ((layer, list(layer.modules())) for layer in module)
    elif any(isinstance(inner, nn.ModuleList) for inner in module.modules()):
        yield module, [module]
        for child in module.children():
            yield from _parts(child)
    else:
        yield module, list(module.modules())


class _Part:
    """The weights of some modules, in f32 while their part computes."""

    def __init__(self, weights: Sequence[Weights]) -> None:
        self._weights = weights
        self._autocast = ExitStack()

    def widen(self, *_: Any) -> None:
        """Put wide weights in place, and have nothing narrowed again behind our back."""
        for device in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
            self._autocast.enter_context(torch.autocast(device, enabled=False))
        for weights in self._weights:
            for table, name, value in weights:
                table[name] = value.float()

    def narrow(self, *_: Any) -> None:
        """Take them away, also after an error."""
        for weights in self._weights:
            _hide(weights)
        self._autocast.close()


def _narrow_weights(module: nn.Module) -> Weights:
    tables: tuple[MutableMapping[str, Any], ...] = (module._parameters, module._buffers)
    return [
        (table, name, value)
        for table in tables
        for name, value in table.items()
        if value is not None and value.dtype in NARROW
    ]


def _put(weights: Weights) -> None:
    for table, name, value in weights:
        table[name] = value


def _hide(weights: Weights) -> None:
    """Until its part computes a weight is one number that is none: f32 for code that adapts to the weights' type, and
    impossible to use unnoticed."""
    for table, name, value in weights:
        table[name] = torch.full((), torch.nan, device=value.device).expand(value.shape)
