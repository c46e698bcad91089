"""How a job looks in a terminal, whether it runs here or in a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from finetune.api.contract import Step

TITLES = {
    Step.DOWNLOAD: "download the model",
    Step.ADD_TOKENS: "add the tokens",
    Step.RELOAD: "prove that it reloads",
    Step.LOAD_DATASET: "load the dataset",
    Step.TRAIN: "train",
    Step.SAVE: "save",
}


class State(Enum):
    """How far a step is; the value is its mark."""

    WAITING = "·"
    RUNNING = "▶"
    DONE = "✔"
    FAILED = "✘"
    STOPPED = "◼"
    SKIPPED = "–"


STYLES = {
    State.WAITING: "dim",
    State.RUNNING: "yellow",
    State.DONE: "green",
    State.FAILED: "red",
    State.STOPPED: "yellow",
    State.SKIPPED: "dim",
}


@dataclass
class Line:
    """One step of the flow."""

    step: Step
    state: State = State.WAITING
    percent: int | None = None
    summary: str = ""
    seconds: float | None = None


@dataclass
class Picture:
    """A job at a glance."""

    title: str
    lines: list[Line]
    losses: list[float] = field(default_factory=list)
    message: str = ""
    live: bool = True
    spinner: Spinner = field(default_factory=lambda: Spinner("dots", style="yellow"))

    def see_loss(self, loss: object) -> None:
        """Remember a loss if it is a new one."""
        if isinstance(loss, (int, float)) and (not self.losses or self.losses[-1] != loss):
            self.losses.append(float(loss))

    def __rich__(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        table.add_column(width=1)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, justify="right", style="dim")
        table.add_column(overflow="fold")
        for line in self.lines:
            mark: RenderableType = Text(line.state.value, style=STYLES[line.state])
            if self.live and line.state == State.RUNNING:
                mark = self.spinner
            title = Text(TITLES[line.step], style="bold" if line.state == State.RUNNING else STYLES[line.state])
            seconds = "" if line.seconds is None else duration(line.seconds)
            table.add_row(mark, title, seconds, _words(line))
        parts: list[RenderableType] = [table]
        if self.losses:
            parts.append(Text(f"\nloss {self.losses[-1]:.4g}  {sparkline(self.losses)}", style="cyan"))
        if self.message:
            parts.append(Text(f"\n{self.message}", style="dim" if self.active() else ""))
        return Panel(Group(*parts), title=self.title, title_align="left", border_style="blue", padding=(1, 2))

    def active(self) -> bool:
        """Whether a step runs."""
        return any(line.state == State.RUNNING for line in self.lines)


def _words(line: Line) -> RenderableType:
    words = Text(line.summary, style="" if line.state == State.RUNNING else "dim")
    if line.state != State.RUNNING or line.percent is None:
        return words
    row = Table.grid(padding=(0, 1))
    row.add_row(ProgressBar(total=100, completed=line.percent, width=24), Text(f"{line.percent:3}%"), words)
    return row


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """The course of the values in one line of text; where there are more than `width`, means of neighbours."""
    if len(values) > width:
        edges = [index * len(values) // width for index in range(width + 1)]
        values = [sum(values[low:high]) / (high - low) for low, high in pairwise(edges)]
    low, high = min(values), max(values)
    bars = "▁▂▃▄▅▆▇█"
    return "".join(bars[round((value - low) / ((high - low) or 1) * (len(bars) - 1))] for value in values)


def duration(seconds: float) -> str:
    """0.4 s, 12 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def size(count: float) -> str:
    """Bytes in powers of 1000, as disks count."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
