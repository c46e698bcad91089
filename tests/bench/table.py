"""How benchmarks show and keep their results: a table for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).resolve().parents[2] / "build" / "bench"

LEAST_WIDTH = 120
"""Columns of the table where the output is no terminal, or a narrow one."""


@dataclass(frozen=True)
class Row:
    """One measurement; `goal` in words (empty: none), `met` when there is one."""

    case: str
    metric: str
    value: float
    unit: str
    goal: str = ""
    met: bool | None = None


def write(name: str, rows: Sequence[Row], title: str = "", notes: Sequence[str] = ()) -> bool:
    """Print the table, write build/bench/NAME.json, and say whether every goal is met."""
    table = Table(title=title or name, title_justify="left")
    for heading in ("case", "metric"):
        table.add_column(heading, no_wrap=True)
    table.add_column("value", justify="right")
    for heading in ("unit", "goal", ""):
        table.add_column(heading)
    shown = ""
    for row in rows:
        if shown and row.case != shown:
            table.add_section()
        verdict = {None: "", True: "[green]met[/]", False: "[red]missed[/]"}[row.met]
        table.add_row(
            row.case if row.case != shown else "", row.metric, f"{row.value:,.4g}", row.unit, row.goal, verdict
        )
        shown = row.case
    console = Console(width=max(Console().width, LEAST_WIDTH))
    console.print(table)
    for note in notes:
        console.print(f"  {note}", highlight=False)
    FOLDER.mkdir(parents=True, exist_ok=True)
    content = {"rows": [asdict(row) for row in rows], "notes": list(notes)}
    (FOLDER / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    return all(row.met is not False for row in rows)
