"""What LoRA trained, published: merged into the model that was extended, or as an adapter that finds its base."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.api.contract import ExitCode
from finetune.steps.download.step import run as download
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.save.merging import merge
from finetune.steps.save.step import run as save
from finetune.steps.tokens.step import run as add_tokens
from finetune.steps.workspace.base_model import base_model
from finetune.steps.workspace.merge_record import Adapted, Block, Range, write_merge_record
from finetune.steps.workspace.token_record import read_record
from tests.models import tiny, write_safetensors
from tests.unit.steps.flow import Workshop
from tests.unit.steps.runs import TOKENS, Run, same

pytestmark = pytest.mark.slow

LORA = {"method": "LoRA", "learningRate": 3e-2, "maxSteps": 3}
"""A rate at which every block is far from where it began."""

TEXT = "3 plus one is<think>3 and 1</think> 4."


def published(folder: Path, output: str, **options: Any) -> Run:
    """A run that was trained and saved to pvc://data/out."""
    training = options.pop("training", LORA)
    run = Run.at(folder, training, output={"uri": "pvc://data/out", "format": output}, **options)
    run.go()
    save(run.job, run.workshop.layout)
    return run


def place(run: Run) -> Path:
    return run.workshop.layout.claims / "data/out"


def adapted(run: Run) -> Any:
    """The model as peft puts it together: the extended base and the trained adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32)
    return PeftModel.from_pretrained(base, run.trained).eval()


def logits(model: Any, ids: Any) -> torch.Tensor:
    with torch.no_grad():
        values: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return values


@pytest.mark.parametrize("model", [{"tied": True}, {"tied": False}, {"tied": False, "sharded": True}])
@pytest.mark.parametrize("training", [LORA, LORA | {"method": "QLoRA"}], ids=["LoRA", "QLoRA"])
def test_merged_it_computes_in_plain_transformers_what_base_and_adapter_do(
    model: dict[str, Any], training: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = published(tmp_path, "Merged", training=training, model=model | {"dtype": "float32"})
    tokenizer = AutoTokenizer.from_pretrained(place(run))
    merged = AutoModelForCausalLM.from_pretrained(place(run)).eval()
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert set(run.plan.new_rows) <= set(ids[0].tolist())
    theirs = logits(adapted(run), ids)
    assert torch.allclose(logits(merged, ids), theirs, atol=1e-4 * float(theirs.abs().max()))
    base = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32)
    assert not torch.allclose(logits(base, ids), theirs, atol=0.1 * float(theirs.abs().max()))
    assert not list(place(run).glob("adapter*"))


def test_merged_every_old_row_keeps_its_bytes_and_every_type_stays(tmp_path: Path) -> None:
    run = published(tmp_path, "Merged", model={"tied": False})
    before, after = load_file(run.base / "model.safetensors"), load_file(place(run) / "model.safetensors")
    new = set(run.plan.new_rows)
    old = [index for index in range(len(before["lm_head.weight"])) if index not in new]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(before[name][old], after[name][old])
        assert not torch.equal(before[name], after[name])
    assert {name: values.dtype for name, values in before.items()} == {
        name: values.dtype for name, values in after.items()
    }
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert unchanged == {name for name in before if "norm" in name}


def test_merging_rounds_once_and_peft_agrees_in_f32(tmp_path: Path) -> None:
    run = published(tmp_path, "Merged")
    ours = load_file(place(run) / "model.safetensors")
    theirs = adapted(run).merge_and_unload().state_dict()
    for name, values in ours.items():
        exact = theirs[name].float()
        step = exact.abs().clamp_min(1e-30) * 2.0**-8  # half a unit in the last place of bf16
        assert bool(((values.float() - exact).abs() <= step * 1.01 + 1e-8).all()), name


def test_the_adapter_finds_its_base_and_fills_the_new_rows(tmp_path: Path) -> None:
    """As the card says: the plain base, as many rows as the extended one, and the adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = published(tmp_path, "Adapter", model={"tied": False})
    folder = place(run)
    assert not (folder / "config.json").exists()
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tests/tiny"
    base = AutoModelForCausalLM.from_pretrained(run.workshop.layout.model, dtype=torch.float32)
    rows = json.loads((folder / "provenance.json").read_text())["base"]["embeddingRows"]
    base.resize_token_embeddings(rows, mean_resizing=False)
    model = PeftModel.from_pretrained(base, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids, tokens = tokenizer(TEXT, return_tensors="pt")["input_ids"], len(tokenizer)
    ours, theirs = (logits(each, ids)[..., :tokens] for each in (model, adapted(run)))  # beyond lies padding
    assert torch.allclose(ours, theirs, atol=1e-5)
    card = (folder / "README.md").read_text()
    assert f"base.resize_token_embeddings({rows}, mean_resizing=False)" in card
    assert "library_name: peft" in card
    assert [record.content for record in read_record(folder)] == ["<think>", "</think>"]


@pytest.mark.parametrize("output", ["Merged", "Adapter"])
def test_saved_again_nothing_is_written(output: str, tmp_path: Path) -> None:
    run = published(tmp_path, output)
    before = {path.name: path.stat().st_mtime_ns for path in place(run).iterdir()}
    result = save(run.job, run.workshop.layout).result
    assert result is not None and result["reused"] is True
    assert {path.name: path.stat().st_mtime_ns for path in place(run).iterdir()} == before


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    run = Run.at(tmp_path / "run", LORA)
    run.go()
    other = tiny(tmp_path / "other", hidden=32)
    with pytest.raises(StepFailure) as failure:
        merge(run.trained, other, tmp_path, lambda _: None)
    assert (failure.value.code, failure.value.error.reason) == (ExitCode.BAD_DATA, "NotMergeable")


MERGE = """
import resource, sys
from pathlib import Path
from finetune.steps.save.merging import merge
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge(*map(Path, sys.argv[1:]), lambda size: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, "torch" in sys.modules)
"""


def test_merging_takes_memory_for_a_block_not_for_the_model(tmp_path: Path) -> None:
    """400 MB of weights, four matrices of 100 MB, in less than 150 MB beyond what the imports take, without torch."""
    import numpy as np

    base, adapter, target = (tmp_path / name for name in ("base", "adapter", "target"))
    for folder in (base, adapter, target):
        folder.mkdir()
    rows, columns, rank = 8192, 6400, 4
    matrix = np.zeros((rows, columns), np.float32)
    write_safetensors(base / "model.safetensors", {f"layers.{i}.up.weight": matrix for i in range(4)}, "bfloat16")
    parts = {
        f"base_model.model.layers.{i}.up.lora_{part}.weight": np.ones(shape, np.float32)
        for i in range(4)
        for part, shape in (("A", (rank, columns)), ("B", (rows, rank)))
    }
    write_safetensors(adapter / "adapter_model.safetensors", parts, "float32")
    everywhere = (Range(0, rows - 1), Range(0, columns - 1))
    names = [f"layers.{i}.up" for i in range(4)]
    blocks = [(Block(f"{name}.weight", 0, 0, *everywhere),) for name in names]
    layers = [Adapted(name, places, scale=0.5) for name, places in zip(names, blocks, strict=True)]
    write_merge_record(adapter, layers)
    done = subprocess.run(
        [sys.executable, "-c", MERGE, str(adapter), str(base), str(target)], capture_output=True, text=True, check=True
    )
    kilobytes, torch_is_there = done.stdout.split()
    assert int(kilobytes) < 150_000
    assert torch_is_there == "False"
    merged = load_file(target / "model.safetensors")
    assert all(bool((values == 2.0).all()) for values in merged.values())


def second_job(first: Run, folder: Path, tokens: list[str]) -> Workshop:
    """A job whose model is what the first one published, up to its tokens."""
    folder.mkdir()
    workshop = Workshop(folder)
    workshop.layout.claims.symlink_to(first.workshop.layout.claims)
    job = workshop.job(model={"uri": "pvc://data/out"}, tokens={"add": [{"content": content} for content in tokens]})
    download(job, workshop.layout)
    add_tokens(job, workshop.layout)
    return workshop


def test_the_output_of_one_job_is_the_base_of_the_next_and_keeps_its_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    first = published(tmp_path / "first", "Merged", model={"tied": False})
    workshop = second_job(first, tmp_path / "second", ["<answer>", "<think>"])
    names = {path.name for path in workshop.layout.model.iterdir()}
    assert not names & {"finetune-tokens.json", "training.json", "provenance.json", "README.md", "loss.png"}
    folder = base_model(workshop.layout)
    assert [record.content for record in read_record(folder)] == ["<answer>"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for token in TOKENS:
        ids = tokenizer.encode(token["content"], add_special_tokens=False)
        assert ids == [first.plan.new_rows[TOKENS.index(token)]]
    before, after = load_file(place(first) / "model.safetensors"), load_file(folder / "model.safetensors")
    (new,) = (record.id for record in read_record(folder))
    for values in (before, after):
        values |= {name: values[name][:new] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    assert same(before, after)
    assert (folder / "chat_template.jinja").read_bytes() == (first.base / "chat_template.jinja").read_bytes()


def test_an_adapter_is_no_base_for_another_job(tmp_path: Path) -> None:
    first = published(tmp_path / "first", "Adapter")
    with pytest.raises(StepFailure) as failure:
        second_job(first, tmp_path / "second", ["<answer>"])
    assert failure.value.error.reason == "AdapterOnly"
    assert "Merged" in failure.value.error.hint
