"""The chat template that a job gives its model, in the place of the model's own."""

from __future__ import annotations

import json
from pathlib import Path

from jinja2 import TemplateSyntaxError

from finetune.api.contract import ExitCode, Layout
from finetune.api.spec import ModelSource
from finetune.steps.runtime.failure import StepFailure

FIELD = "spec.model.chatTemplate"
FILE = "chat_template.jinja"
CONFIG = "tokenizer_config.json"


def chosen(model: ModelSource, layout: Layout) -> str | None:
    """The template's text; None where the model keeps its own. Raises StepFailure if it is no Jinja template."""
    wanted = model.chat_template
    if wanted is None:
        return None
    field, text = f"{FIELD}.text", wanted.text
    if wanted.config_map:
        field = f"{FIELD} (ConfigMap {wanted.config_map.name}, key {wanted.config_map.key})"
        try:
            text = layout.chat_template_file.read_text()
        except (FileNotFoundError, IsADirectoryError) as error:
            raise StepFailure(
                ExitCode.NO_INPUT,
                "ChatTemplateNotFound",
                f"{field}: there is no file {layout.chat_template_file}",
                f"Check the names in {FIELD}.",
            ) from error
        except UnicodeDecodeError as error:
            raise _invalid(field, str(error)) from error
    if not (text or "").strip():
        raise _invalid(field, "it is empty")
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(text)
    except TemplateSyntaxError as error:
        raise _invalid(field, f"line {error.lineno}: {error.message}") from error
    return text


def put(folder: Path, template: str) -> None:
    """Make it the only chat template of the model in the folder, in every file that may hold one."""
    for path in (folder / FILE, folder / "chat_template.json", *folder.glob("additional_chat_templates/*")):
        path.unlink(missing_ok=True)  # never written again: a cache or a claim may share it
    (folder / FILE).write_text(template)
    path = folder / CONFIG
    config = json.loads(path.read_text()) if path.is_file() else {}
    if config.pop("chat_template", None) is not None:
        path.unlink()
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _invalid(field: str, problem: str) -> StepFailure:
    return StepFailure(
        ExitCode.BAD_CONFIGURATION,
        "InvalidChatTemplate",
        f"{field}: {problem}",
        "Give a Jinja template over messages, tools and add_generation_prompt, as in a model's chat_template.jinja.",
    )
