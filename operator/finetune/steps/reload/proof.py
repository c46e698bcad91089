"""What the step `reload` proved about a model with new tokens, and what it did not prove."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic.alias_generators import to_camel

from finetune.api.status import TokenProbability
from finetune.steps.runtime.disk import in_words


@dataclass(frozen=True)
class Gap:
    """Something that was not proven: in a few words for the status, and why it was not."""

    what: str
    why: str


@dataclass
class Proof:
    """What was proven, in the order in which it was; None where there was nothing to compare or no memory to run it."""

    tokens: int
    """New tokens, each of which is one id, comes back as its text and has a row."""

    tensors: int
    """Tensors of the files, loaded strictly; or compared with the architecture's by name and shape only."""

    family: str | None = None
    """The model_type."""

    not_loaded: Sequence[str] = ()
    """Tensors of the files that transformers has no place for in the model that it loads."""

    was_run: bool = False
    """Whether the model was loaded and gave finite logits."""

    equal_bytes: int | None = None
    """Bytes of the base model's tensors, all of them found unchanged."""

    equal_states: int | None = None
    """Hidden states of old text (one for each layer, and the embedding) that equal the base model's bit for bit."""

    moved: float | None = None
    """How far logits of old tokens moved, relative to the largest: another size of product sums in another order."""

    message: str | None = None
    """The user's message after which the probabilities are."""

    probabilities: Sequence[TokenProbability] = ()

    not_proven: Sequence[Gap] = ()

    def sentence(self) -> str:
        """The proof in one line, and in a few words what it lacks."""
        words = [f"{self.tokens:,} new tokens round-trip", "tokenizer.json and transformers give the same ids"]
        words.append("loads strictly, finite logits" if self.was_run else f"{self.tensors:,} tensors in their shapes")
        if self.equal_bytes is not None:
            words.append(f"{in_words(self.equal_bytes)} of old weights unchanged")
        if self.equal_states is not None:
            words.append(f"{self.equal_states} hidden states of old text bit-equal")
        proven = ", ".join(words)
        if not self.not_proven:
            return proven
        return f"{proven}; not proven: {', '.join(gap.what for gap in self.not_proven)}"

    def write(self, path: Path) -> None:
        """Write the whole proof as JSON."""
        parts = vars(self) | {
            "probabilities": [item.wire() for item in self.probabilities],
            "not_proven": [asdict(gap) for gap in self.not_proven],
        }
        document = {to_camel(name): value for name, value in parts.items()}
        path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
