"""`finetune watch`: a job of the cluster, live, until it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import typer
from rich.live import Live

from finetune.cli.console import fail, out
from finetune.cli.job_picture import details, finished, picture
from finetune.cli.kubectl import Context, JobName, Kubectl, Namespace

EXAMPLES = """[cyan]kubectl apply -f job.yaml && kubectl finetune watch my-job[/cyan]

Exit codes: 0 the job is complete; 1 it failed; 130 you stopped watching (the job goes on).
"""
PAUSE = 1.0
"""Seconds before a watch that the server ended begins anew."""


def watch(name: JobName, namespace: Namespace = None, context: Context = None) -> None:
    """Follow a job until it is complete (exit code 0) or failed (1)."""
    kubectl = Kubectl(namespace, context)
    job, losses, line = kubectl.job(name), list[float](), ""
    try:
        with Live(picture(job, losses), console=out, refresh_per_second=8) as live:
            for state in _states(kubectl, name, job):
                job = state
                live.update(picture(job, losses))
                if not out.is_terminal and line != (line := _line(job)):
                    out.print(line, soft_wrap=True)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if finished(job) is None:
        fail(f"{name} was deleted")
    if not finished(job):
        out.print(details(job))
        raise typer.Exit(1)


def _states(kubectl: Kubectl, name: str, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The job each time that it changes, until it ends or is deleted."""
    yield job
    while finished(job) is None:
        for event in kubectl.changes(name):
            job = event["object"]
            if event["type"] == "DELETED":
                return
            yield job
            if finished(job) is not None:
                return
        time.sleep(PAUSE)
        job = kubectl.job(name)
        yield job


def _line(job: dict[str, Any]) -> str:
    """What a log file sees instead of a picture."""
    status = job.get("status", {})
    progress = status.get("progress") or {}
    loss = f"loss {progress['loss']:.4g}" if progress.get("loss") is not None else ""
    words = (status.get("phase", "Pending"), progress.get("summary"), loss, status.get("message"))
    return " ".join(word for word in words if word)
