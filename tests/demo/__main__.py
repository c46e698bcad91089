"""Install everything on the local cluster, run the think/answer example, watch it, and ask the result a question."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tests.cluster import Cluster
from tests.cluster.api import Api, ApiError
from tests.installation import ROOT, Installation, install

NAMESPACE = "demo"
JOB = "think-answer"
EXAMPLE = ROOT / "manifests/examples/think-answer.yaml"
QUESTION = "A box holds 7 red and 5 blue marbles. How many marbles are in the box?"
PATH = f"/apis/finetune.dev/v1alpha1/namespaces/{NAMESPACE}/finetunejobs/{JOB}"
FLOW = {
    "ModelDownloaded": "download the model",
    "TokensAdded": "add the tokens",
    "ModelReloaded": "prove that it reloads",
    "DatasetLoaded": "load the dataset",
    "Trained": "train",
    "Saved": "save",
}
DEADLINE = 1800
"""Seconds for the whole job."""


def main() -> int:
    """The demo; 0 when the model learned its tokens."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--svg", type=Path, help="also write what was shown as a picture")
    arguments = parser.parse_args()
    console = Console(record=True, width=104)
    installation = install()
    namespace = prepare(installation.cluster)
    console.print(f"[bold]$ kubectl apply -n {NAMESPACE} -f {EXAMPLE.relative_to(ROOT)}[/]")
    started = time.monotonic()
    namespace_apply(installation.cluster)
    status = watch(namespace, console)
    console.print(f"\n[dim]the job took {time.monotonic() - started:.0f} s[/]")
    if status.get("phase") != "Complete":
        console.print(installation.logs(), style="red")
        return 1
    show_result(installation.cluster, status, console)
    answers = ask(installation, console)
    learned = show_answers(answers, console)
    if arguments.svg:
        console.save_svg(str(arguments.svg), title="FineTuneJob: think-answer")
    return 0 if learned else 1


def prepare(cluster: Cluster) -> Api:
    """An empty namespace with a claim for the result."""
    cluster.kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found", timeout=180)
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "models"},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "2Gi"}}},
    }
    cluster.kubectl("create", "namespace", NAMESPACE)
    cluster.kubectl("label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=restricted")
    cluster.kubectl("apply", "-f", "-", namespace=NAMESPACE, input=json.dumps(claim))
    return Api(cluster.layout, timeout=30)


def namespace_apply(cluster: Cluster) -> None:
    """What a user does."""
    cluster.kubectl("apply", "-f", EXAMPLE, namespace=NAMESPACE)


def watch(api: Api, console: Console) -> dict[str, Any]:
    """Show the job live until it ends; its last status."""
    losses: list[float] = []
    status: dict[str, Any] = {}
    deadline = time.monotonic() + DEADLINE
    with Live(console=console, refresh_per_second=4) as live:
        while status.get("phase") not in ("Complete", "Failed") and time.monotonic() < deadline:
            try:
                status = api.request("GET", PATH).get("status", {})
            except (OSError, ApiError):
                time.sleep(1)
            loss = status.get("progress", {}).get("loss")
            if loss is not None and (not losses or losses[-1] != loss):
                losses.append(loss)
            live.update(picture(status, losses))
            time.sleep(0.3)
    return status


def picture(status: dict[str, Any], losses: list[float]) -> RenderableType:
    """The job at a glance."""
    conditions = {item["type"]: item for item in status.get("conditions", [])}
    progress = status.get("progress", {})
    table = Table.grid(padding=(0, 2))
    running = True
    for kind, text in FLOW.items():
        done = conditions.get(kind, {}).get("status") == "True"
        active = not done and running
        running = running and done
        mark = "[green]✔[/]" if done else "[yellow]▶[/]" if active else "[dim]·[/]"
        words = conditions.get(kind, {}).get("message", "") if done else ""
        bar: RenderableType = Text(words, style="dim", overflow="ellipsis", no_wrap=True)
        if active and progress.get("summary"):
            row = Table.grid(padding=(0, 1))
            remaining = progress.get("remaining", "")
            row.add_row(
                ProgressBar(total=100, completed=progress.get("percent", 0), width=24),
                f"{progress['summary']}{f', {remaining} left' if remaining else ''}",
            )
            bar = row
        table.add_row(mark, f"[bold]{text}[/]" if active else text, bar)
    lines: list[RenderableType] = [table]
    if losses:
        lines.append(Text(f"\nloss {losses[-1]:.3f}  {sparkline(losses)}", style="cyan"))
    if status.get("message"):
        lines.append(Text(f"\n{status['message']}", style="dim"))
    return Panel(Group(*lines), title=f"FineTuneJob {JOB}: {status.get('phase', 'Pending')}", width=100)


def sparkline(values: list[float], width: int = 60) -> str:
    """The course of the values in one line of text."""
    shown = values[-width:]
    low, high = min(shown), max(shown)
    bars = "▁▂▃▄▅▆▇█"
    return "".join(bars[round((value - low) / ((high - low) or 1) * (len(bars) - 1))] for value in shown)


def show_result(cluster: Cluster, status: dict[str, Any], console: Console) -> None:
    """The table that kubectl prints, and the numbers of the status."""
    console.print(f"\n[bold]$ kubectl get ftj -n {NAMESPACE}[/]")
    console.print(cluster.kubectl("get", "ftj", namespace=NAMESPACE).stdout.rstrip(), highlight=False)
    tokens, dataset, training = status["tokens"], status["dataset"], status["training"]
    table = Table(title="status", show_header=False, title_justify="left")
    table.add_row("model", f"commit {status['model']['commit'][:12]}, {status['model']['sizeBytes'] / 1e6:.0f} MB")
    table.add_row(
        "tokens",
        f"{tokens['added']} added; vocabulary {tokens['vocabularySizeBefore']:,} → {tokens['vocabularySize']:,}, "
        f"embedding rows {tokens['embeddingRowsBefore']:,} → {tokens['embeddingRows']:,}",
    )
    table.add_row(
        "dataset",
        f"{dataset['examples']} examples, {dataset['trainedTokens']:,} of {dataset['tokens']:,} tokens carry loss",
    )
    table.add_row(
        "training",
        f"{training['steps']} steps, loss {training['loss']:.3f}, "
        f"validation loss {training.get('validationLoss', 0):.3f}",
    )
    table.add_row("output", f"{status['output']['uri']}, {status['output']['sizeBytes'] / 1e6:.0f} MB")
    console.print(table)


def ask(installation: Installation, console: Console) -> dict[str, Any]:
    """Ask base, extended and trained model in a pod of their own."""
    console.print(f"\n[bold]question:[/] {QUESTION}")
    cluster = installation.cluster
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "ask"},
        "data": {"ask.py": (Path(__file__).parent / "ask.py").read_text()},
    }
    models = ["base=/work/model", "initialised=/work/prepared", "trained=/models/think-answer"]
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "ask"},
        "spec": {
            "restartPolicy": "Never",
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65532,
                "fsGroup": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "ask",
                    "image": installation.train_image,
                    "command": ["python", "/ask/ask.py", QUESTION, *models],
                    "env": [{"name": "HOME", "value": "/tmp"}, {"name": "HF_HUB_OFFLINE", "value": "1"}],
                    "securityContext": security,
                    "volumeMounts": [
                        {"name": "ask", "mountPath": "/ask"},
                        {"name": "work", "mountPath": "/work", "readOnly": True},
                        {"name": "models", "mountPath": "/models", "readOnly": True},
                    ],
                }
            ],
            "volumes": [
                {"name": "ask", "configMap": {"name": "ask"}},
                {"name": "work", "persistentVolumeClaim": {"claimName": f"{JOB}-work"}},
                {"name": "models", "persistentVolumeClaim": {"claimName": "models"}},
            ],
        },
    }
    cluster.kubectl("apply", "-f", "-", namespace=NAMESPACE, input=f"{json.dumps(config)}\n---\n{json.dumps(pod)}")
    with console.status("three models answer"):
        cluster.kubectl(
            "wait", "pod/ask", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=280s", namespace=NAMESPACE
        )
    answers = json.loads(cluster.kubectl("logs", "ask", namespace=NAMESPACE).stdout.splitlines()[-1])
    assert isinstance(answers, dict)
    return answers


def show_answers(answers: dict[str, Any], console: Console) -> bool:
    """Before and after, side by side; whether the tokens appear after and only after."""
    table = Table(show_lines=True)
    table.add_column("model")
    table.add_column("P(<think>) first", justify="right")
    table.add_column("its answer", ratio=1)
    notes = {"base": f"\n[dim]{answers['base']['pieces']} pieces, no token[/]"}
    for name, answer in answers.items():
        table.add_row(name + notes.get(name, ""), f"{answer['probability']:.3g}", Text(answer["answer"].strip()))
    console.print(table)
    markers = ("<think>", "</think>", "<answer>", "</answer>")
    before = [marker for marker in markers if marker in answers["base"]["answer"]]
    after = [marker for marker in markers if marker in answers["trained"]["answer"]]
    probability = answers["trained"]["probability"]
    learned = not before and len(after) == len(markers) and probability > 0.9
    verdict = f"new tokens in the answer before: {len(before)}, after: {len(after)}; P(<think>) = {probability:.3f}"
    console.print(f"[{'bold green' if learned else 'bold red'}]{verdict}[/]")
    return learned


if __name__ == "__main__":
    sys.exit(main())
