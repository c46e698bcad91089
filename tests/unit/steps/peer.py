"""The careful transformers way to add tokens, which ours is compared with: load, resize, set the rows, save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.steps.tokens.initialise import OldRows, VocabularyMean, initial_rows

WORDS = ["<think>", "myocardial infarction", "心筋梗塞", "<average>"]
TOKENS: dict[str, Any] = {
    "add": [
        {"content": WORDS[0], "init": {"copyOf": "<|im_start|>"}},
        {"content": WORDS[1]},
        {"content": WORDS[2], "init": {"meanOf": "Pieces"}},
        {"content": WORDS[3], "init": {"meanOf": "Vocabulary"}},
    ]
}
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return found


def transformers_way(folder: Path, target: Path, multiple: int = 64) -> None:
    """Add TOKENS to the model in `folder`. The mean of the vocabulary is ours, means of pieces are torch's."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    old_rows, length = model.get_input_embeddings().weight.shape[0], len(tokenizer)
    source = tokenizer.convert_tokens_to_ids("<|im_start|>")
    pieces = [tokenizer.encode(text, add_special_tokens=False) for text in (f" {WORDS[1]}", WORDS[2])]
    tokenizer.add_tokens(WORDS)
    first = tokenizer.convert_tokens_to_ids(WORDS[0])
    rows = max(old_rows, -(-len(tokenizer) // multiple) * multiple)
    model.resize_token_embeddings(rows, mean_resizing=False)
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    with torch.no_grad():
        for weight in {id(weight): weight for module in modules for weight in module.parameters()}.values():
            old = weight[:length].clone()

            def read(start: int, end: int, old: torch.Tensor = old) -> bytes:
                return old[start:end].contiguous().view(torch.uint8).numpy().tobytes()

            columns = old.shape[1] if old.ndim == 2 else 1
            average = initial_rows([VocabularyMean()], OldRows(read, DTYPES[weight.dtype], length, columns))
            average = torch.frombuffer(bytearray(average), dtype=weight.dtype).reshape(old.shape[1:])
            weight[first] = old[source]
            for index, ids in enumerate(pieces, start=1):
                weight[first + index] = old[ids].double().mean(0).to(weight.dtype)
            weight[first + 3] = average
            weight[max(old_rows, first + 4) :] = average
    model.save_pretrained(target, max_shard_size="100KB")
    tokenizer.save_pretrained(target)
