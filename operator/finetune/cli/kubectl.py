"""The cluster, through the user's own kubectl: its login, its contexts, its proxies."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer

from finetune.api import GROUP, PLURAL
from finetune.cli.console import fail

RESOURCE = f"{PLURAL}.{GROUP}"

Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", help="The job's namespace; else kubectl's.", show_default=False)
]
Context = Annotated[str | None, typer.Option(help="The kubeconfig context; else kubectl's.", show_default=False)]
JobName = Annotated[str, typer.Argument(metavar="NAME", help="The FineTuneJob.", show_default=False)]


class Kubectl:
    """kubectl with the scope that the user chose."""

    def __init__(self, namespace: str | None, context: str | None) -> None:
        program = shutil.which("kubectl")
        if program is None:
            fail("kubectl is not on the PATH", 127, "This command works through kubectl: install it and log in.")
        self._command = [program]
        if namespace:
            self._command += ["--namespace", namespace]
        if context:
            self._command += ["--context", context]

    def command(self, *arguments: str) -> list[str]:
        """The whole command line."""
        return [*self._command, *arguments]

    def text(self, *arguments: str) -> str:
        """What kubectl prints; ends the program in kubectl's words when it fails."""
        result = subprocess.run(self.command(*arguments), capture_output=True, text=True, check=False)
        if result.returncode != 0:
            fail(_cleaned(result.stderr), result.returncode, _hint(result.stderr))
        return result.stdout

    def job(self, name: str) -> dict[str, Any]:
        """The FineTuneJob."""
        job: dict[str, Any] = json.loads(self.text("get", RESOURCE, name, "-o", "json"))
        return job

    def pods(self, selector: str) -> list[dict[str, Any]]:
        """The pods with these labels, oldest first."""
        pods: list[dict[str, Any]] = json.loads(self.text("get", "pods", "-l", selector, "-o", "json"))["items"]
        return sorted(pods, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    def changes(self, name: str) -> Iterator[dict[str, Any]]:
        """Watch events of the job, `{"type", "object"}`, for as long as the server lets a watch last."""
        arguments = ("get", RESOURCE, name, "-o", "json", "--watch", "--output-watch-events")
        with subprocess.Popen(self.command(*arguments), stdout=subprocess.PIPE, text=True, bufsize=1) as process:
            assert process.stdout is not None
            try:
                yield from _documents(process.stdout)
            finally:
                process.terminate()


def _documents(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """JSON documents that follow one another, as soon as each is whole: kubectl's end with a brace at the margin."""
    pending: list[str] = []
    for line in lines:
        pending.append(line)
        if line.startswith("}") or (line.startswith("{") and line.rstrip().endswith("}")):
            yield json.loads("".join(pending))
            pending = []


def _cleaned(stderr: str) -> str:
    """kubectl's own sentence, without the client library's log lines."""
    lines = [line for line in stderr.splitlines() if not re.match(r"[EIW][0-9]{4} ", line)]
    text = re.sub(r"^(error|Error from server)( \([A-Za-z]+\))?: ", "", "\n".join(lines).strip())
    return text or "kubectl failed"


def _hint(stderr: str) -> str:
    if "NotFound" in stderr and "customresourcedefinition" not in stderr:
        return "kubectl get ftj -A lists the jobs of all namespaces; choose one with -n."
    if "doesn't have a resource type" in stderr:
        return "The FineTuneJob operator is not installed in this cluster (or kubectl points to another one)."
    if "refused" in stderr or "no such host" in stderr or "i/o timeout" in stderr:
        return "Does kubectl reach the cluster? Try: kubectl version"
    return ""


def selector(**labels: str) -> str:
    """A label selector."""
    return ",".join(f"{key}={value}" for key, value in labels.items())
