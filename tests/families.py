"""What each family of models can do here, run on tiny random checkpoints with the tensor names of published ones:
`make families` writes docs/families.md, and a test runs some of the rows anew.

Each cell is a run on the job's own copy, in which quantised weights are written out: `tokens` adds two, `reload` proves
the extended model, `Full` and `LoRA` train a step, the published folder of the one loads strictly with every tensor
that the base has, that of the other answers as base and adapter do.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from finetune.steps.download import step as download
from finetune.steps.reload.step import run as reload
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.save.step import run as save
from tests.unit.steps.families import edit_config, tiny_of
from tests.unit.steps.jobs import report_of
from tests.unit.steps.published import with_prediction_layer
from tests.unit.steps.quantised import KINDS
from tests.unit.steps.runs import Run

DOCUMENT = Path(__file__).parents[1] / "docs/families.md"
COLUMNS = ("tokens", "reload", "Full", "LoRA", "merge")
IDS = [5, 9, 40, 41]

DENSE = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "gpt_neox", "gptj",
    "falcon", "bloom", "opt", "olmo2", "granite", "smollm3", "stablelm", "starcoder2", "glm4",
)  # fmt: skip
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "phimoe", "granitemoe", "gpt_oss")
PREDICTING = ("glm4_moe", "deepseek_v3", "qwen3_5")
REFUSED = ("t5", "bart", "bert")


class Family(NamedTuple):
    """A row: its kind, the model_type with what is special about it, and how a checkpoint is made."""

    kind: str
    name: str
    make: Callable[[Path], Any]


def _plain(family: str, **settings: Any) -> Callable[[Path], Any]:
    return lambda folder: tiny_of(folder, family, dtype=torch.float32, **settings)


def _declared(family: str, **config: Any) -> Callable[[Path], Any]:
    def make(folder: Path) -> None:
        tiny_of(folder, "llama")
        edit_config(folder, **({"model_type": family, "architectures": None} | config))

    return make


FAMILIES = (
    *(Family("dense", name, _plain(name)) for name in DENSE),
    *(Family("experts", name, _plain(name)) for name in EXPERTS),
    Family("several parts", "gemma3", _plain("gemma3")),
    *(
        Family(
            "prediction layer",
            name,
            lambda folder, name=name: with_prediction_layer(folder, name, copies=name != "qwen3_5"),
        )  # type: ignore[misc]
        for name in PREDICTING
    ),
    *(Family("quantised", name, make) for name, make in KINDS.items()),
    *(
        Family("quantised", f"llama ({method})", _declared("llama", quantization_config={"quant_method": method}))
        for method in ("gptq", "awq", "modelopt", "hqq", "torchao")
    ),
    *(Family("no decoder", name, _declared(name)) for name in REFUSED),
)


def row_of(family: Family, folder: Path) -> dict[str, str]:
    """The cells of a family's row, run in an empty folder."""
    (folder / "claims/models").mkdir(parents=True)
    family.make(folder / "claims/models/base")
    cells: dict[str, str] = {}
    try:
        model = _downloaded(folder)
    except StepFailure as failure:
        return dict.fromkeys(COLUMNS[:2], _said(failure))
    options: dict[str, Any] = {"model": model, "dataset": {"packing": "Disabled"}}
    try:
        run = Run.at(folder / "tokens", {}, **options)
        cells["tokens"] = "yes"
    except StepFailure as failure:
        cells["tokens"] = _said(failure)
        run = None
    cells["reload"] = _cell(lambda: reload(run.job, run.workshop.layout) if run else _reloaded(folder, options))
    if cells["reload"] == "yes":
        cells["Full"] = _cell(lambda: _whole(folder / "full", options))
        adapted: list[Run] = []
        cells["LoRA"] = _cell(lambda: adapted.append(_trained(folder / "lora", {"method": "LoRA"}, options)))
        cells["merge"] = _cell(lambda: _merged(adapted[0])) if adapted else "no"
    return cells


def _downloaded(folder: Path) -> Path:
    """The job's own copy of the checkpoint in the claim."""
    report_of(download, folder, {"model": {"uri": "pvc://models/base"}})
    return folder / "model"


def _reloaded(folder: Path, options: dict[str, Any]) -> None:
    run = Run.at(folder / "plain", {}, tokens=None, **options)
    reload(run.job, run.workshop.layout)


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
    _logits(published)


def _merged(run: Run) -> None:
    from peft import PeftModel

    from finetune.steps.train.methods.model import with_bias

    ours = _logits(_published(run))
    model = with_bias(PeftModel.from_pretrained(_loaded(run.base), run.trained)).eval()
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([IDS]), use_cache=False).logits
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    dtypes = {values.dtype for values in load_file(run.base / "model.safetensors").values()}
    rounding = 5e-2 if torch.bfloat16 in dtypes else 1e-3
    assert difference < rounding, f"logits off by {difference:.1g}"


def _loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"], "does not load strictly"
    return model.eval()


def _logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        values: torch.Tensor = _loaded(folder)(input_ids=torch.tensor([IDS]), use_cache=False).logits
    assert torch.isfinite(values).all(), "logits are not finite"
    return values


def _cell(run: Callable[[], Any]) -> str:
    try:
        run()
    except StepFailure as failure:
        return _said(failure)
    except Exception as error:
        return f"FAILS: {type(error).__name__}: {str(error).partition(chr(10))[0][:80]}"
    return "yes"


def _said(failure: StepFailure) -> str:
    return f"refused: {failure.error.reason}"


def line(family: Family, cells: dict[str, str]) -> str:
    """A row of the table."""
    return " | ".join([f"| {family.kind}", f"`{family.name}`", *(cells.get(column, "-") for column in COLUMNS)]) + " |"


INTRODUCTION = """# Families of models

Made by `make families`: each cell was run, on tiny random weights with the tensor names of published checkpoints, and
none is from memory. `yes` in `Full` and `merge` means that the published folder has every tensor of the base under its
name, loads strictly, and (merged) answers as base and adapter do. A refusal comes before training, with its remedy.
What is published quantised is written out in bf16 first: its base is that.
"""


def main() -> None:
    """Write the document."""
    logging.disable()
    lines = [INTRODUCTION, f"| kind | model_type | {' | '.join(COLUMNS)} |", "|" + "---|" * (2 + len(COLUMNS))]
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(line(family, row_of(family, Path(folder))))
        print(lines[-1], file=sys.stderr, flush=True)
    DOCUMENT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
