"""The columns of chat templates: what load-dataset's own code makes of a vendor's template.

A conversation is learned exactly when everything that the assistant says, calls and thinks is in the learned part, and
nothing of anybody else is. tests/unit/steps/golden/chat_templates.txt shows the learned texts themselves.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from finetune.steps.dataset.chat import ChatRenderer, Rendered
from finetune.steps.rows.formats import recognised
from finetune.steps.rows.messages import MalformedRow
from finetune.steps.runtime.failure import StepFailure
from tests.unit.steps.vendor_templates import CONVERSATIONS, TEMPLATES, tokenizer

COLUMNS = {"one turn": "one answer", "turns": "two answers", "tools": "tools", "thoughts": "thoughts"}
"""Each column and its conversation among CONVERSATIONS."""

READS = {"tools": ("tool_calls",), "thoughts": ("reasoning_content", "reasoning", "thinking")}
"""A template that reads none of these does not offer what the column asks for."""

OTHERS = ("Why?", "How?", "Weather?", "clear sky", "The weather of a city.")
"""What user, tool and the list of tools say."""


def template_cells(name: str) -> dict[str, str]:
    """The cells of a template among trl's."""
    template = TEMPLATES[name]
    renderer = ChatRenderer(tokenizer(template), datetime(2026, 2, 3, tzinfo=UTC))
    return {column: _cell(renderer, template, column) for column in COLUMNS}


def _cell(renderer: ChatRenderer, template: str, column: str) -> str:
    row = CONVERSATIONS[COLUMNS[column]]
    offered = column not in READS or any(name in template for name in READS[column])
    conversation: Any = recognised(list(row), "spec.dataset.sources[0]").read(row)
    try:
        rendered = renderer.render(conversation)
    except (MalformedRow, StepFailure) as refusal:
        return f"refused: {_short(str(refusal))}" if offered else "-"
    learned = [rendered.text[start:end] for start, end in rendered.learned]
    if wrong := _wrong(row, learned, rendered):
        return f"FAILS: {wrong}"
    left_out = rendered.turns.get("ThoughtLeftOut", 0)  # type: ignore[call-overload]
    return "yes" + ("; earlier thoughts are left out by the template, and counted" if left_out else "")


def _wrong(row: dict[str, Any], learned: list[str], rendered: Rendered) -> str | None:
    said = "".join(learned)
    if any(other in said for other in OTHERS):
        return "somebody else's text is learned"
    left_out = rendered.turns.get("ThoughtLeftOut", 0)  # type: ignore[call-overload]
    for message in row["messages"]:
        if message["role"] != "assistant":
            continue
        pieces = [message["content"], *(("weather", "Rome") if "tool_calls" in message else ())]
        if any(piece and piece not in said for piece in pieces):
            return f"not all is learned of {message}"
        if message.get("reasoning_content", "") not in said:
            left_out -= 1
    return None if left_out >= 0 else "a thought is neither learned nor counted"


def _short(text: str) -> str:
    line = text.partition("\n")[0]
    return line if len(line) <= 110 else f"{line[:110]}..."
