"""The chat templates of vendors, as trl ships them, tokenizers that know their markers, and conversations for them."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATES = {
    path.name.removesuffix(".jinja"): path.read_text()
    for path in sorted((files("trl") / "chat_templates").iterdir(), key=lambda path: path.name)
    if path.name.endswith(".jinja")
}
NOT_SPECIAL = re.compile(r"</?(think|tool_call|tools|tool_response|arg_key|arg_value|function|parameter|IMPORTANT)\b")
"""Markers that the vendors' tokenizers have, if at all, as tokens that are not special."""


def tokenizer(template: str) -> Any:
    """A tokenizer that knows the special tokens of a template."""
    markers = re.findall(
        r"<[|｜][^<>\n'\"{}]*?[|｜]>|<[a-z_]+_of_[a-z_]+>|<\|?[a-z_]+\|?>|</?s>|\[/?INST\]|\[gMASK\]", template
    )
    special = sorted({marker for marker in markers if not NOT_SPECIAL.match(marker)} - {"<image>"})
    eos = next((name for name in ENDS if name in special), "</s>")
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, unk_token="<unk>", chat_template=template
    )


ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<｜end▁of▁sentence｜>",
)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Its name."}}},
    },
}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one answer": {"messages": [user("Why?"), assistant("Air.")]},
    "two answers": {"messages": [user("Why?"), assistant("Air."), user("How?"), assistant("Waves.")]},
    "system": {"messages": [{"role": "system", "content": "Be kind."}, user("Why?"), assistant("Air.")]},
    "white space": {"messages": [user(" Why?\n"), assistant(" Air.\n"), user("How?"), assistant("\n Waves. ")]},
    "thoughts": {
        "messages": [
            user("Why?"),
            assistant("Air.", reasoning_content="first thought"),
            user("How?"),
            assistant("Waves.", reasoning_content="second thought"),
        ]
    },
    "thought in content": {"messages": [user("Why?"), assistant("<think>\na thought\n</think>\n\nAir.")]},
    "tools": {
        "messages": [
            user("Weather?"),
            assistant(None, tool_calls=[CALL]),
            {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "clear sky"},
            assistant("It is clear."),
        ],
        "tools": [TOOL],
    },
    "call at the end": {"messages": [user("Weather?"), assistant(None, tool_calls=[CALL])], "tools": [TOOL]},
    "assistant first": {"messages": [assistant("Welcome."), user("Who?"), assistant("A wizard.")]},
    "two in a row": {"messages": [user("Why?"), assistant("Air."), assistant("And waves.")]},
}
