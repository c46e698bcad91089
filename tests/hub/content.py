"""What the hub on the cluster serves: the real SmolLM2, the demo's dataset, and small things for end-to-end tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tests import models, poems

RULES = [
    {"match": "models/tests/gated/*", "action": "gate", "token": "hf_open_sesame"},
    {"match": "models/tests/truncated/model.safetensors", "action": "truncate", "size": 100_000},
    {"match": "models/tests/slow/*", "action": "throttle", "bytesPerSecond": 200_000},
]
ROWS = 240
SENTENCES = models.CORPUS.splitlines()
"""The English that the tiny model's tokenizer was trained on."""

DEMO_DATASET = Path(__file__).parents[2] / "manifests/examples/think-answer/dataset.py"


def write(folder: Path) -> None:
    """Fill the hub's folder anew; the real model is linked, not copied."""
    for kind in ("models", "datasets"):
        shutil.rmtree(folder / kind, ignore_errors=True)
    for name in ("tiny", "gated", "truncated", "slow"):
        models.tiny(folder / "models/tests" / name, hidden=128, layers=4, vocabulary=512)
    _link(models.smollm2(), folder / "models/HuggingFaceTB/SmolLM2-135M-Instruct")
    rows = [_row(number) for number in range(ROWS)]
    texts = {"poems": _texts(poems.at_hand()), "english": _texts(SENTENCES)}
    for name, content in {"rows": rows, "pairs": [_pair(row) for row in rows], **texts}.items():
        dataset = folder / "datasets/tests" / name
        dataset.mkdir(parents=True)
        dataset.joinpath("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    small = folder / "datasets/finetune/reasoning-small"
    small.mkdir(parents=True)
    with (small / "train.jsonl").open("wb") as file:
        subprocess.run([sys.executable, DEMO_DATASET], stdout=file, check=True)
    (folder / "rules.json").write_text(json.dumps(RULES))


def _texts(texts: Iterable[str]) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


def _row(number: int) -> dict[str, str]:
    first, second = number % 17 + 2, number % 13 + 3
    return {
        "instruction": f"What is {first} plus {second}?",
        "reasoning": f"Add {second} to {first}: the sum of {first} and {second} is {first + second}. " * 2,
        "output": f"It is {first + second}.",
    }


def _pair(row: dict[str, str]) -> dict[str, str]:
    return {"prompt": row["instruction"], "chosen": f" {row['output']}", "rejected": f" {row['reasoning']}"}


def _link(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for file in source.iterdir():
        os.link(file, target / file.name)
