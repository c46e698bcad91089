"""`finetune render`: check a job and show it with every default written out."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated

import typer
from rich.syntax import Syntax
from ruamel.yaml import YAML

from finetune.api import API_VERSION, KIND
from finetune.cli import document
from finetune.cli.check import InvalidJob, checked
from finetune.cli.console import out, refuse

EXAMPLES = """[cyan]finetune render job.yaml[/cyan]   [dim]every field, defaults included[/dim]

[cyan]finetune render job.yaml > full.yaml[/cyan]   [dim]plain YAML when redirected[/dim]

Exit code 78: the job would be refused; each line names the field and what to write instead.
"""


def render(
    file: Annotated[Path, typer.Argument(help="A YAML file with one or more FineTuneJobs.", show_default=False)],
) -> None:
    """Check a job and print it with all its defaults, as the cluster would store it."""
    try:
        found = document.jobs(document.read(file))
        texts = [_yaml(job) for job in found]
    except (InvalidJob, document.UnreadableFile) as error:
        refuse(error)
    text = "---\n".join(texts)
    if out.is_terminal:
        out.print(Syntax(text.rstrip(), "yaml", theme="ansi_dark", background_color="default", word_wrap=True))
    else:
        typer.echo(text, nl=False)


def _yaml(job: document.Document) -> str:
    stream = io.StringIO()
    writer = YAML()
    writer.width = 120
    metadata = {key: value for key, value in job.content["metadata"].items() if key in ("name", "namespace", "labels")}
    writer.dump({"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": checked(job).wire()}, stream)
    return stream.getvalue()
