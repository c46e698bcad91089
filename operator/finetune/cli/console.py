"""The terminal: results go to standard output, everything else to standard error."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console
from rich.text import Text

from finetune.api.contract import ExitCode
from finetune.cli.check import InvalidJob
from finetune.cli.document import UnreadableFile

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def fail(message: str, code: int = 1, hint: str = "") -> NoReturn:
    """Say what is wrong and what to do, and end."""
    err.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    if hint:
        err.print(Text.assemble(("hint: ", "bold"), hint), soft_wrap=True)
    raise typer.Exit(int(code))


def refuse(error: InvalidJob | UnreadableFile) -> NoReturn:
    """Show what is wrong with a file, one line for each objection, and end."""
    if isinstance(error, UnreadableFile):
        fail(str(error), ExitCode.NO_INPUT)
    for problem in error.problems:
        place = f"{_short(error.document.file)}:{problem.line}" if problem.line else _short(error.document.file)
        line = Text.assemble((place, "dim"), "  ", (problem.field, "bold red"), "  ", problem.message)
        err.print(line, soft_wrap=True)
    count = len(error.problems)
    name = error.document.name or "the job"
    fail(f"{name} would be refused: {count} {'problem' if count == 1 else 'problems'}", ExitCode.BAD_CONFIGURATION)


def _short(file: Path) -> str:
    try:
        return str(file.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(file)
