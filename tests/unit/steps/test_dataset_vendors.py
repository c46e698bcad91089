"""The chat templates of vendors, as trl ships them: what of each kind of conversation is learned.

`golden/chat_templates.txt` is the table, to be read by people. FINETUNE_WRITE_GOLDEN=1 writes it anew.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.steps.dataset.chat import ChatRenderer, Rendered
from finetune.steps.rows.formats import Conversation, recognised
from finetune.steps.rows.messages import MalformedRow, Message
from tests.unit.steps.vendor_templates import CONVERSATIONS, TEMPLATES, tokenizer

GOLDEN = Path(__file__).parent / "golden" / "chat_templates.txt"


def learned(renderer: ChatRenderer, row: dict[str, Any]) -> str:
    """The learned texts, or the refusal, in a line."""
    conversation = recognised(list(row), "spec.dataset.sources[0]").read(row)
    try:
        rendered = renderer.render(conversation)
    except MalformedRow as refusal:
        return f"refused: {refusal}"[:160]
    texts = [rendered.text[start:end] for start, end in rendered.learned]
    told = ", ".join(f"{count} {reason}" for reason, count in sorted(rendered.turns.items()))
    return f"{texts!r}" + (f"  ({told})" if told else "")


def table() -> dict[str, str]:
    """A paragraph for each template."""
    paragraphs = {}
    for name, template in TEMPLATES.items():
        renderer = ChatRenderer(tokenizer(template), datetime(2026, 2, 3, tzinfo=UTC))
        lines = [f"  {kind:18} {learned(renderer, row)}" for kind, row in CONVERSATIONS.items()]
        paragraphs[name] = "\n".join([name, *lines])
    return paragraphs


def test_what_is_learned_with_every_vendors_template_is_what_people_have_read() -> None:
    found = table()
    if os.environ.get("FINETUNE_WRITE_GOLDEN"):
        GOLDEN.write_text("\n\n".join(found.values()) + "\n")
    expected = dict(zip(found, GOLDEN.read_text().rstrip("\n").split("\n\n"), strict=True))
    assert found == expected


PIECES = ["a", "Why", " ", "\n", ".", "<|im_end|>", "<think>", "é", "user", "Air"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)


@given(name=st.sampled_from(sorted(TEMPLATES)), contents=st.lists(TEXTS, min_size=2, max_size=6))
@settings(max_examples=250, deadline=None)
def test_one_rendering_and_the_comparison_of_several_find_the_same_places(name: str, contents: list[str]) -> None:
    renderer = renderers()[name]
    contents = contents[: len(contents) // 2 * 2]
    turns = [Message(("user", "assistant")[place % 2], text) for place, text in enumerate(contents)]
    conversation = Conversation(tuple(turns))
    quick = outcome(renderer, conversation)
    with patch.object(type(renderer._plain), "_as_framed", return_value=None):
        assert outcome(renderer, conversation) == quick


def outcome(renderer: ChatRenderer, conversation: Conversation) -> Rendered | str:
    try:
        return renderer.render(conversation)
    except MalformedRow as error:
        return str(error)


@cache
def renderers() -> dict[str, ChatRenderer]:
    created = datetime(2026, 2, 3, tzinfo=UTC)
    return {name: ChatRenderer(tokenizer(template), created) for name, template in TEMPLATES.items()}


PARTS_ONLY = ("idefics3", "smolvlm", "llava_next")
"""Templates that show a text in parts only, and nothing or an error where it is whole."""


@pytest.mark.parametrize("name", [name for name in TEMPLATES if not name.startswith(PARTS_ONLY)])
def test_the_text_is_what_transformers_makes_of_the_same_rows(name: str) -> None:
    renderer = renderers()[name]
    for kind, row in CONVERSATIONS.items():
        try:
            text = renderer.render(recognised(list(row), "spec.dataset.sources[0]").read(row)).text
        except MalformedRow:
            continue
        if name.startswith("deepseek") and "tools" in row:
            continue  # transformers leaves out `content: null`, which these templates ask for
        expected = renderer._tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)
        ended = ("<|user|>", "<|observation|>") if name == "glm4moe" else ("",)  # it writes no end of the last turn
        assert text in [expected + end for end in ended], kind
