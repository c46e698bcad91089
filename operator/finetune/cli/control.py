"""`finetune suspend` and `finetune resume`: the one field of a job that people change while it runs."""

from __future__ import annotations

import json

from finetune.cli.console import out
from finetune.cli.kubectl import RESOURCE, Context, JobName, Kubectl, Namespace

EXAMPLES = """[cyan]kubectl finetune suspend my-job[/cyan]   [dim]a checkpoint is written, the GPUs are free[/dim]

[cyan]kubectl finetune resume my-job[/cyan]   [dim]goes on from that checkpoint[/dim]
"""


def suspend(name: JobName, namespace: Namespace = None, context: Context = None) -> None:
    """Stop a job after a checkpoint and keep everything."""
    _set(Kubectl(namespace, context), name, True)
    out.print(f"{name} stops after its next checkpoint; [cyan]finetune resume {name}[/] goes on from there")


def resume(name: JobName, namespace: Namespace = None, context: Context = None) -> None:
    """Let a suspended job go on from its checkpoint."""
    _set(Kubectl(namespace, context), name, False)
    out.print(f"{name} goes on; [cyan]finetune watch {name}[/] shows how")


def _set(kubectl: Kubectl, name: str, suspend: bool) -> None:
    kubectl.text("patch", RESOURCE, name, "--type=merge", "--patch", json.dumps({"spec": {"suspend": suspend}}))
