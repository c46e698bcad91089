"""A job of the cluster as a picture: from its status alone."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from finetune.api.contract import CONDITIONS, PARTS, Step
from finetune.api.reasons import Reason
from finetune.cli.picture import Line, Picture, State, duration
from finetune.cli.results import summary

COLOURS = {"Complete": "green", "Failed": "red", "Suspended": "yellow"}


def finished(job: dict[str, Any]) -> bool | None:
    """True when the job is complete, False when it failed, None while it goes on."""
    conditions = conditions_of(job)
    if conditions.get("Complete", {}).get("status") == "True":
        return True
    return False if conditions.get("Failed", {}).get("status") == "True" else None


def conditions_of(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The conditions by type."""
    return {item["type"]: item for item in job.get("status", {}).get("conditions") or ()}


def picture(job: dict[str, Any], losses: list[float] | None = None) -> Picture:
    """The job at a glance; `losses` are those that were seen while watching."""
    status, conditions = job.get("status", {}), conditions_of(job)
    progress = status.get("progress") or {}
    phase = status.get("phase") or "Pending"
    title = f"[bold]{job['metadata']['name']}[/] [{COLOURS.get(phase, 'blue')}]{phase}[/]"
    attempts = status.get("attempts") or {}
    if attempts.get("count", 0) > 1:
        title += f" · attempt {attempts['count']}"
    result = Picture(title, [], losses=losses if losses is not None else [], message=status.get("message") or "")
    over = finished(job) is not None or phase == "Suspended"
    running = next((step for step in Step if _state(conditions, step) not in ("True", "Skipped")), None)
    for step, kind in CONDITIONS.items():
        line = Line(step)
        condition = conditions.get(kind, {})
        if _state(conditions, step) == "Skipped":
            line.state, line.summary = State.SKIPPED, condition.get("message", "")
        elif condition.get("status") == "True":
            line.state = State.DONE
            line.summary = summary(step, status.get(PARTS[step]) or {}) or condition.get("message", "")
        elif step == running and phase == "Failed":
            line.state, line.summary = State.FAILED, condition.get("reason", "")
        elif step == running and not over and status.get("startTime"):
            line.state = State.WAITING if condition.get("reason") == Reason.WAITING else State.RUNNING
            if progress.get("step") == step.value:
                line.percent = progress.get("percent")
                line.summary = _progress(progress)
        result.lines.append(line)
    result.see_loss(progress.get("loss"))
    return result


def details(job: dict[str, Any]) -> RenderableType:
    """Conditions and attempts, for who wants to know more."""
    parts: list[RenderableType] = []
    table = Table(title="conditions", title_justify="left", header_style="bold")
    for title in ("type", "status", "since", "reason", "message"):
        table.add_column(title, overflow="fold", no_wrap=title != "message")
    for condition in conditions_of(job).values():
        if condition["status"] == "Unknown" and not condition.get("message"):
            continue  # nothing is known yet
        since = _ago(condition.get("lastTransitionTime"))
        style = {"True": "green", "False": ""}.get(condition["status"], "dim")
        if condition["type"] == "Failed" and condition["status"] == "True":
            style = "red"
        message = condition.get("message", "")
        table.add_row(condition["type"], condition["status"], since, condition["reason"], message, style=style)
    if table.row_count:
        parts.append(table)
    history = (job.get("status", {}).get("attempts") or {}).get("history")
    if history:
        attempts = Table(title="attempts", title_justify="left", header_style="bold")
        for title in ("stage", "nr", "outcome", "from step", "node", "why"):
            attempts.add_column(title, overflow="fold")
        for attempt in history:
            why = " ".join(text for text in (attempt.get("reason", ""), attempt.get("message", "")) if text)
            step = attempt.get("resumedFromStep")
            attempts.add_row(
                attempt["stage"],
                str(attempt["number"]),
                attempt["outcome"],
                "" if step is None else str(step),
                attempt.get("node") or "",
                why,
            )
        parts.append(attempts)
    warnings = (job.get("status", {}).get("tokens") or {}).get("warnings") or ()
    return Group(*parts, *(Text.assemble(("warning: ", "yellow"), warning) for warning in warnings))


def _state(conditions: dict[str, dict[str, Any]], step: Step) -> str:
    condition = conditions.get(CONDITIONS[step], {})
    if condition.get("reason") in ("Skipped", "NotNeeded", "NoTokens"):
        return "Skipped"
    return str(condition.get("status", "Unknown"))


def _progress(progress: dict[str, Any]) -> str:
    words = [progress.get("summary", "")]
    if progress.get("percent") is not None:
        words = [progress.get("summary", "").removeprefix(f"{progress['percent']}%").strip(" ()")]
    if progress.get("tokensPerSecond"):
        words.append(f"{progress['tokensPerSecond']:,.0f} tokens/s")
    if progress.get("remaining"):
        words.append(f"{progress['remaining']} left")
    return ", ".join(word for word in words if word)


def _ago(time: str | None) -> str:
    if not time:
        return ""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()
    return f"{duration(max(0.0, seconds))} ago"
