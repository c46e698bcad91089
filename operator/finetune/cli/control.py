"""`finetune suspend`, `resume` and `retry`: what people change of a job that has started."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from finetune.cli.console import out
from finetune.cli.kubectl import RESOURCE, Context, JobName, Kubectl, Namespace

EXAMPLES = """[cyan]kubectl finetune suspend my-job[/cyan]   [dim]a checkpoint is written, the GPUs are free[/dim]

[cyan]kubectl finetune resume my-job[/cyan]   [dim]goes on from that checkpoint[/dim]

[cyan]kubectl finetune retry my-job[/cyan]   [dim]the failed stage starts again, from the newest checkpoint[/dim]
"""


def suspend(name: JobName, namespace: Namespace = None, context: Context = None) -> None:
    """Stop a job after a checkpoint and keep everything."""
    _patch(Kubectl(namespace, context), name, suspend=True)
    out.print(f"{name} stops after its next checkpoint; [cyan]finetune resume {name}[/] goes on from there")


def resume(name: JobName, namespace: Namespace = None, context: Context = None) -> None:
    """Let a suspended job go on from its checkpoint."""
    _patch(Kubectl(namespace, context), name, suspend=False)
    out.print(f"{name} goes on; [cyan]finetune watch {name}[/] shows how")


def retry(name: JobName, namespace: Namespace = None, context: Context = None) -> None:
    """Start the stage of a failed job again. What was too small may be changed first: memory, checkpoint.keep, ..."""
    _patch(Kubectl(namespace, context), name, retry={"at": datetime.now(UTC).isoformat(timespec="milliseconds")})
    out.print(f"{name} tries again; [cyan]finetune watch {name}[/] shows how")


def _patch(kubectl: Kubectl, name: str, **spec: Any) -> None:
    kubectl.text("patch", RESOURCE, name, "--type=merge", "--patch", json.dumps({"spec": spec}))
