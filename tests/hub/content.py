"""What the hub on the cluster serves: the real SmolLM2, the demo's dataset, and small things for end-to-end tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests import models

RULES = [
    {"match": "models/tests/gated/*", "action": "gate", "token": "hf_open_sesame"},
    {"match": "models/tests/truncated/model.safetensors", "action": "truncate", "size": 100_000},
    {"match": "models/tests/slow/*", "action": "throttle", "bytesPerSecond": 200_000},
]
ROWS = 240
DEMO_DATASET = Path(__file__).parents[2] / "manifests/examples/think-answer/dataset.py"


def write(folder: Path) -> None:
    """Fill the hub's folder anew; the real model is linked, not copied."""
    for kind in ("models", "datasets"):
        shutil.rmtree(folder / kind, ignore_errors=True)
    for name in ("tiny", "gated", "truncated", "slow"):
        models.tiny(folder / "models/tests" / name, hidden=128, layers=4, vocabulary=512)
    _link(models.smollm2(), folder / "models/HuggingFaceTB/SmolLM2-135M-Instruct")
    rows = folder / "datasets/tests/rows"
    rows.mkdir(parents=True)
    rows.joinpath("train.jsonl").write_text("".join(json.dumps(_row(number)) + "\n" for number in range(ROWS)))
    small = folder / "datasets/finetune/reasoning-small"
    small.mkdir(parents=True)
    with (small / "train.jsonl").open("wb") as file:
        subprocess.run([sys.executable, DEMO_DATASET], stdout=file, check=True)
    (folder / "rules.json").write_text(json.dumps(RULES))


def _row(number: int) -> dict[str, str]:
    first, second = number % 17 + 2, number % 13 + 3
    return {
        "instruction": f"What is {first} plus {second}?",
        "reasoning": f"Add {second} to {first}: the sum of {first} and {second} is {first + second}. " * 2,
        "output": f"It is {first + second}.",
    }


def _link(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for file in source.iterdir():
        os.link(file, target / file.name)
