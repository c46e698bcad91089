"""The columns of tokens and training: `tokens` adds two, `reload` proves the extended model, `Full` and `LoRA` train a
step, the published folder of the one loads strictly with every tensor that the base has, that of the other answers as
base and adapter do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from finetune.steps.reload import step as reload
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.save.step import run as save
from tests.families.loading import IDS, downloaded, loaded, logits_of
from tests.unit.steps.jobs import report_of
from tests.unit.steps.runs import Run

COLUMNS = ("tokens", "reload", "Full", "LoRA", "merge")


def training_cells(make: Callable[[Path], Any], folder: Path) -> dict[str, str]:
    """The cells of a checkpoint that `make` writes, run in an empty folder."""
    cells: dict[str, str] = {}
    try:
        base = downloaded(folder, make)
    except StepFailure as failure:
        return dict.fromkeys(COLUMNS[:2], said(failure))
    options: dict[str, Any] = {"model": base, "dataset": {"packing": "Disabled"}}
    try:
        run = Run.at(folder / "tokens", {}, **options)
        cells["tokens"] = "yes"
    except StepFailure as failure:
        cells["tokens"] = said(failure)
        run = None
    cells["reload"] = cell(lambda: reload.run(run.job, run.workshop.layout) if run else report_of(reload, folder, {}))
    if cells["reload"] == "yes":
        cells["Full"] = cell(lambda: _whole(folder / "full", options))
        adapted: list[Run] = []
        cells["LoRA"] = cell(lambda: adapted.append(_trained(folder / "lora", {"method": "LoRA"}, options)))
        cells["merge"] = cell(lambda: _merged(adapted[0])) if adapted else "no"
    return cells


def _trained(folder: Path, training: dict[str, Any], options: dict[str, Any]) -> Run:
    settings = {"maxSteps": 1, "learningRate": 1e-2} | training
    run = Run.at(folder, settings, output={"uri": "pvc://data/out"}, **options)
    run.go()
    return run


def _published(run: Run) -> Path:
    save(run.job, run.workshop.layout)
    return run.workshop.layout.claims / "data/out"


def _whole(folder: Path, options: dict[str, Any]) -> None:
    run = _trained(folder, {"method": "Full"}, options)
    published = _published(run)
    before, after = (load_file(each / "model.safetensors") for each in (run.base, published))
    assert [*before] == [*after], "not the tensors of the base"
    assert any(not torch.equal(before[name], after[name]) for name in before), "nothing was trained"
    logits_of(published)


def _merged(run: Run) -> None:
    from peft import PeftModel

    from finetune.steps.train.methods.model import with_bias

    ours = logits_of(_published(run))
    model = with_bias(PeftModel.from_pretrained(loaded(run.base), run.trained)).eval()
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([IDS]), use_cache=False).logits
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    dtypes = {values.dtype for values in load_file(run.base / "model.safetensors").values()}
    rounding = 5e-2 if torch.bfloat16 in dtypes else 1e-3
    assert difference < rounding, f"logits off by {difference:.1g}"


def cell(run: Callable[[], Any]) -> str:
    """What became of a run."""
    try:
        run()
    except StepFailure as failure:
        return said(failure)
    except Exception as error:
        return f"FAILS: {type(error).__name__}: {str(error).partition(chr(10))[0][:80]}"
    return "yes"


def said(failure: StepFailure) -> str:
    """A refusal in a cell."""
    return f"refused: {failure.error.reason}"
