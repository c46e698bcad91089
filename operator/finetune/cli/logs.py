"""`finetune logs`: what a step printed, without having to know pods and containers."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from finetune.api.contract import CONTAINERS, JOB_LABEL, PROGRESS_PREFIX, STAGE_LABEL, Step
from finetune.cli.console import err, fail
from finetune.cli.kubectl import Context, JobName, Kubectl, Namespace, selector

EXAMPLES = """[cyan]kubectl finetune logs my-job[/cyan]   [dim]the step that runs, or ran last[/dim]

[cyan]kubectl finetune logs my-job --step train --follow[/cyan]
"""
POD_INDEX = "batch.kubernetes.io/job-completion-index"
STAGES = {
    Step.DOWNLOAD: "prepare",
    Step.ADD_TOKENS: "prepare",
    Step.RELOAD: "prepare",
    Step.LOAD_DATASET: "prepare",
    Step.TRAIN: "train",
    Step.SAVE: "save",
}


def logs(
    name: JobName,
    step: Annotated[
        Step | None, typer.Option(help="Which step; the one that runs, or ran last, when absent.", show_default=False)
    ] = None,
    pod: Annotated[int, typer.Option(help="Which pod, where training has several; 0 reports for all.", min=0)] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the step ends.")] = False,
    progress: Annotated[bool, typer.Option("--progress", help="Show the progress reports too.")] = False,
    namespace: Namespace = None,
    context: Context = None,
) -> None:
    """Print the log of a step: of its newest attempt."""
    kubectl = Kubectl(namespace, context)
    labels = {JOB_LABEL: name, **({STAGE_LABEL: STAGES[step]} if step else {})}
    pods = kubectl.pods(selector(**labels))
    if not pods:
        kubectl.job(name)  # says so when there is no such job
        what = f"pod of the step {step.value}" if step else "pod"
        fail(f"{name} has no {what} (yet, or any more)", 1, f"kubectl finetune status {name} says where it stands.")
    found = of_index(pods, pod)
    if found is None:
        fail(
            f"{name} has no pod of index {pod} in its newest attempt", 1, "spec.training.nodes says how many there are."
        )
    container = CONTAINERS[step] if step else _latest(found)
    err.print(f"[dim]{found['metadata']['name']} {container}[/]")
    command = kubectl.command("logs", found["metadata"]["name"], "-c", container, *(["--follow"] if follow else []))
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if progress or not line.startswith(PROGRESS_PREFIX.encode()):
                    typer.echo(line.decode(errors="replace"), nl=False)
        except KeyboardInterrupt:
            process.terminate()
            raise typer.Exit(130) from None
    raise typer.Exit(process.returncode)


def of_index(pods: Sequence[dict[str, Any]], index: int) -> dict[str, Any] | None:
    """The newest pod of that index in the attempt of the newest pod; `pods` are in the order of their creation."""
    newest = pods[-1]["metadata"].get("labels", {}).get("job-name")
    for pod in reversed(pods):
        labels = pod["metadata"].get("labels", {})
        if labels.get("job-name") == newest and int(labels.get(POD_INDEX, 0)) == index:
            return dict(pod)
    return None


def _latest(pod: dict[str, Any]) -> str:
    """The container that started last; before any started, the one that everything waits for."""
    status = pod.get("status", {})
    states = [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]
    started = [item["name"] for item in states if "waiting" not in item["state"]]
    containers = [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]
    return str(started[-1] if started else containers[0]["name"])
