"""Which tokens carry the loss by ColossalAI's own rule (`mask: Colossal`).

The rule is that of Colossal-LLaMA-2's two preparations of data, which the training of Chinese abilities was described
with. A pair of source and target is written BOS + source + target + EOS; the tokens that BOS + source has by itself
carry no loss, and where there is no source nothing is masked. A conversation is written as a system sentence and turns
of the form `Human: ` BOS content EOS and `Assistant: ` BOS content EOS, after one more BOS; what the assistant says is
learned from its BOS, the opening marker included, to its EOS. A conversation that is too long keeps as many pairs of
turns as fit, and a last turn without its pair is always cut off.

What is better here than there:
- one pair of turns that is too long is dropped; there it was kept whole, beyond the longest length
- where the tokenizer itself begins texts with BOS, a source and target got two; here it is one
- the markers are the tokenizer's BOS and EOS; there they were always `<s>` and `</s>`
- where an answer begins and ends is known from its place; there the markers were counted, and one inside a message
  swapped what was learned and what was not, as did two turns of one speaker in a row
- a lone turn is dropped; there it raised an IndexError
- the label of an example's first token is always -100, which matters only where examples are packed
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.api.contract import ExitCode
from finetune.steps.dataset.span import Span
from finetune.steps.rows.messages import THOUGHTS, MalformedRow, Message
from finetune.steps.runtime.failure import StepFailure

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions.\n\n"
)
SPEAKERS = {"user": "Human", "assistant": "Assistant"}


class Colossal:
    """Writes conversations and pairs of texts as ColossalAI does, with this tokenizer's markers."""

    def __init__(self, tokenizer: Any) -> None:
        for marker in ("bos_token", "eos_token"):
            if not getattr(tokenizer, marker):
                raise StepFailure(
                    ExitCode.BAD_CONFIGURATION,
                    "UnsupportedTokenizer",
                    f"spec.dataset.mask: Colossal writes BOS and EOS, and the model's tokenizer has no {marker}",
                    "Use spec.dataset.mask Assistant.",
                )
        self._bos, self._eos = str(tokenizer.bos_token), str(tokenizer.eos_token)
        self.opening = (int(tokenizer.bos_token_id),)
        """Ids that stand before a conversation's own."""

    def pair(self, source: str, target: str) -> tuple[str, str]:
        """The whole text of a source and its target, and the beginning of it whose tokens are masked (empty: none)."""
        return self._bos + source + target + self._eos, self._bos + source if source else ""

    def conversation(self, messages: Sequence[Message], learned_from: int) -> tuple[str, list[Span]]:
        """The whole text, and the spans in it that carry the loss."""
        text, spans = SYSTEM, []
        for index, message in enumerate(messages):
            if said := [name for name in ("tool_calls", *THOUGHTS) if name in message.more]:
                raise MalformedRow(f"turn {index + 1} has {said[0]}; mask Colossal has no place for it")
            if message.role not in SPEAKERS:
                raise MalformedRow(
                    f"turn {index + 1} is {message.role}'s; mask Colossal knows human and assistant only"
                )
            text += f"{SPEAKERS[message.role]}: "
            start = len(text)
            text += f"{self._bos}{message.text}{self._eos}" if message.text else self._bos
            if message.role == "assistant" and index >= learned_from and message.learned:
                spans.append((start, len(text)))
        return text, spans
