"""`finetune run`: a job on this machine, without a cluster."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from finetune.api.contract import CACHE, DEVICES, ExitCode, Step, claims_of
from finetune.api.spec import FineTuneJobSpec, ModelSource
from finetune.cli import document, machine
from finetune.cli.check import InvalidJob, checked
from finetune.cli.console import err, fail, out, refuse
from finetune.cli.folder import FolderInUse, WorkFolder
from finetune.cli.picture import STYLES, TITLES, Line, Picture, State, duration, sparkline
from finetune.cli.runner import Outcome, Runner, output_place, steps_of

EXAMPLES = """[cyan]finetune run job.yaml[/cyan]   [dim]pvc://CLAIM/PATH is claims/CLAIM/PATH[/dim]

[cyan]finetune run job.yaml --claim corpus=/data/corpus[/cyan]   [dim]a claim that lies elsewhere[/dim]

[cyan]finetune run job.yaml --model ~/models/SmolLM2-135M[/cyan]   [dim]a model that is here already[/dim]

Ctrl-C stops after a checkpoint; the same command without --fresh goes on from there, and does again only what changed.

Exit codes: 0 done; 64, 65, 66, 70, 78 somebody has to change something; 69, 74 worth trying again; 75 stopped after a
checkpoint.
"""
LOCAL_MODEL = "local-model"
"""The claim that stands for the folder of --model."""


def run(
    file: Annotated[Path, typer.Argument(help="A YAML file with one or more FineTuneJobs.", show_default=False)],
    work: Annotated[
        Path | None, typer.Option(help="Work folder. \\[default: finetune-work/NAME]", show_default=False)
    ] = None,
    claims: Annotated[Path, typer.Option(help="Folder whose subfolders are the claims of pvc://CLAIM/PATH.")] = Path(
        "claims"
    ),
    claim: Annotated[
        list[str] | None,
        typer.Option(help="Where one claim lies; may be repeated.", metavar="NAME=PATH", show_default=False),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Use this folder instead of spec.model.uri.", show_default=False)
    ] = None,
    hf_endpoint: Annotated[
        str | None, typer.Option(help="A mirror of the Hugging Face hub.", envvar="HF_ENDPOINT", show_default=False)
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(help="The list of tokens.addFrom; else a ConfigMap in FILE.", show_default=False),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps base models and extended models for further runs. \\[default: the claim of "
            "spec.cache]",
            envvar=CACHE,
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Which job, when FILE holds several; else all, in order.", show_default=False)
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what an earlier run left in the work folder.")] = False,
) -> None:
    """Run a job here: download, add tokens, reload, load data, train, save. No cluster, no root."""
    try:
        documents = document.read(file)
        found = [job for job in document.jobs(documents) if name in (None, job.name)]
        specs = [(job, checked(job)) for job in found]
    except (InvalidJob, document.UnreadableFile) as error:
        refuse(error)
    if not specs:
        fail(f"{file} holds no FineTuneJob named {name}", ExitCode.USAGE)
    if absent := machine.absent_packages():
        hint = "Install them with: pip install 'finetune-operator[cli,train]'"
        fail(
            f"the steps need {', '.join(absent)}, and this environment has none of it", ExitCode.BAD_CONFIGURATION, hint
        )
    places = dict(_claim(text) for text in claim or ())
    for job, spec in specs:
        if spec.training.container:
            fail(
                f"{job.name}: spec.training.container is another trainer, in an image of its own",
                ExitCode.BAD_CONFIGURATION,
                "Apply the job to a cluster, or remove training.container to train here with ours.",
            )
        if model:
            if not model.expanduser().is_dir():
                fail(f"--model {model} is not a folder", ExitCode.NO_INPUT)
            places[LOCAL_MODEL] = model.expanduser()
            local = ModelSource(uri=f"pvc://{LOCAL_MODEL}/", chat_template=spec.model.chat_template)
            spec = spec.model_copy(update={"model": local})
        root = (work / job.name if len(specs) > 1 else work) if work else Path("finetune-work") / job.name
        folder = WorkFolder(root)
        _require_claims(spec, claims, places)
        try:
            with folder.locked(fresh=fresh):
                _write_tokens(spec, folder, documents, tokens)
                _write_chat_template(spec, folder, documents)
                extra = {"HF_ENDPOINT": hf_endpoint} if hf_endpoint else {}
                if kept := cache or _cache(spec, claims, places):
                    extra[CACHE] = str(kept.expanduser().absolute())
                _run(job, spec, folder, claims, places, extra)
        except FolderInUse as error:
            fail(str(error), ExitCode.UNAVAILABLE, "Wait for it, or choose another folder with --work.")


def _run(
    job: document.Document,
    spec: FineTuneJobSpec,
    folder: WorkFolder,
    claims: Path,
    places: dict[str, Path],
    extra: dict[str, str],
) -> None:
    metadata = job.content["metadata"]
    written = folder.write_job(job.name, str(metadata.get("namespace", "default")), spec)
    where = folder.claims(claims, places, _claims(spec))
    if (pods := spec.training.nodes) > 1:
        err.print(
            f"[yellow]note:[/] the job asks for {pods} training pods, here is one machine: the batch stays the same"
        )
    present = machine.gpus()
    count = machine.devices(spec, present)
    if (wanted := machine.wanted_gpus(spec)) > count:
        device = f"{count} of them" if present else "the CPU"
        err.print(f"[yellow]note:[/] the job asks for {wanted} GPUs, here are {present}: training uses {device}")
    title = f"[bold]{job.name}[/] in {folder.root}"
    picture = Picture(title, [Line(step) for step in steps_of(spec)])

    def environment(step: Step) -> dict[str, str]:
        return folder.environment(step, where, {**extra, DEVICES: str(count)})

    if out.is_terminal:
        with Live(picture, console=out, refresh_per_second=8, transient=True):
            outcome = Runner(folder, environment, picture, lambda _: None).run()
    else:
        outcome = Runner(folder, environment, picture, _print_change).run()
    _show(picture, outcome)
    if outcome.code == ExitCode.OK:
        out.print(f"[bold green]done:[/] the model is in {output_place(spec, folder, where)}", soft_wrap=True)
        return
    _explain(outcome, folder, written.attempt)
    raise typer.Exit(outcome.code)


def _print_change(line: Line) -> None:
    """What a log file or a CI job sees instead of bars."""
    if line.state == State.RUNNING:
        out.print(f"{TITLES[line.step]} ...")
    else:
        seconds = duration(line.seconds or 0)
        out.print(f"{line.state.value} {TITLES[line.step]} ({seconds}): {line.summary}", soft_wrap=True)


def _show(picture: Picture, outcome: Outcome) -> None:
    table = Table(title=Text.from_markup(picture.title), title_justify="left", title_style="", header_style="bold")
    table.add_column("step", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("result", overflow="fold")
    for line in picture.lines:
        mark = Text.assemble((f"{line.state.value} ", STYLES[line.state]), TITLES[line.step])
        table.add_row(mark, "" if line.seconds is None else duration(line.seconds), line.summary)
    out.print(table)
    if len(picture.losses) > 1:
        out.print(f"[cyan]loss {picture.losses[0]:.4g} → {picture.losses[-1]:.4g}  {sparkline(picture.losses)}[/]")
    for report in outcome.reports.values():
        for warning in (report.result or {}).get("warnings") or ():
            out.print(Text.assemble(("warning: ", "yellow"), str(warning)), soft_wrap=True)


def _explain(outcome: Outcome, folder: WorkFolder, attempt: int) -> None:
    if outcome.stopped:
        again = Text.assemble(
            ("stopped", "yellow"), f" in attempt {attempt}. This command goes on from here: ",
            (going_on(sys.argv[1:]), "cyan"),
        )  # fmt: skip
        err.print(again, soft_wrap=True)
        return
    assert outcome.failed is not None and outcome.error is not None
    if outcome.last_words:
        log = folder.log(outcome.failed)
        err.print(Panel(Text(outcome.last_words, style="dim"), title=str(log), title_align="left", border_style="dim"))
    fail_title = f"{TITLES[outcome.failed]}: {outcome.error.reason}"
    err.print(Text.assemble(("error: ", "bold red"), (fail_title, "bold")), soft_wrap=True)
    err.print(Text(outcome.error.message), soft_wrap=True)
    if outcome.error.hint:
        err.print(Text.assemble(("hint: ", "bold"), outcome.error.hint), soft_wrap=True)


def going_on(arguments: Sequence[str]) -> str:
    """The command that goes on from where this one stopped: without --fresh, which would erase the checkpoint."""
    return shlex.join(["finetune", *(argument for argument in arguments if argument != "--fresh")])


def _claims(spec: FineTuneJobSpec) -> tuple[str, ...]:
    output = spec.output.uri if spec.output else None
    tokens = spec.tokens.add_from.uri if spec.tokens and spec.tokens.add_from else None
    learn = spec.tokens.learn.uris if spec.tokens and spec.tokens.learn else ()
    return claims_of(spec.model.uri, *spec.dataset.uris, tokens, *learn, output)


def _cache(spec: FineTuneJobSpec, claims: Path, places: dict[str, Path]) -> Path | None:
    """The folder that is the claim of spec.cache; it is made when it is absent."""
    return places.get(spec.cache.claim_name, claims / spec.cache.claim_name) if spec.cache else None


def _claim(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        fail(f"--claim {text}: write NAME=PATH, for example --claim corpus=/data/corpus", ExitCode.USAGE)
    return name, Path(path).expanduser()


def _require_claims(spec: FineTuneJobSpec, claims: Path, places: dict[str, Path]) -> None:
    """A claim that is read must be there; the one that is written to is made."""
    for claim in _claims(spec):
        place = places.get(claim, claims / claim)
        if spec.output and claims_of(spec.output.uri) == (claim,):
            place.mkdir(parents=True, exist_ok=True)
        elif not place.is_dir():
            fail(
                f"the claim {claim} is a folder here, and {place} does not exist",
                ExitCode.NO_INPUT,
                f"Make it, or say where it is: --claim {claim}=PATH",
            )


def _write_chat_template(spec: FineTuneJobSpec, folder: WorkFolder, documents: list[document.Document]) -> None:
    wanted = spec.model.chat_template.config_map if spec.model.chat_template else None
    if wanted is None:
        return
    text = document.config_map_value(documents, wanted.name, wanted.key)
    if text is None:
        fail(
            f"spec.model.chatTemplate: the file has no ConfigMap {wanted.name} with the key {wanted.key}",
            ExitCode.NO_INPUT,
            "Put the ConfigMap into the same file (after ---), or write the template into chatTemplate.text.",
        )
    folder.chat_template_file.write_text(text)


def _write_tokens(
    spec: FineTuneJobSpec, folder: WorkFolder, documents: list[document.Document], tokens: Path | None
) -> None:
    wanted = spec.tokens.add_from.config_map if spec.tokens and spec.tokens.add_from else None
    if wanted is None:
        return
    if tokens:
        try:
            text: str | None = tokens.read_text()
        except OSError as error:
            fail(f"--tokens {tokens}: {error.strerror}", ExitCode.NO_INPUT)
    else:
        text = document.config_map_value(documents, wanted.name, wanted.key)
    if text is None:
        fail(
            f"spec.tokens.addFrom: the file has no ConfigMap {wanted.name} with the key {wanted.key}",
            ExitCode.NO_INPUT,
            "Put the ConfigMap into the same file (after ---), or name the list with --tokens FILE.",
        )
    folder.tokens_file.write_text(text)
