"""report.html beside the saved weights: what the job did, on one page that loads nothing from anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment

from finetune.steps.runtime.disk import in_words
from finetune.steps.save.charts import Series, chart, smoothed

REPORT = "report.html"
TEMPLATE = Path(__file__).with_name("report.html")
SHOWN_TOKENS = 200

Document = Mapping[str, Any]


def write_report(folder: Path, document: Document) -> None:
    """The page, from the record that `provenance` makes."""
    (folder / REPORT).write_text(page(document), encoding="utf-8")


def page(document: Document) -> str:
    """The HTML. Texts of users and of the model are escaped."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"duration": duration, "size": in_words, "json": _json, "moment": _moment, "chance": _chance}
    training = document["training"]
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        **document,
        charts=curves(training["history"]),
        tiles=tiles(document),
        attempts=attempts(training.get("attempts") or ()),
        probabilities=probabilities(document),
        shown=SHOWN_TOKENS,
    )


def curves(history: list[dict[str, float]]) -> dict[str, Any]:
    """The loss and the learning rate over the steps, as far as they were recorded."""

    def points(name: str) -> list[tuple[float, float]]:
        return [(entry["step"], entry[name]) for entry in history if name in entry]

    loss, rate, norm = points("loss"), points("learningRate"), points("gradientNorm")
    steps = [step for step, _ in loss]
    mean = list(zip(steps, smoothed([value for _, value in loss]), strict=True))
    drawn = {}
    if loss:
        series = [Series("each step", "raw", loss), Series("running mean", "mean", mean)]
        drawn["loss"] = chart([*series, Series("held-out rows", "held-out", points("validationLoss"), dots=True)], 320)
    if rate:
        drawn["learning rate"] = chart([Series("learning rate", "rate", rate)], 130)
    if norm:
        drawn["gradient norm"] = chart([Series("gradient norm", "norm", norm)], 130)
    return drawn


def tiles(document: Document) -> list[tuple[str, str, str]]:
    """Label, number and remark of what a reader looks for first."""
    training, data = document["training"], document["dataset"]
    losses = [entry["loss"] for entry in training["history"] if "loss" in entry]
    held_out = [entry["validationLoss"] for entry in training["history"] if "validationLoss" in entry]
    found = []
    if losses:
        mean = smoothed(losses)
        found.append(("training loss", f"{mean[-1]:.4f}", f"from {losses[0]:.4f}"))
    if held_out:
        found.append(("held-out loss", f"{held_out[-1]:.4f}", f"from {held_out[0]:.4f}" if held_out[1:] else ""))
    examples = f"{data.get('examples', 0):,} examples"
    found.append(("steps", f"{training['steps']:,}", examples))
    found.append(("time", duration(training["seconds"]), f"on {training['environment']['device']}"))
    found.append(("throughput", f"{training['tokensPerSecond'] or 0:,.0f}", "tokens/s"))
    found.append(("peak memory", in_words(training["peakMemoryBytes"]), ""))
    if document["tokens"]:
        rows = document["vocabulary"].get("embeddingRows")
        found.append(("new tokens", f"{len(document['tokens']):,}", f"{rows:,} rows" if rows else ""))
    return found


def attempts(entries: Any) -> list[dict[str, Any]]:
    """Each attempt with its length and how it ended; the last wrote the record and so was the one that finished."""
    rows = []
    for number, entry in enumerate(entries, 1):
        over = number == len(entries)
        end = entry.get("end")
        seconds = (
            (datetime.fromisoformat(end) - datetime.fromisoformat(entry["start"])).total_seconds() if end else None
        )
        rows.append(
            {
                "number": number,
                "start": entry["start"],
                "seconds": seconds,
                "from": entry["resumedFromStep"],
                "reason": "Succeeded" if over else entry.get("reason", ""),
                "message": "" if over else entry.get("message", ""),
                "passedOver": entry.get("passedOver", ()),
            }
        )
    return rows


def probabilities(document: Document) -> list[dict[str, Any]]:
    """Each new token's chance as the next token: in the base model, right after its initialisation, and trained."""
    trained = {item["token"]: item for item in document["training"].get("probabilities") or ()}
    return [
        {
            "token": item["token"],
            "stages": [
                (item.get(f"{place}Before"), item.get(place), trained.get(item["token"], {}).get(place))
                for place in ("withoutPrompt", "withPrompt")
            ],
        }
        for item in document["reload"].get("probabilities", ())
        if item["token"] in trained or not trained
    ]


def duration(seconds: float) -> str:
    """As people say it: 4.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _moment(text: str) -> str:
    return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M:%S UTC")


def _chance(value: float | None) -> str:
    """Three digits; what is nearly impossible in powers of ten."""
    if value is None:
        return "–"
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"
