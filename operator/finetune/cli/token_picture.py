"""How new tokens look in a terminal: what they are made of, what they change, and what was proven about them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from finetune.api.token_plan import PlannedToken, TokenPlan
from finetune.cli.picture import size

SHOWN = 40
"""Tokens that a terminal shows; a file or a pipe gets all."""

PIECES = ("cyan", "magenta")
"""Neighbouring pieces differ in colour, so that spaces at their ends are seen."""


def plan_picture(plan: TokenPlan, *, everything: bool) -> RenderableType:
    """Each token, then the model before and after."""
    shown = plan.tokens if everything else plan.tokens[:SHOWN]
    parts: list[RenderableType] = [_tokens(shown)] if shown else [Text("no token is new", style="yellow")]
    if len(shown) < len(plan.tokens):
        parts.append(Text(f"… and {len(plan.tokens) - len(shown):,} more; redirect the output to see all", style="dim"))
    if plan.already_present:
        names = ", ".join(f"{visible(item.text)} ({item.id})" for item in plan.already_present[:8])
        more = ", …" if len(plan.already_present) > 8 else ""
        parts.append(Text.assemble(("there already: ", "bold"), names, more))
    parts.append(_change(plan))
    parts += [Text.assemble(("warning: ", "yellow"), warning) for warning in plan.warnings]
    return Group(*parts)


def proof_picture(file: Path, sentence: str) -> RenderableType:
    """What reload found, from its file."""
    proof = json.loads(file.read_text())
    parts: list[RenderableType] = []
    if chances := proof["probabilities"][:SHOWN]:
        parts.append(_chances(chances, proof["message"]))
    proven, *_ = sentence.partition("; not proven: ")
    parts.append(Text.assemble(("✔ proven: ", "green"), proven))
    parts += [Text.assemble(("not proven: ", "yellow"), gap["what"], f": {gap['why']}") for gap in proof["notProven"]]
    return Group(*parts)


def visible(text: str) -> str:
    """A text whose spaces at the ends are seen."""
    inner = text.strip(" ")
    start = len(text) - len(text.lstrip(" "))
    return "␣" * start + inner + "␣" * (len(text) - len(inner) - start)


def _tokens(tokens: Sequence[PlannedToken]) -> RenderableType:
    table = _table("new tokens")
    table.add_column("token", overflow="fold")
    table.add_column("id", justify="right", no_wrap=True)
    table.add_column("its pieces until now", overflow="fold")
    table.add_column("their ids", style="dim", overflow="fold")
    table.add_column("starts as", overflow="fold")
    for token in tokens:
        pieces = Text()
        for piece, style in zip(token.pieces, cycle(PIECES), strict=False):
            pieces.append(piece.text.replace(" ", "␣"), style=style)
        kind = (" special", "dim") if token.special else ""
        name = Text.assemble((visible(token.content), "bold green"), kind)
        ids = " ".join(str(piece.id) for piece in token.pieces)
        table.add_row(name, f"{token.id:,}", pieces, ids, _start(token.init))
    return table


def _start(init: Mapping[str, Any]) -> str:
    if "copyOf" in init:
        words = f"a copy of {init['copyOf']}"
    elif "meanOf" in init:
        what = {"Pieces": "its pieces", "Vocabulary": "the vocabulary", "Description": "its description"}
        words = f"the mean of {what[init['meanOf']]}"
    else:
        words = "a draw from the old rows' distribution"
    return f"{words}, with noise {init['noise']}" if init.get("noise") else words


def _change(plan: TokenPlan) -> RenderableType:
    table = _table("the model")
    table.add_column("")
    table.add_column("before", justify="right", no_wrap=True)
    table.add_column("after", justify="right", no_wrap=True)
    table.add_row("tokens", f"{plan.vocabulary_size_before:,}", f"{plan.vocabulary_size:,}")
    for matrix in plan.matrices:
        name = Text.assemble(matrix.name, (f" {matrix.dtype}", "dim"))
        table.add_row(name, _shape(matrix.shape_before), _shape(matrix.shape))
    more = plan.size_bytes - plan.size_bytes_before
    after = Text.assemble((f"+{size(more)}  " if more else "", "dim"), size(plan.size_bytes))
    table.add_row("weights on disk", size(plan.size_bytes_before), after)
    return table


def _chances(chances: Sequence[Mapping[str, Any]], message: str) -> RenderableType:
    table = _table(f"how likely each token is right after “{message}”")
    table.add_column("token", style="bold green", overflow="fold")
    places = [("withoutPrompt", "the message"), ("withPrompt", "the generation prompt")]
    places = [(name, title) for name, title in places if any(item.get(name) is not None for item in chances)]
    for _, title in places:
        table.add_column(f"after {title}\nbefore", justify="right", no_wrap=True)
        table.add_column("\nafter", justify="right", no_wrap=True)
    for item in chances:
        numbers = [item.get(key) for name, _ in places for key in (f"{name}Before", name)]
        table.add_row(visible(item["token"]), *("" if number is None else f"{number:.3g}" for number in numbers))
    return table


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(f"{length:,}" for length in shape)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=box.SIMPLE_HEAD)
