"""Which tensors of a checkpoint's files a model's weights in memory are made of.

transformers renames tensors while it loads them, stacks experts, joins and divides matrices; and it leaves out what its
class has no use for (layers that predict further tokens, a vision tower). The rules are its own: here they are turned
back on weights that hold nothing but the numbers of their rows or columns, and what comes out says where each row and
column of a file lies in memory. That takes no memory for weights, and no rule is written down twice.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from finetune.steps.model_files.checkpoint import read_checkpoint
from finetune.steps.model_files.safetensors_file import Tensor
from finetune.steps.workspace.merge_record import Block, Range

TRANSFORMERS: Any = transformers
"""Its loaders are typed for other uses than these."""

THIN = 2
"""Columns of a weight that says only where its rows come to lie, and rows of one that says it of its columns."""

LAYER = re.compile(r".*?\.\d+\.")
"""No rule of conversion takes weights of two layers: one layer is traced, or written, at a time."""


@dataclass(frozen=True)
class Correspondence:
    """Weights in memory and tensors in files, by their names.

    `made` are the weights that each tensor is made of when transformers saves; `not_loaded` the tensors that it has no
    use for; `blocks` where each matrix lies in the files, absent where that is no even pattern of rows and columns;
    `homeless` the parameters that no tensor of the files is made of, which would be lost.
    """

    made: Mapping[str, tuple[str, ...]]
    not_loaded: tuple[str, ...]
    blocks: Mapping[str, tuple[Block, ...]]
    homeless: tuple[str, ...]
    twins: Mapping[str, tuple[str, ...]]
    """All names of each parameter that has several: a tied head is the embedding."""

    tensors: Mapping[str, Tensor]
    model: Any
    """The model without memory for its weights."""

    def in_files(self, name: str, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of the files that are made of the weights of one layer: that of the tensor `name`."""
        layers = {_layer(weight) for weight in self.made[name]}
        return _saved(self.model, {key: value for key, value in weights.items() if _layer(key) in layers}, self.tensors)


def correspondence(folder: Path) -> Correspondence:
    """How the files in `folder` and the model that transformers loads from them belong together."""
    model = TRANSFORMERS.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        device_map="meta",
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # whoever loads the weights refuses them, and says which
    )
    tensors = read_checkpoint(folder).tensors
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    twins = _twins(model)
    made: dict[str, tuple[str, ...]] = {}
    blocks: dict[str, list[Block]] = {}
    for layer in dict.fromkeys(map(_layer, shapes)):
        traces = _Traces(model, {name: shape for name, shape in shapes.items() if _layer(name) == layer}, tensors)
        for file in traces.files:
            made[file] = traces.weights(file)
            for weight, block in traces.blocks(file):
                for name in twins.get(weight, (weight,)):
                    blocks.setdefault(name, []).append(block)
    found = {twin for names in made.values() for name in names for twin in twins.get(name, (name,))}
    return Correspondence(
        made=made,
        not_loaded=tuple(name for name in tensors if name not in made),
        blocks={name: tuple(places) for name, places in blocks.items()},
        homeless=tuple(name for name, _ in model.named_parameters() if name not in found),
        twins=twins,
        tensors=tensors,
        model=model,
    )


class _Traces:
    """What transformers would write of the weights of one layer, if they held the numbers of their rows or columns.

    Each weight has numbers of its own, from its offset on. Those of a matrix (rows, columns), or a stack of them
    (experts, rows, columns), count its rows, or its columns, expert after expert; those of a vector its entries; all
    that is anything else holds only its offset.
    """

    def __init__(self, model: Any, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
        self._names, self._shapes, self._tensors = list(shapes), shapes, tensors
        self._offsets, position = [], 0
        for shape in shapes.values():
            self._offsets.append(position)
            position += _experts(shape) * max(shape[-2:], default=1)
        places = dict(zip(self._names, self._offsets, strict=True))
        self._rows, self._columns = (
            _saved(model, {name: _numbered(shape, places[name], axis) for name, shape in shapes.items()}, tensors)
            for axis in (-2, -1)
        )

    @property
    def files(self) -> list[str]:
        """The tensors of the files that are made of these weights."""
        return [name for name in self._rows if name in self._tensors]

    def weights(self, file: str) -> tuple[str, ...]:
        """The names of the weights that a tensor is made of."""
        values = torch.unique(self._rows[file]).tolist()
        return tuple(dict.fromkeys(self._names[bisect_right(self._offsets, value) - 1] for value in values))

    def blocks(self, file: str) -> Iterator[tuple[str, Block]]:
        """The blocks that a tensor consists of, each with its weight; none where rows and columns are mixed."""
        rows, columns, shape = self._rows[file], self._columns[file], self._tensors[file].shape
        if len(shape) not in (2, 3) or rows.ndim != len(shape):
            return
        stacks = zip(*((part.unbind() if part.ndim == 3 else (part,)) for part in (rows, columns)), strict=True)
        for index, (down, across) in enumerate(stacks):
            transposed = bool((down != down[:, :1]).any())
            if transposed:
                down, across = down.T, across.T
            size = shape[:-3:-1] if transposed else shape[-2:]
            even = not (down != down[:, :1]).any() and not (across != across[:1]).any()
            if not even or (len(down), across.shape[1]) != tuple(size):
                return
            wide = list(self._runs(across[0].tolist(), -1))
            for first, weight, expert, range_ in self._runs(down[:, 0].tolist(), -2):
                if len(wide) != 1 or wide[0][1:3] != (weight, expert):
                    return
                yield weight, Block(file, index * shape[-2] + first, expert, range_, wide[0][3], transposed)

    def _runs(self, values: list[int], axis: int) -> Iterator[tuple[int, str, int, Range]]:
        """Numbers in even steps, as long as they are of one weight and expert: where they begin, of what they are."""
        first = 0
        origins = [self._origin(value, axis) for value in values]
        for last in range(1, len(values) + 1):
            step = values[first + 1] - values[first] if last - first > 1 else None
            same = last < len(values) and origins[last][:2] == origins[first][:2]
            if same and step in (None, values[last] - values[last - 1]):
                continue
            start, stop = origins[first][2], origins[last - 1][2]
            yield first, *origins[first][:2], Range(start, stop, step or 1)
            first = last

    def _origin(self, value: int, axis: int) -> tuple[str, int, int]:
        index = bisect_right(self._offsets, value) - 1
        expert, position = divmod(value - self._offsets[index], self._shapes[self._names[index]][axis])
        return self._names[index], expert, position


def _saved(model: Any, weights: Mapping[str, torch.Tensor], tensors: Mapping[str, Tensor]) -> dict[str, torch.Tensor]:
    """What transformers writes, by the names that the files have: some leave out that of the base model."""
    saved = {}
    for name, value in revert_weight_conversion(model, dict(weights)).items():
        prefix = f"{model.base_model_prefix}."
        names = (name, name.removeprefix(prefix), prefix + name)
        saved[next((each for each in names if each in tensors), name)] = value
    return saved


def _numbered(shape: tuple[int, ...], offset: int, axis: int) -> torch.Tensor:
    if len(shape) == 1:
        return torch.arange(shape[0]) + offset
    if len(shape) not in (2, 3):
        return torch.tensor(offset).expand(shape)
    numbers = torch.arange(_experts(shape) * shape[axis]) + offset
    other = -3 - axis
    sizes = [-1] * len(shape)
    sizes[other] = THIN
    return numbers.view(*shape[:-2], shape[axis]).unsqueeze(other).expand(sizes)


def _experts(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 3 else 1


def _layer(name: str) -> str:
    found = LAYER.match(name)
    return found.group() if found else ""


def _twins(model: Any) -> dict[str, tuple[str, ...]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(group) for group in names.values() if len(group) > 1 for name in group}
