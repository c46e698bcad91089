"""Everything that a row says is learned, used, named as unused, or refused with a remedy that works."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

from finetune.api.contract import ExitCode
from finetune.api.status import DatasetStatus
from finetune.steps.dataset.step import run
from finetune.steps.runtime.failure import StepFailure
from tests.unit.steps.flow import Workshop

PREFERENCE = {"training": {"maxSteps": 2, "objective": "Preference"}}
CALLS = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
LAST = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "By waves."}]


def vendor(name: str) -> str:
    """A template of a vendor, as trl ships it."""
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text()


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop.at(tmp_path)


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def load(
    workshop: Workshop, row: dict[str, Any] | list[Any], template: str | None = None, **spec: Any
) -> tuple[list[list[str]], dict[str, Any]]:
    """The learned texts of each example, and the status."""
    workshop.write("rows.jsonl", row if isinstance(row, list) else [row])
    if template:
        (workshop.layout.model / "chat_template.jinja").write_text(template)
    result = run(workshop.job(**spec), workshop.layout).result
    assert result is not None
    DatasetStatus.model_validate(result)
    tokenizer = AutoTokenizer.from_pretrained(workshop.layout.model)
    learned = []
    for example in datasets.load_from_disk(str(workshop.layout.dataset / "train")):
        runs: list[list[int]] = [[]]
        for label in example["labels"]:
            if label == -100:
                runs.append([])
            else:
                runs[-1].append(label)
        learned.append([tokenizer.decode(run) for run in runs if run])
    return learned, result


def refusal(workshop: Workshop, row: dict[str, Any], template: str | None = None, **spec: Any) -> StepFailure:
    with pytest.raises(StepFailure) as failure:
        load(workshop, row, template, **spec)
    return failure.value


def text(workshop: Workshop) -> str:
    tokenizer = AutoTokenizer.from_pretrained(workshop.layout.model)
    rows = datasets.load_from_disk(str(workshop.layout.dataset / "train"))
    return str(tokenizer.decode(rows[0]["input_ids"]))


@pytest.mark.parametrize(
    "first",
    ["Because air.\n", " Because air.", "<think>\nhm\n</think>\n\nBecause air."],
    ids=["after", "before", "thought"],
)
def test_an_earlier_answer_is_learned_also_where_the_template_leaves_out_its_thought(
    workshop: Workshop, first: str
) -> None:
    row = {"messages": [said("user", "Why?"), said("assistant", first), *LAST]}
    ((earlier, _),), result = load(workshop, row, vendor("qwen3"))
    assert earlier.strip().removesuffix("<|im_end|>").strip() == "Because air."
    assert result.get("turnsBy") == ({"ThoughtLeftOut": 1} if "think" in first else None)


def test_calls_and_what_functions_answer_are_in_the_text_and_the_calls_are_learned(workshop: Workshop) -> None:
    row = {
        "messages": [
            said("user", "Weather?"),
            said("assistant", None, tool_calls=CALLS),
            said("tool", "clear"),
            said("assistant", "Clear."),
        ],
        "tools": TOOLS,
    }
    ((call, answer),), _ = load(workshop, row, vendor("qwen2_5"))
    assert call == '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
    assert answer == "Clear.<|im_end|>"
    assert "<tools>" in text(workshop) and "<tool_response>\nclear\n</tool_response>" in text(workshop)


@pytest.mark.parametrize(
    "messages",
    [
        [
            said("assistant", "", function_call={"name": "weather", "arguments": '{"city": "Rome"}'}),
            said("function", "clear"),
        ],
        [said("assistant", None, tool_calls=json.dumps(CALLS)), said("ipython", "clear")],
        [
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
            {"from": "observation", "value": "clear"},
        ],
    ],
    ids=["function_call", "json", "sharegpt"],
)
def test_calls_are_the_same_in_every_spelling(workshop: Workshop, messages: list[Any]) -> None:
    row = {"messages": [said("user", "Weather?"), *messages, said("assistant", "Clear.")], "tools": json.dumps(TOOLS)}
    (learned,), _ = load(workshop, row, vendor("qwen2_5"))
    assert learned[0] == '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'


def test_arguments_that_differ_from_row_to_row_are_not_filled_with_nulls(workshop: Workshop) -> None:
    calls = [{"city": "Rome"}, {"day": "Monday", "hour": 5}]
    rows = [
        {
            "messages": [
                said("user", "Weather?"),
                said(
                    "assistant", None, tool_calls=[{"type": "function", "function": {"name": "w", "arguments": call}}]
                ),
            ]
        }
        for call in calls
    ]
    learned, _ = load(workshop, rows, vendor("qwen2_5"))
    found = {runs[0].split('"arguments": ')[1].split("}\n")[0] for runs in learned}
    assert {json.dumps(call) for call in calls} == found


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_is_learned_by_any_of_its_names(workshop: Workshop, field: str) -> None:
    row = {"messages": [said("user", "Why?"), said("assistant", "Air.", **{field: "long thought"})]}
    assert load(workshop, row, vendor("qwen3"))[0] == [["<think>\nlong thought\n</think>\n\nAir.<|im_end|>"]]


def test_what_the_template_would_leave_out_is_refused_and_the_remedy_works(workshop: Workshop) -> None:
    row = {"messages": [said("user", "Why?"), said("assistant", "Air.", reasoning_content="long thought")]}
    failure = refusal(workshop, row)
    assert (failure.code, failure.error.reason) == (ExitCode.BAD_DATA, "UnsupportedChatTemplate")
    assert "row 1 of train: turn 2: the chat template leaves out what the assistant thinks" in failure.error.message
    assert "spec.model.chatTemplate" in failure.error.hint
    assert load(workshop, row, vendor("qwen3_training"))[0] == [["<think>\nlong thought\n</think>\n\nAir.<|im_end|>"]]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}])
def test_a_turn_that_is_marked_as_not_to_be_learned_carries_no_loss(workshop: Workshop, mark: dict[str, Any]) -> None:
    row = {"messages": [said("user", "Why?"), said("assistant", "WRONG", **mark), *LAST]}
    learned, result = load(workshop, row)
    assert learned == [["By waves.<|im_end|>"]]
    assert result["turnsBy"] == {"MarkedNotToLearn": 1}


def test_a_mark_that_pretraining_could_not_heed_is_refused(workshop: Workshop) -> None:
    row = {"messages": [said("user", "Why?"), said("assistant", "WRONG", weight=0)]}
    failure = refusal(workshop, row, training={"maxSteps": 2, "objective": "Pretraining"})
    assert "turn 2 is marked as not to be learned" in failure.error.message


def test_a_weight_between_is_refused(workshop: Workshop) -> None:
    failure = refusal(workshop, {"messages": [said("user", "Why?"), said("assistant", "Air.", weight=0.5)]})
    assert "messages[1].weight is 0.5" in failure.error.message


def test_contents_in_parts_are_one_text(workshop: Workshop) -> None:
    parts = [{"type": "text", "text": "Because"}, {"type": "text", "text": "air."}]
    row = {"messages": [said("user", [{"type": "text", "text": "Why?"}]), said("assistant", parts), *LAST]}
    assert load(workshop, row)[0] == [["Because\nair.<|im_end|>", "By waves.<|im_end|>"]]
    picture = {"messages": [said("user", [{"type": "image"}]), said("assistant", "A cat.")]}
    assert "messages[0].content[0] is of type image" in refusal(workshop, picture).error.message


def test_a_template_that_wants_parts_gets_parts(workshop: Workshop) -> None:
    row = {"messages": [said("user", "Why?"), said("assistant", "Air.")]}
    assert load(workshop, row, vendor("smolvlm"))[0] == [[" Air.<end_of_utterance>"]]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": LAST, "system": "You help."}, "<|im_start|>system\nYou help.<|im_end|>"),
        ({"instruction": "How?", "output": "So.", "history": [["Why?", "Air."]]}, "assistant\nAir.<|im_end|>"),
        ({"instruction": "How?", "output": "So.", "system": "You help."}, "<|im_start|>system\nYou help.<|im_end|>"),
    ],
    ids=["sharegpt's system", "alpaca's history", "alpaca's system"],
)
def test_columns_beside_a_conversation_are_in_it(workshop: Workshop, row: dict[str, Any], expected: str) -> None:
    load(workshop, row)
    assert expected in text(workshop)


@pytest.mark.parametrize("column", ["system", "history", "tools", "reasoning_content", "thinking", "tool_calls"])
def test_a_column_that_matters_and_has_no_place_is_refused_and_a_template_helps(
    workshop: Workshop, column: str
) -> None:
    row = {"source": "Why?", "target": "Air.", column: "something"}
    failure = refusal(workshop, row)
    assert f"column {column} holds something" in failure.error.message
    assert "template" in failure.error.hint
    load(workshop, row | {column: ""})
    source = {"template": {"user": "{{ source }} {{ " + column + " }}", "assistant": "{{ target }}"}}
    assert load(workshop, row, source=source)[0] == [["Air.<|im_end|>"]]


def test_columns_and_fields_of_which_nothing_is_made_are_named(workshop: Workshop) -> None:
    row = {"id": 7, "url": "a", "messages": [said("user", "Why?", name="me"), said("assistant", "Air.", rank=1)]}
    _, result = load(workshop, row)
    assert result["unusedFields"] == ["sources[0]: id, url, messages[].name, messages[].rank"]


def test_functions_that_the_template_has_no_place_for_are_named(workshop: Workshop) -> None:
    row = {"messages": [said("user", "Why?"), said("assistant", "Air.")], "tools": TOOLS}
    assert load(workshop, row)[1]["unusedFields"] == ["sources[0]: tools"]
    _, result = load(workshop, row, vendor("qwen2_5"))
    assert "unusedFields" not in result


def test_nothing_before_the_first_answer_is_learned(workshop: Workshop) -> None:
    row = {"messages": [said("assistant", "Welcome."), said("user", "Who?"), said("assistant", "A wizard.")]}
    template = (workshop.layout.model / "chat_template.jinja").read_text()
    for each in (template, "<|im_start|>system\nBe kind.<|im_end|>\n" + template):
        assert load(workshop, row, each)[0] == [["Welcome.<|im_end|>", "A wizard.<|im_end|>"]]


@pytest.mark.parametrize(
    ("name", "learned"),
    [("deepseek_r1_distill", "Air."), ("qwen3_5_think", "\n</think>\n\nAir."), ("nemotron_3_nano", "</think>Air.")],
)
def test_a_generation_prompt_that_opens_a_thought_is_no_obstacle(workshop: Workshop, name: str, learned: str) -> None:
    row = {"messages": [said("user", "Why?"), said("assistant", "Air.")]}
    (((found,),), _) = load(workshop, row, vendor(name))
    assert found.startswith(learned)
    assert found.removeprefix(learned) in ("<|im_end|>", "<｜end▁of▁sentence｜>")


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"system": "You help.", "question": "Capital?"}, "user\nCapital?<|im_end|>"),
        ({"instruction": "Capital?", "input": "Of Italy."}, "user\nCapital?\n\nOf Italy.<|im_end|>"),
        ({"prompt": "Capital?", "system": "You help."}, "system\nYou help.<|im_end|>"),
    ],
    ids=["question", "instruction", "system"],
)
def test_a_pair_has_its_prompt_by_any_name(workshop: Workshop, row: dict[str, Any], prompt: str) -> None:
    pair = {"chosen": "Rome it is.", "rejected": "Milan it is."}
    assert load(workshop, row | pair, **PREFERENCE)[0] == [["Rome it is.<|im_end|>", "Milan it is.<|im_end|>"]]
    assert prompt in text(workshop)


def test_a_pair_of_messages_may_have_a_prompt_that_is_text_and_may_be_json(workshop: Workshop) -> None:
    pair = {which: [said("assistant", city)] for which, city in (("chosen", "Rome"), ("rejected", "Milan"))}
    for row in (pair, {which: json.dumps(messages) for which, messages in pair.items()}):
        learned, _ = load(workshop, row | {"prompt": "Capital?"}, **PREFERENCE)
        assert learned == [["Rome<|im_end|>", "Milan<|im_end|>"]]
        assert "user\nCapital?<|im_end|>" in text(workshop)


@pytest.mark.parametrize(
    "source", [{"template": {"user": "{{ prompt }}", "assistant": "{{ chosen }}"}}, {"format": "Text"}]
)
def test_a_template_or_format_that_pairs_have_no_use_for_is_refused(workshop: Workshop, source: dict[str, Any]) -> None:
    row = {"prompt": "Capital?", "chosen": "Rome", "rejected": "Milan"}
    failure = refusal(workshop, row, source=source, **PREFERENCE)
    assert (failure.error.reason, failure.code) == ("NotForPairs", ExitCode.BAD_CONFIGURATION)
    load(workshop, row, **PREFERENCE)


def test_a_beginning_that_the_template_would_spoil_is_not_what_is_left_of_a_long_conversation(
    workshop: Workshop,
) -> None:
    thought = "<think>\nhm\n</think>\n\nBecause air."
    row = {"messages": [said("user", "Why?"), said("assistant", thought), said("user", "How? " * 99), *LAST[1:]]}
    rows = [{"messages": LAST}, row]
    learned, result = load(workshop, rows, vendor("deepseek_r1_distill"), dataset={"maxLength": 64})
    assert len(learned) == 1
    assert result["droppedBy"] == {"TooLong": 1}


@pytest.mark.parametrize("text", ["Air \ue0f0\ue0f1.", "", "Air."])
def test_any_text_can_be_found_beside_further_fields(workshop: Workshop, text: str) -> None:
    row = {"messages": [said("user", "Why?"), said("assistant", text, role_name="role"), *LAST]}
    template = (workshop.layout.model / "chat_template.jinja").read_text().replace("message['role']", "message.role")
    learned, _ = load(workshop, row, template + "{# role_name #}")
    assert learned == [[f"{text}<|im_end|>", "By waves.<|im_end|>"]]


def test_contents_that_are_texts_here_and_parts_there_are_read_row_by_row(workshop: Workshop) -> None:
    rows = [
        {"messages": [said("user", "Why?"), said("assistant", [{"type": "text", "text": "Air."}])]},
        {"messages": [said("user", "Why?"), said("assistant", "Air.")], "tools": None},
    ]
    assert load(workshop, rows)[0] == [["Air.<|im_end|>"]] * 2
