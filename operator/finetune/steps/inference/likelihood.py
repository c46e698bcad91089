"""How likely a text is as the next thing a model says: what a new token starts from, and what it takes the place of.

Works on any causal model of transformers, whatever its weights are kept in; computed in f32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.steps.inference.single_precision import in_single_precision


@dataclass(frozen=True)
class Prompts:
    """A user's message as ids of shape (1, length): as it stands, and with the generation prompt after it.

    `generation` is None for a tokenizer without a chat template.
    """

    plain: Any
    generation: Any | None

    @classmethod
    def of(cls, tokenizer: Any, message: str) -> Prompts:
        """The message as a user's turn of the chat template, or as plain text where there is none."""
        if not tokenizer.chat_template:
            return cls(tokenizer(message, return_tensors="pt")["input_ids"], None)
        turns = [{"role": "user", "content": message}]
        plain, generation = (
            tokenizer.apply_chat_template(
                turns, add_generation_prompt=prompt, return_tensors="pt", return_dict=True, tokenize=True
            )["input_ids"]
            for prompt in (False, True)
        )
        return cls(plain, generation)


class Continuation:
    """What a model expects after a prompt. Call it under `torch.inference_mode()`."""

    def __init__(self, model: Any, prompt: Any) -> None:
        self._model = model
        self._prompt = prompt
        self._next: list[float] = self._distributions(prompt.tolist()[0], 1)[0].tolist()

    def probability(self, ids: Sequence[int]) -> float | None:
        """That exactly these ids come next: the product along the chain. None where the model gives no number."""
        chance = self._next[ids[0]]
        if len(ids) > 1:
            steps = self._distributions([*self._prompt.tolist()[0], *ids[:-1]], len(ids) - 1)
            for step, id_ in zip(steps, ids[1:], strict=True):
                chance *= float(step[id_])
        return None if math.isnan(chance) else float(f"{chance:.4g}")

    def _distributions(self, ids: Sequence[int], last: int) -> Any:
        """Probabilities of shape (last, rows), in float64, after each of the last ids."""
        with in_single_precision(self._model):
            logits = self._model(input_ids=self._prompt.new_tensor([ids]), use_cache=False).logits
        return logits[0, -last:].double().softmax(-1)
