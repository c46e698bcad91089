"""spec.model.chatTemplate: from the download on it is the model's only chat template, and it is published with it."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from finetune.api.contract import ExitCode, StepJob
from finetune.steps.dataset.step import run as load_dataset
from finetune.steps.download.step import run as download
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.workspace.staging import published
from tests.models import tiny
from tests.unit.steps.flow import Workshop

TEMPLATE = (files("trl") / "chat_templates" / "qwen3_training.jinja").read_text()
THOUGHT = [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Air.", "reasoning_content": "long thought"},
]


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    workshop = Workshop(tmp_path)
    tiny(workshop.layout.claims / "data" / "model")
    return workshop


def job(workshop: Workshop, template: dict[str, Any] | None) -> StepJob:
    model = {"uri": "pvc://data/model"} | ({"chatTemplate": template} if template else {})
    return workshop.job(model=model)


def test_the_jobs_template_is_used_and_published_and_mends_what_the_models_own_leaves_out(workshop: Workshop) -> None:
    workshop.write("rows.jsonl", [{"messages": THOUGHT}])
    download(job(workshop, None), workshop.layout)
    with pytest.raises(StepFailure, match="leaves out what the assistant thinks") as failure:
        load_dataset(job(workshop, None), workshop.layout)
    assert "spec.model.chatTemplate" in failure.value.error.hint

    from finetune.steps.train.reporting.result import write_beside_weights

    with_template = job(workshop, {"text": TEMPLATE})
    download(with_template, workshop.layout)
    result = load_dataset(with_template, workshop.layout).result
    assert result is not None and result["examples"] == 1
    trained = workshop.folder / "trained"
    trained.mkdir()
    write_beside_weights(workshop.layout.model, trained)
    assert AutoTokenizer.from_pretrained(trained).chat_template == TEMPLATE
    own = (workshop.layout.claims / "data" / "model" / "chat_template.jinja").read_text()
    assert own != TEMPLATE


def test_it_is_the_only_template_wherever_the_model_keeps_its_own(workshop: Workshop) -> None:
    source = workshop.layout.claims / "data" / "model"
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ 'old' }}"}))
    (source / "chat_template.json").write_text('{"chat_template": "old"}')
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("old")
    download(job(workshop, {"text": TEMPLATE}), workshop.layout)
    assert AutoTokenizer.from_pretrained(workshop.layout.model).chat_template == TEMPLATE
    assert "old" not in (workshop.layout.model / "tokenizer_config.json").read_text()
    assert "old" in (source / "tokenizer_config.json").read_text()


def test_it_may_come_from_a_config_map_and_a_change_is_noticed(workshop: Workshop) -> None:
    layout = workshop.layout
    layout.chat_template_file.write_text(TEMPLATE)
    wanted = job(workshop, {"configMap": {"name": "templates", "key": "qwen"}})
    download(wanted, layout)
    assert (layout.model / "chat_template.jinja").read_text() == TEMPLATE
    layout.chat_template_file.write_text(TEMPLATE + "{# new #}")
    download(wanted, layout)
    assert (layout.model / "chat_template.jinja").read_text().endswith("{# new #}")
    assert published(layout.model) is not None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{% if %}", "chatTemplate.text: line 1"),
        ("{% for m in messages %}", "chatTemplate.text: line 1"),
        (" ", "empty"),
    ],
)
def test_what_is_no_template_is_refused(workshop: Workshop, text: str, words: str) -> None:
    with pytest.raises(StepFailure) as failure:
        download(job(workshop, {"text": text}), workshop.layout)
    assert (failure.value.code, failure.value.error.reason) == (ExitCode.BAD_CONFIGURATION, "InvalidChatTemplate")
    assert words in failure.value.error.message


def test_a_config_map_without_the_key_is_refused(workshop: Workshop) -> None:
    with pytest.raises(StepFailure) as failure:
        download(job(workshop, {"configMap": {"name": "templates", "key": "qwen"}}), workshop.layout)
    assert failure.value.error.reason == "ChatTemplateNotFound"
    assert "ConfigMap templates, key qwen" in failure.value.error.message
