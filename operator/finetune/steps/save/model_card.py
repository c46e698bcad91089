"""What lies beside the saved weights: where they come from (for machines and for people), and the loss curve."""

from __future__ import annotations

import json
import os
import re
import tempfile
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any

from finetune.api.contract import Layout, StepJob
from finetune.api.spec import Dataset, OutputFormat
from finetune.steps.model_files.config import read_config
from finetune.steps.save.charts import smoothed
from finetune.steps.save.report import REPORT, write_report
from finetune.steps.workspace.base_model import base_model
from finetune.steps.workspace.proof import read_proof
from finetune.steps.workspace.staging import published
from finetune.steps.workspace.token_record import read_record
from finetune.steps.workspace.training_record import read_training_record

PROVENANCE = "provenance.json"
CURVE = "loss.png"
SHOWN_TOKENS = 50

DEQUANTISING = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
"""What has transformers load a quantised base as the job had it, by the method that the base is quantised by."""

LOADING = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    "tokenizer = AutoTokenizer.from_pretrained(folder)",
    "model = AutoModelForCausalLM.from_pretrained(folder)",
)


def provenance(job: StepJob, layout: Layout, output: OutputFormat, sha256: str) -> dict[str, Any]:
    """Everything that the model depends on, and what came of it."""
    spec = job.spec
    training, downloaded = read_training_record(layout.trained), published(layout.model) or {}
    try:
        ours = version("finetune-operator")
    except PackageNotFoundError:
        ours = "unknown"
    return {
        "job": {"namespace": job.namespace, "name": job.name, "uid": job.uid, "created": job.created.isoformat()},
        "operator": ours,
        "base": {
            "uri": spec.model.uri,
            "revision": spec.model.revision,
            "commit": downloaded.get("commit"),
            "dequantized": downloaded.get("dequantized"),
            "embeddingRows": read_config(base_model(layout)).get("vocab_size"),
        },
        "format": output,
        "tokens": [
            {"content": record.content, "id": record.id, "init": record.init} for record in read_record(layout.trained)
        ],
        "reload": read_proof(layout.proof),
        "dataset": _dataset(spec.dataset, published(layout.dataset) or {}),
        "vocabulary": published(layout.prepared) or {},
        "training": training,
        "weights": {"sha256": sha256},
    }


def _dataset(dataset: Dataset, found: dict[str, Any]) -> dict[str, Any]:
    """What was asked for and what was found, source by source; the one to validate on is last."""
    asked: list[dict[str, Any]] = [source.wire() for _, source in dataset.places()]
    told: list[dict[str, Any]] = found.get("sources") or []
    sources = [one | other for one, other in zip_longest(asked, told, fillvalue=dict[str, Any]())]
    return {**found, "maxLength": dataset.max_length, "sources": sources}


def write_card(folder: Path, document: dict[str, Any]) -> None:
    """README.md, report.html, provenance.json and loss.png into the folder of the model."""
    (folder / PROVENANCE).write_text(json.dumps(document, indent=1, ensure_ascii=False, default=str) + "\n")
    if document["training"]["history"]:  # a trainer of the user's own leaves none
        draw_curve(document["training"]["history"], folder / CURVE, document["job"]["name"])
        write_report(folder, document)
    (folder / "README.md").write_text(card(document), encoding="utf-8")


def card(document: dict[str, Any]) -> str:
    """The model card: front matter for a hub, then what a reader wants to know."""
    base, training, data, job = (document[key] for key in ("base", "training", "dataset", "job"))
    more = f"More of it, attempt by attempt, on the [report page]({REPORT})."
    hub_name = base["uri"].removeprefix("hf://") if base["uri"].startswith("hf://") else None
    library = "peft" if document["format"] == OutputFormat.ADAPTER else "transformers"
    front = [f"library_name: {library}", "pipeline_tag: text-generation", "tags: [finetune-operator]"]
    if hub_name:
        front.append(f"base_model: {hub_name}")
    origin = f"[{hub_name}](https://huggingface.co/{hub_name})" if hub_name else f"`{base['uri']}`"
    commit = f" at commit `{base['commit']}`" if base["commit"] else ""
    plain = f" The base is published quantised: {base['dequantized']}." if base.get("dequantized") else ""
    lines = [
        "---",
        *front,
        "---",
        "",
        f"# {job['name']}",
        "",
        f"{origin}{commit}, fine-tuned by the FineTuneJob `{job['namespace']}/{job['name']}`.{plain}",
        "",
        "```python",
        *(_loading_adapter(base, bool(document["tokens"])) if document["format"] == OutputFormat.ADAPTER else LOADING),
        "```",
        "",
        *_tokens(document["tokens"]),
        "## Data",
        "",
        *_table(
            ("source", ", ".join(f"`{source['uri']}` {source['split']}" for source in data["sources"])),
            ("examples", f"{data.get('examples', 0):,}"),
            ("held out", f"{data.get('validationExamples', 0):,}"),
            ("tokens", f"{data.get('tokens', 0):,}, of which {data.get('trainedTokens', 0):,} carry loss"),
            ("digest of ids and labels", f"`{data.get('digest')}`"),
        ),
        "",
        "## Training",
        "",
        *([f"![loss]({CURVE})", "", more, ""] if training["history"] else []),
        *_table(*_metrics(training)),
        "",
        *_samples(training.get("samples") or []),
        "## Hyper-parameters",
        "",
        *_table(*((name, f"`{json.dumps(value)}`") for name, value in training["hyperparameters"].items())),
        "",
        f"Everything else, versions and environment included, is in [{PROVENANCE}]({PROVENANCE}).",
        "",
    ]
    return "\n".join(lines)


def _loading_adapter(base: dict[str, Any], extended: bool) -> list[str]:
    """How the adapter finds its base: the extended one is the base with further rows, which the adapter fills."""
    name, revision = base["uri"].removeprefix("hf://"), f', revision="{base["commit"]}"' if base["commit"] else ""
    method = (base["dequantized"] or "").partition(" ")[0]
    config = DEQUANTISING.get(method)
    options = f', dtype="bfloat16", quantization_config={config}(dequantize=True)' if config else ""
    unquantised = "base = base.dequantize()  # the adapter was trained on these weights" if method else None
    resize = f"base.resize_token_embeddings({base['embeddingRows']}, mean_resizing=False)  # the adapter has their rows"
    return [
        "from peft import PeftModel",
        *LOADING[:3],
        *([f"from transformers import {config}"] if config else []),
        f'base = AutoModelForCausalLM.from_pretrained("{name}"{revision}{options})',
        *([unquantised] if unquantised and not config else []),
        *([resize] if extended else []),
        "model = PeftModel.from_pretrained(base, folder)",
    ]


def _tokens(tokens: list[dict[str, Any]]) -> list[str]:
    if not tokens:
        return []
    names = ", ".join(f"`{token['content']}`" for token in tokens[:SHOWN_TOKENS])
    more = f" and {len(tokens) - SHOWN_TOKENS:,} more" if len(tokens) > SHOWN_TOKENS else ""
    return ["## New tokens", "", f"{names}{more}.", ""]


def _samples(samples: list[dict[str, str]]) -> list[str]:
    if not samples:
        return []
    lines = ["## Before and after", "", "The same prompts, answered greedily."]
    for sample in samples:
        lines += ["", "**Prompt**", "", *_quoted(sample["prompt"])]
        for when in ("before", "after"):
            lines += ["", f"**{when.capitalize()}**", "", *_quoted(sample[when] or "(nothing)")]
    return [*lines, ""]


def _quoted(text: str) -> list[str]:
    """As code, whatever is in it: a fence longer than any that the text holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"{fence}text", *text.splitlines(), fence]


def _metrics(training: dict[str, Any]) -> list[tuple[str, str]]:
    if "trainer" in training:  # the user's own, which left no record that we could read
        command = " ".join(training["command"] or ())
        return [("trainer", f"`{training['trainer']}`"), *([("command", f"`{command[:200]}`")] if command else [])]
    history = training["history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    held_out = [entry["validationLoss"] for entry in history if "validationLoss" in entry]
    rows = [("steps", f"{training['steps']:,}")]
    if losses:
        rows.append(("loss, first and last step", f"{losses[0]:.4f} → {losses[-1]:.4f}"))
    if held_out:
        rows.append(("validation loss", f"{held_out[-1]:.4f}"))
    rows += [
        ("time", f"{training['seconds']:,.0f} s on {training['environment']['device']}"),
        ("throughput", f"{training['tokensPerSecond'] or 0:,.0f} tokens/s"),
        ("peak memory", f"{training['peakMemoryBytes'] / (1 << 30):.2f} GiB"),
    ]
    if training["resumptions"]:
        steps = ", ".join(map(str, training["resumptions"]))
        rows.append(("resumed after step", f"{steps} ({'bit-exact' if training['exact'] else 'not bit-exact'})"))
    return rows


def _table(*rows: tuple[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def draw_curve(history: list[dict[str, float]], path: Path, title: str) -> None:
    """The training loss, its running mean, the validation loss, and the learning rate beneath."""
    os.environ.setdefault("MPLCONFIGDIR", tempfile.gettempdir())  # matplotlib's own is in a home that a pod lacks
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [entry["step"] for entry in history if "loss" in entry]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    held_out = [(entry["step"], entry["validationLoss"]) for entry in history if "validationLoss" in entry]
    rates = [(entry["step"], entry["learningRate"]) for entry in history if "learningRate" in entry]
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    upper.plot(steps, losses, color="#9ecae1", linewidth=1, label="loss of each step")
    upper.plot(steps, smoothed(losses), color="#08519c", linewidth=2, label="running mean")
    if held_out:
        upper.plot(*zip(*held_out, strict=True), "o-", color="#e6550d", markersize=5, label="validation loss")
    if rates:
        lower.plot(*zip(*rates, strict=True), color="#756bb1", linewidth=1.5)
    upper.set_title(title, loc="left", fontweight="bold")
    upper.set_ylabel("loss per token")
    upper.legend(frameon=False)
    lower.set_ylabel("learning rate")
    lower.set_xlabel("step")
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=120, metadata={"Software": None})
