"""`finetune tokens`: the editor of the step add-tokens as a command on a folder of this machine."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from finetune.api import API_VERSION, KIND
from finetune.api.contract import ExitCode, Layout, Step, StepReport
from finetune.api.spec import PROBE_PROMPT, FineTuneJobSpec
from finetune.api.token_plan import TokenPlan
from finetune.cli import document, machine
from finetune.cli.check import InvalidJob, checked
from finetune.cli.console import err, fail, out, refuse
from finetune.cli.folder import WorkFolder
from finetune.cli.picture import TITLES
from finetune.cli.process import StepProcess
from finetune.cli.runner import unreported
from finetune.cli.token_picture import plan_picture, proof_picture

EXAMPLES = """[cyan]finetune tokens SmolLM2 --add '<think>' --add BRCA1 --dry-run[/cyan]   [dim]what would change[/dim]

[cyan]finetune tokens SmolLM2 --add '<think>' --init copyOf='<|im_start|>' --output SmolLM2-think[/cyan]

[cyan]finetune tokens SmolLM2 --add-from terms.txt --output SmolLM2-medical[/cyan]   [dim]one token a line, or
{"piece": "..."}, or a sentencepiece .vocab file[/dim]

[cyan]finetune tokens SmolLM2 -f job.yaml --output SmolLM2-think[/cyan]   [dim]spec.tokens of a FineTuneJob, where each
token can have its own init and kind[/dim]

Exit codes: 0 done; 64, 65, 66, 70, 78 somebody has to change something; 69, 74 worth trying again.
"""
LIST = "pvc://list/tokens"
"""What the steps know the file of --add-from by."""

NEEDED = ("tokenizers", "numpy")
NEEDED_TO_RELOAD = (*NEEDED, "torch", "transformers")


def tokens(
    model: Annotated[Path, typer.Argument(help="A folder with a transformers model.", show_default=False)],
    add: Annotated[
        list[str] | None,
        typer.Option(help="A word or marker that becomes one token; may be repeated.", metavar="TEXT"),
    ] = None,
    add_from: Annotated[
        Path | None, typer.Option(help="A file with many: one a line.", metavar="FILE", show_default=False)
    ] = None,
    special: Annotated[
        bool, typer.Option("--special", help="Make those of --add special: skip_special_tokens hides them.")
    ] = False,
    init: Annotated[
        str | None,
        typer.Option(
            help="How their rows start: copyOf=TOKEN, meanOf=Pieces, meanOf=Vocabulary, or sample=Normal. "
            "\\[default: meanOf=Pieces]",
            metavar="WAY=WHAT",
            show_default=False,
        ),
    ] = None,
    pad: Annotated[
        int, typer.Option("--pad-to-multiple-of", help="Round the number of embedding rows up.", min=1, max=1024)
    ] = 64,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="Take spec.tokens of the FineTuneJob in this file.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The folder to make: the model with its new tokens.", show_default=False)
    ] = None,
    probe: Annotated[
        str | None,
        typer.Option(
            help=f"A user's message after which each token's probability is measured. \\[default: {PROBE_PROMPT}]",
            metavar="TEXT",
            show_default=False,
        ),
    ] = None,
    reload: Annotated[
        bool, typer.Option("--reload/--no-reload", help="Load both models afterwards and compare them bit by bit.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change, and write nothing.")] = False,
) -> None:
    """Add tokens to a model on this machine: tokenizer, embedding rows and proof, as a job would."""
    if not model.is_dir():
        fail(f"{model} is not a folder", ExitCode.NO_INPUT)
    if not (output or dry_run):
        fail("say where the model goes with --output FOLDER, or only look with --dry-run", ExitCode.USAGE)
    if output and output.exists() and (not output.is_dir() or any(output.iterdir())):
        fail(f"--output {output}: there is something already", ExitCode.USAGE, "Choose another folder, or remove it.")
    if file and (add or init or special):
        fail("--file has its own tokens: leave --add, --init and --special out", ExitCode.USAGE)
    prove = reload and not dry_run
    if absent := machine.absent_packages(NEEDED_TO_RELOAD if prove else NEEDED):
        hint = "pip install 'finetune-operator[cli,train]'" + ("; --no-reload needs less." if prove else "")
        fail(f"this needs {', '.join(absent)}, which is not installed", ExitCode.BAD_CONFIGURATION, hint)
    try:
        documents = document.read(file) if file else [_job(add, special, init, pad)]
        job = document.jobs(documents)[0]
        spec = _spec(job, add_from, probe)
    except (InvalidJob, document.UnreadableFile) as error:
        refuse(error)
    if spec.model.chat_template and not dry_run:
        fail(
            "spec.model.chatTemplate: this command adds tokens only, and would leave the model its own template",
            ExitCode.USAGE,
            "Remove chatTemplate from the file here, or look only with --dry-run; a job applies it.",
        )
    with _work_folder(model, output) as folder:
        _place_list(spec, folder, documents, add_from)
        folder.write_job(job.name, "default", spec)
        report = _run(folder, Step.ADD_TOKENS, add_from, "--dry-run")
        out.print(plan_picture(TokenPlan.model_validate(report.result), everything=not out.is_terminal))
        if output and not dry_run:
            _run(folder, Step.ADD_TOKENS, add_from)
            if prove:
                result = _run(folder, Step.RELOAD, add_from).result or {}
                if "proof" in result:
                    out.print(proof_picture(Layout(workspace=folder.workspace).proof, result["proof"]))
            _deliver(Layout(workspace=folder.workspace), output)
            out.print(Text.assemble(("done: ", "bold green"), f"the model is in {output}"), soft_wrap=True)


def _job(add: list[str] | None, special: bool, init: str | None, pad: int) -> document.Document:
    """The job that the options amount to. Its steps look at its tokens only."""
    tokens: dict[str, Any] = {"padToMultipleOf": pad}
    if add:
        tokens["add"] = [{"content": text, "special": special} for text in add]
    if init:
        way, separator, what = init.partition("=")
        if not separator:
            fail(f"--init {init}: write WAY=WHAT, for example copyOf='<|im_start|>'", ExitCode.USAGE)
        tokens["init"] = {way: what}
    spec = {
        "model": {"uri": "pvc://model/"},
        "tokens": tokens,
        "dataset": {"sources": [{"uri": "pvc://none/"}], "packing": "Disabled"},
        "training": {"epochs": 1},
    }
    content = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "tokens"}, "spec": spec}
    return document.Document(Path("command line"), content)


def _spec(job: document.Document, add_from: Path | None, probe: str | None) -> FineTuneJobSpec:
    """The job's spec, with the list that is named here in the place of its own."""
    tokens = job.content.get("spec", {}).setdefault("tokens", {})
    if add_from:
        tokens["addFrom"] = {"uri": LIST}
    if probe:
        tokens["probePrompt"] = probe
    if not tokens.keys() & {"add", "addFrom", "learn"}:
        fail("no tokens: name them with --add TEXT, --add-from FILE or -f JOB", ExitCode.USAGE)
    return checked(job)


def _place_list(
    spec: FineTuneJobSpec, folder: WorkFolder, documents: list[document.Document], add_from: Path | None
) -> None:
    """Put the list of addFrom where the step looks for it."""
    source = spec.tokens.add_from if spec.tokens else None
    if add_from:
        if not add_from.is_file():
            fail(f"--add-from {add_from}: there is no such file", ExitCode.NO_INPUT)
        place = Layout(claims=folder.links).claim_path(LIST)
        place.parent.mkdir(parents=True)
        place.symlink_to(add_from.absolute())
    elif source:
        wanted = source.config_map
        text = document.config_map_value(documents, wanted.name, wanted.key) if wanted else None
        if text is None:
            what = f"the ConfigMap {wanted.name}, key {wanted.key}" if wanted else source.uri
            fail(f"spec.tokens.addFrom: {what} is not in the file", ExitCode.NO_INPUT, "Name the list: --add-from FILE")
        folder.tokens_file.write_text(text)


@contextmanager
def _work_folder(model: Path, output: Path | None) -> Iterator[WorkFolder]:
    """A work folder that has the model: beside the output, where renaming is enough to put that into place."""
    place = output.absolute().parent if output else None
    if place:
        place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".finetune-tokens-", dir=place) as root:
        folder = WorkFolder(Path(root))
        with folder.locked():
            Layout(workspace=folder.workspace).model.symlink_to(model.absolute())
            yield folder


def _run(folder: WorkFolder, step: Step, add_from: Path | None, *options: str) -> StepReport:
    """Run one step under a bar; ends the command when the step fails."""
    process = StepProcess(step, folder, folder.environment(step, folder.links, {}), *options)
    title = "look at the model" if options else TITLES[step]
    try:
        with Progress(TextColumn("{task.description}"), BarColumn(), console=err, transient=True) as bar:
            task = bar.add_task(title, total=None)
            code = process.follow(lambda status: bar.update(task, total=100, completed=status.get("percent") or 0))
    except BaseException:
        process.kill()
        raise
    report = process.whole_report()
    if not report or code != ExitCode.OK:
        error = (report.error if report else None) or unreported(code)
        if not report:
            err.print(Text(process.last_words(), style="dim"))
        # the list is a claim's file to the step, and has its own name here
        fail(error.message.replace(LIST, str(add_from)), code if code > 0 else 128 - code, error.hint)
    return report


def _deliver(layout: Layout, output: Path) -> None:
    """Put the model where it is wanted. Files that it shares with the old one (hard links) become its own: whoever
    changes one of two folders must not change the other."""
    for path in layout.prepared.iterdir():
        if path.is_file() and path.stat().st_nlink > 1:
            copy = path.with_name(f"{path.name}.copy")
            shutil.copyfile(path, copy)
            copy.replace(path)
    if layout.proof.is_file():
        layout.proof.rename(layout.prepared / layout.proof.name)
    if output.exists():
        output.rmdir()
    layout.prepared.rename(output)
