"""Writes docs/conditions.md (`make conditions`): every condition, and every reason with its meaning and its remedy.

Reasons of the operator are a table in the code, `api/reasons.py`. Those of steps stand where a step fails, with their
remedy beside them, and are collected from there: what is not literal is shown as "…". A test compares the page.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from finetune.api.conditions import MEANINGS
from finetune.api.reasons import REASONS

PAGE = Path(__file__).with_name("conditions.md")
STEPS = Path(__file__).parents[1] / "operator/finetune/steps"

HEAD = """# Conditions and reasons

Written by `make conditions`; do not edit.

Every condition has a `reason` of one word; so has every attempt in `status.attempts.history`. `kubectl finetune status
NAME` shows them with their messages, `kubectl finetune retry NAME` has a failed job go on where it failed.

`Ready`, `Reconciling` and `Stalled` follow from the others, for tools that know nothing of fine-tuning (kstatus: Argo
CD, Flux, `helm --wait`): a job on its way reconciles, a complete one is ready, a failed one is stalled with its reason.
`status.observedGeneration` is the generation of the spec that all of them are about, also after the end.
"""


class Failure(NamedTuple):
    """A place where a step fails."""

    reason: str
    where: str
    remedy: str


def page() -> str:
    """The page, as Markdown."""
    lines = [HEAD, "## Conditions", "", "| condition | holds when |", "|---|---|"]
    lines += [f"| `{kind}` | {meaning} |" for kind, meaning in MEANINGS.items()]
    lines += ["", "## Reasons that the operator gives", "", "| reason | what it means | what to do |", "|---|---|---|"]
    lines += [f"| `{reason}` | {told.meaning} | {told.remedy} |" for reason, told in REASONS.items()]
    lines += ["", "## Reasons that steps give", ""]
    lines += ["The message has the field, the value and the remedy with what was found in the place of each …", ""]
    lines += ["| reason | in | what to do |", "|---|---|---|"]
    lines += [f"| `{item.reason}` | {item.where} | {item.remedy} |" for item in failures()]
    return "\n".join(lines) + "\n"


def failures() -> list[Failure]:
    """Each reason of a step with each of its remedies, once."""
    found = {item for path in sorted(STEPS.rglob("*.py")) for item in _in_file(path)}
    told = {(item.reason, item.where) for item in found if item.remedy}
    return sorted(item for item in found if item.remedy or (item.reason, item.where) not in told)


def _in_file(path: Path) -> Iterator[Failure]:
    where = path.relative_to(STEPS).parts[0].removesuffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "StepFailure":
            _, *rest = node.args
            keywords = {item.arg: item.value for item in node.keywords}
            reason = rest[0] if rest else keywords.get("reason")
            remedy = rest[2] if len(rest) > 2 else keywords.get("hint")
            for word in _words(reason):
                yield Failure(word, where, _text(remedy).replace("|", "\\|").replace("\n", " "))


def _words(node: ast.expr | None) -> Iterator[str]:
    """The literal words that an expression may come to."""
    if isinstance(node, ast.IfExp):
        yield from (*_words(node.body), *_words(node.orelse))
    elif isinstance(node, ast.Constant):
        yield str(node.value)


def _text(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return "…" if node is not None else ""


if __name__ == "__main__":
    PAGE.write_text(page())
