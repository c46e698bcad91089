"""The command line: one Typer application, one module for each command."""

from __future__ import annotations

import typer

from finetune.cli import control, logs, render, run, status, tokens, watch

EPILOG = """[bold]On this machine[/bold], without a cluster:

[cyan]finetune run job.yaml[/cyan]   [dim]download, add tokens, reload, load data, train, save[/dim]

[cyan]finetune render job.yaml[/cyan]   [dim]check a job and see every default[/dim]

[cyan]finetune tokens MODEL --add '<think>' --dry-run[/cyan]   [dim]only the tokens, of a model that is here[/dim]

[bold]In a cluster[/bold]:

[cyan]kubectl apply -f job.yaml && kubectl finetune watch my-job[/cyan]

[cyan]kubectl finetune logs my-job --step train --follow[/cyan]

[cyan]kubectl finetune suspend my-job[/cyan]   [dim]stop after a checkpoint; resume goes on from there[/dim]
"""

app = typer.Typer(
    name="finetune",
    help="Add tokens to a language model and fine-tune it: on this machine, or in a cluster.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
LOCAL, CLUSTER = "On this machine", "In a cluster"
app.command(rich_help_panel=LOCAL, epilog=run.EXAMPLES)(run.run)
app.command(rich_help_panel=LOCAL, epilog=render.EXAMPLES)(render.render)
app.command(rich_help_panel=LOCAL, epilog=tokens.EXAMPLES)(tokens.tokens)
app.command(rich_help_panel=CLUSTER, epilog=status.EXAMPLES)(status.status)
app.command(rich_help_panel=CLUSTER, epilog=watch.EXAMPLES)(watch.watch)
app.command(rich_help_panel=CLUSTER, epilog=logs.EXAMPLES)(logs.logs)
app.command(rich_help_panel=CLUSTER, epilog=control.EXAMPLES)(control.suspend)
app.command(rich_help_panel=CLUSTER, epilog=control.EXAMPLES)(control.resume)
app.command(rich_help_panel=CLUSTER, epilog=control.EXAMPLES)(control.retry)


def main() -> None:
    """Run the command and end with its exit code."""
    app()


if __name__ == "__main__":
    main()
