"""docs/families.md as text, and its cells again from the text.

A cell is `yes`, `-` (there is nothing to run), or what was said instead; `yes; ...` says more. The page shows marks,
and what was said in footnotes, each once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

PATH = Path(__file__).parents[2] / "docs/families.md"
YES, NO, NOTHING = "✓", "✗", "·"

Cells = Mapping[str, str]
_MARK = re.compile(rf"({YES}|{NO}|{NOTHING})(?:\[\^(\d+)\])?")
_NOTE = re.compile(r"^\[\^(\d+)\]: (.*)$", re.MULTILINE)


class Notes:
    """What was said in cells, in the order in which it is first said."""

    def __init__(self) -> None:
        self._texts: dict[str, int] = {}

    def mark(self, cell: str) -> str:
        """How the page shows a cell."""
        if cell == "-":
            return NOTHING
        kind, _, said = cell.partition("; ") if cell.startswith("yes") else ("", "", cell)
        mark = YES if kind else NO
        said = " ".join(said.split())
        return f"{mark}[^{self._texts.setdefault(said, len(self._texts) + 1)}]" if said else mark

    def lines(self) -> Iterable[str]:
        """The footnotes."""
        return (f"[^{number}]: {_plain(text)}" for text, number in self._texts.items())


def table(heading: str, columns: Sequence[str], rows: Mapping[str, Cells], notes: Notes) -> list[str]:
    """The lines of a table whose first column has the names of the rows."""
    lines = [f"| {heading} | {' | '.join(columns)} |", "|---|" + ":-:|" * len(columns)]
    for name, cells in rows.items():
        marks = (notes.mark(cells.get(column, "-")) for column in columns)
        lines.append(f"| `{name}` | {' | '.join(marks)} |")
    return [*lines, ""]


def recorded(text: str) -> dict[str, dict[str, str]]:
    """The cells of every row of a page, by the row's name and the column."""
    notes = {number: said.replace("&lt;", "<").replace("&#124;", "|") for number, said in _NOTE.findall(text)}
    rows: dict[str, dict[str, str]] = {}
    columns: list[str] = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.strip("|").split(" | ")]
        if line.startswith("| `"):
            rows[parts[0].strip("`")] = dict(zip(columns, (_cell(part, notes) for part in parts[1:]), strict=True))
        elif line.startswith("| "):
            columns = parts[1:]
    return rows


def _cell(shown: str, notes: Mapping[str, str]) -> str:
    found = _MARK.fullmatch(shown)
    assert found, shown
    mark, number = found.groups()
    said = notes[number] if number else ""
    return {NOTHING: "-", NO: said, YES: f"yes; {said}" if said else "yes"}[mark]


def _plain(text: str) -> str:
    """A note whose tokens are not taken for HTML or a table."""
    return text.replace("<", "&lt;").replace("|", "&#124;")
