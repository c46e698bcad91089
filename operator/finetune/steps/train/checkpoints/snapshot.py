"""The state of a run between two steps, copied so that training goes on while it is written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

Place = tuple[int, torch.dtype, torch.Size, tuple[int, ...]]


def size_of(state: Any) -> int:
    """Bytes of all tensors in nested mappings and lists; tensors that are one (tied weights) count once."""
    return sum({_place(tensor): tensor.numel() * tensor.element_size() for tensor in _tensors(state)}.values())


class Snapshot:
    """Copies of a state, one after the other, in the same memory: the kernel's work for fresh pages takes longer than
    the copying. A copy is good until the next is taken."""

    def __init__(self) -> None:
        self._memory: dict[Place, torch.Tensor] = {}

    @property
    def size(self) -> int:
        """Bytes that it holds already."""
        return size_of(list(self._memory.values()))

    def of(self, state: Any) -> Any:
        """The same state in this machine's memory; what is one tensor (tied weights) is one in the copy too."""
        former, self._memory = self._memory, {}
        return self._copied(state, former)

    def _copied(self, state: Any, former: dict[Place, torch.Tensor]) -> Any:
        if isinstance(state, torch.Tensor):
            place = _place(state)
            if place not in self._memory:
                memory = former.pop(place, None)
                source = state.detach()
                self._memory[place] = source.to("cpu", copy=True) if memory is None else memory.copy_(source)
            return self._memory[place]
        if isinstance(state, dict):
            return {key: self._copied(value, former) for key, value in state.items()}
        if isinstance(state, (list, tuple)):
            return type(state)(self._copied(value, former) for value in state)
        return state


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from _tensors(value)


def _place(tensor: torch.Tensor) -> Place:
    """What tells one tensor from another: an empty one lies nowhere."""
    return tensor.data_ptr() or id(tensor), tensor.dtype, tensor.shape, tensor.stride()
