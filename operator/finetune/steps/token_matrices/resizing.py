"""Which tensors of a checkpoint have one row for each token, as transformers itself would resize them.

The model is built without memory for its weights and resized: what changes its shape is what depends on the
vocabulary's size. The names are then translated into those of the files (`weight_names`). Only this answer comes from
transformers; the edit is the same as for any other model, and so is its result.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from finetune.steps.model_files.checkpoint import Checkpoint
from finetune.steps.model_files.config import read_config
from finetune.steps.token_matrices.matrices import Matrices, NotEditable, UnknownArchitecture, check_shapes, copies_of
from finetune.steps.weight_names.correspondence import correspondence

TRANSFORMERS: Any = transformers
"""Its loaders are typed for other uses than these."""


def matrices_by_resizing(checkpoint: Checkpoint, unproven: UnknownArchitecture) -> Matrices:
    """The matrices that transformers resizes in this checkpoint; `unproven` says why the table could not tell.

    Raises NotEditable when transformers cannot build or resize the model, or when more than embedding, head and the
    head's bias depend on the vocabulary's size.
    """
    try:
        config = TRANSFORMERS.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        with torch.device("meta"):
            model = TRANSFORMERS.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            rows = int(model.get_input_embeddings().weight.shape[0])
            before = _shapes(model)
            model.resize_token_embeddings(rows + 1, mean_resizing=False)
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0][:200]
        raise NotEditable(f"{unproven}; transformers cannot resize it either ({first_line})") from error
    if rows != read_config(checkpoint.folder).get("vocab_size"):
        raise NotEditable(f"{unproven}; transformers' embedding has {rows} rows, config.json's vocab_size differs")
    changed = {name: shape for name, shape in _shapes(model).items() if before.get(name) != shape}
    expected: dict[str, tuple[int, ...]] = {}
    made = correspondence(checkpoint.folder).made
    for names in _same_parameter(model, changed, rows):
        present = [name for name, weights in made.items() if not set(names).isdisjoint(weights)]
        if not present:
            raise NotEditable(f"{unproven}; transformers resizes {names[0]}, which the files do not have")
        expected |= dict.fromkeys(present, (rows, *changed[names[0]][1:]))
    found = check_shapes(checkpoint.tensors, expected)
    return Matrices((*found, *copies_of(found, checkpoint.tensors)), rows)


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def _same_parameter(model: Any, changed: dict[str, tuple[int, ...]], rows: int) -> list[list[str]]:
    """The names of what changed; those of one parameter (a tied head) together."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    ours = {id(parameter) for module in modules if module is not None for parameter in module.parameters()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, shape in changed.items():
        if name not in parameters or id(parameters[name]) not in ours:
            raise NotEditable(f"{name} also depends on the vocabulary's size: no row of it can be made for a new token")
        if shape[0] != rows + 1:
            raise NotEditable(f"{name} has no row for each token: transformers makes {list(shape)} of it")
        names.setdefault(id(parameters[name]), []).append(name)
    return list(names.values())
