"""The spec's own Jinja templates over a row's columns, in a sandbox.

A template is the user's text, but datasets and specs travel: it can call nothing, see nothing but the row, and a column
that does not exist is an error instead of an empty answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError, meta
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune.api.contract import ExitCode
from finetune.api.spec import Template
from finetune.steps.rows.formats import Conversation, Example, Format, PlainText, Row
from finetune.steps.rows.messages import MalformedRow, Message
from finetune.steps.runtime.failure import StepFailure


def templated(template: Template, columns: Sequence[str], field: str) -> Format:
    """The format that the spec's template defines over these columns. `field` is its place in the spec."""
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, finalize=_not_null, keep_trailing_newline=True
    )
    for name in set(environment.globals) - {"range"}:
        del environment.globals[name]
    parts = {name: text for name, text in template.wire().items() if text}
    compiled, used = {}, set[str]()
    for name, text in parts.items():
        place = f"{field}.{name}"
        try:
            wanted = meta.find_undeclared_variables(environment.parse(text))
            compiled[name] = environment.from_string(text)
            used |= wanted
        except TemplateSyntaxError as error:
            raise StepFailure(
                ExitCode.BAD_CONFIGURATION,
                "InvalidTemplate",
                f"{place}, line {error.lineno}: {error.message}",
                "Mend the Jinja template.",
            ) from error
        if missing := sorted(wanted - set(columns) - {"range"}):
            raise StepFailure(
                ExitCode.BAD_CONFIGURATION,
                "MissingColumn",
                f"{place} names the column {', '.join(missing)}, which the rows do not have",
                f"The columns are: {', '.join(columns)}.",
            )

    def render(name: str, row: Row) -> str:
        try:
            return compiled[name].render(row)
        except (UndefinedError, TypeError, ValueError, ArithmeticError) as error:
            raise MalformedRow(f"{field}.{name}: {error}") from error
        except SecurityError as error:
            raise StepFailure(
                ExitCode.BAD_CONFIGURATION,
                "UnsafeTemplate",
                f"{field}.{name}: {error}",
                "A template may read columns and format them, no more.",
            ) from error
        except (TemplateError, OverflowError) as error:
            raise StepFailure(
                ExitCode.BAD_CONFIGURATION, "InvalidTemplate", f"{field}.{name}: {error}", "Mend the Jinja template."
            ) from error

    def read(row: Row) -> Example:
        if "text" in compiled:
            return PlainText(render("text", row))
        return Conversation(
            tuple(Message(role, render(role, row)) for role in ("system", "user", "assistant") if role in compiled)
        )

    return Format("Template", tuple(column for column in columns if column in used) or tuple(columns), read)


def _not_null(value: Any) -> Any:
    """A null column would be learned as the word None."""
    if value is None:
        raise UndefinedError("a column that it prints is null; write {{ column or '' }} if that is right")
    return value
