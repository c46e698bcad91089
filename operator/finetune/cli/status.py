"""`finetune status`: one look at a job of the cluster."""

from __future__ import annotations

from finetune.cli.console import out
from finetune.cli.job_picture import details, picture
from finetune.cli.kubectl import Context, JobName, Kubectl, Namespace

EXAMPLES = """[cyan]kubectl finetune status my-job[/cyan]

[cyan]kubectl finetune status my-job -n team-a[/cyan]
"""


def status(name: JobName, namespace: Namespace = None, context: Context = None) -> None:
    """Show where a job stands: steps, progress, loss, conditions, attempts."""
    job = Kubectl(namespace, context).job(name)
    still = picture(job)
    still.live = False
    out.print(still)
    out.print(details(job))
