"""Packed rows in training: positions begin anew, examples do not see one another, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.steps.dataset.step import run as load_dataset
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.train.data.examples import Collator, Examples, tokens_in
from finetune.steps.train.data.isolation import TOLERANCE, require_isolated
from finetune.steps.train.plan import Plan
from tests.unit.steps.flow import Workshop
from tests.unit.steps.test_train_parts import trained

ROWS = [{"prompt": f"{number} plus one is", "completion": f" {number + 1}." * (number % 5 + 1)} for number in range(24)]


def loaded(folder: Path, dataset: dict[str, Any], **training: Any) -> tuple[Workshop, Plan]:
    workshop = Workshop.at(folder)
    workshop.write("rows.jsonl", ROWS)
    job = workshop.job(dataset=dataset, training={"maxSteps": 3} | training)
    load_dataset(job, workshop.layout)
    return workshop, Plan.of(job, workshop.layout)


def packed(folder: Path) -> Examples:
    workshop, _ = loaded(folder, {"packing": "Enabled", "maxLength": 64})
    return Examples(workshop.layout.dataset / "train")


def model_of(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8}
    names = {} if kind in ("gpt2", "bloom", "falcon") else more
    config = AutoConfig.for_model(kind, **sizes, **names, **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # of a size at which a wrong context shows
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_positions_begin_anew_with_every_example(tmp_path: Path) -> None:
    rows = packed(tmp_path)
    assert rows.packed
    assert len(rows) < len(ROWS) / 2
    for row in (rows[index] for index in range(len(rows))):
        starts = (row["position_ids"] == 0).nonzero().flatten().tolist()
        lengths = [end - start for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True)]
        assert row["position_ids"].tolist() == [place for length in lengths for place in range(length)]
        assert (row["labels"][starts] == -100).all()


def test_a_packed_batch_has_positions_instead_of_a_mask_and_no_cache(tmp_path: Path) -> None:
    rows = packed(tmp_path)
    examples = [rows[0], {name: values[:5] for name, values in rows[1].items()}]
    batch = Collator(pad=2)(examples)
    assert set(batch) == {"input_ids", "position_ids", "use_cache", "labels"}
    assert batch["use_cache"] is False
    assert batch["position_ids"][1, 5:].eq(0).all()
    assert batch["labels"][1, 5:].eq(-100).all()
    assert int(tokens_in(batch)) == len(examples[0]["input_ids"]) + 5


def test_tokens_of_an_unpacked_batch_are_those_of_its_mask() -> None:
    examples = [{"input_ids": torch.arange(length), "labels": torch.arange(length)} for length in (3, 7)]
    assert int(tokens_in(Collator(pad=0)(examples))) == 10


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {}), ("qwen3", {}), ("gpt2", {}), ("mistral", {"sliding_window": 16}), ("gemma3_text", {})],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_models_of_attention_and_positions_keep_packed_examples_apart(
    tmp_path: Path, kind: str, options: dict[str, Any], attention: str
) -> None:
    model = model_of(kind, attn_implementation=attention, **options)
    assert require_isolated(model, packed(tmp_path), Collator(pad=2)) < TOLERANCE / 4


@pytest.mark.parametrize(("kind", "options"), [("bloom", {"n_head": 4}), ("mamba", {}), ("falcon", {"alibi": True})])
def test_models_that_do_not_are_found_out_whatever_their_name(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    with pytest.raises(StepFailure) as failure:
        require_isolated(model_of(kind, **options), packed(tmp_path), Collator(pad=2))
    assert failure.value.error.reason == "PackingNotIsolated"


def test_a_mask_of_ones_would_be_found_out(tmp_path: Path) -> None:
    class Masking(Collator):
        def __call__(self, examples: Any) -> Any:
            batch = super().__call__(examples)
            return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}

    with pytest.raises(StepFailure, match="differ by"):
        require_isolated(model_of("llama"), packed(tmp_path), Masking(pad=2))


def test_the_proof_leaves_the_model_and_the_random_numbers_as_they_were(tmp_path: Path) -> None:
    rows, model = packed(tmp_path), model_of("llama").train()
    before, state = torch.cat([each.flatten().clone() for each in model.parameters()]), torch.get_rng_state()
    require_isolated(model, rows, Collator(pad=2))
    assert model.training
    assert torch.equal(torch.cat([each.flatten() for each in model.parameters()]), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_packing_changes_the_rows_and_not_the_loss(tmp_path: Path) -> None:
    """One batch of all examples, packed and not: the same mean over the same learned tokens."""
    plain = loaded(tmp_path / "plain", {"validation": {"fraction": 0.1}}, batchSize=21, maxSteps=1)
    dataset = {"packing": "Enabled", "maxLength": 2048, "validation": {"fraction": 0.1}}
    one_row = loaded(tmp_path / "packed", dataset, batchSize=1, maxSteps=1)
    assert (plain[1].examples, one_row[1].examples) == (21, 1)
    assert trained(*one_row)[0] == pytest.approx(trained(*plain)[0], rel=1e-5)
    records = [json.loads((workshop.layout.trained / "training.json").read_text()) for workshop, _ in (plain, one_row)]
    losses = [entry["validationLoss"] for record in records for entry in record["history"] if "validationLoss" in entry]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert records[0]["tokens"] == records[1]["tokens"]


def test_steps_count_packed_rows(tmp_path: Path) -> None:
    workshop, plan = loaded(tmp_path, {"packing": "Enabled", "maxLength": 64}, maxSteps=None, epochs=2, batchSize=2)
    rows = len(Examples(workshop.layout.dataset / "train"))
    assert plan.steps == 2 * -(-rows // 2)


def test_buckets_are_trained_on_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.steps.train.trainer.resumable import ResumableTrainer

    seen: list[list[int]] = []
    step = ResumableTrainer.training_step

    def watched(self: Any, model: Any, inputs: Any, *arguments: Any) -> Any:
        seen.extend(
            row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        )
        return step(self, model, inputs, *arguments)

    monkeypatch.setattr(ResumableTrainer, "training_step", watched)
    workshop, plan = loaded(tmp_path, {"buckets": 4}, batchSize=4, microBatchSize=2, maxSteps=6)
    trained(workshop, plan)
    rows = Examples(workshop.layout.dataset / "train")
    assert seen == [rows[index]["input_ids"].tolist() for index in range(24)]
