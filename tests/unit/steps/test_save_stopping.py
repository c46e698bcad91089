"""The published model stops where its training data ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.steps.save.step import run as save
from finetune.steps.save.stopping import stop_at
from finetune.steps.train.reporting.samples import Answer, endless
from tests.unit.steps.runs import Run


def model(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("config", "generation", "learned", "expected_config", "expected_generation"),
    [
        ({"eos_token_id": 0}, {"eos_token_id": 0, "top_p": 0.8}, [2], [0, 2], {"eos_token_id": [0, 2], "top_p": 0.8}),
        ({"eos_token_id": 0}, {"eos_token_id": [0, 2]}, [2], [0, 2], {"eos_token_id": [0, 2]}),
        ({"eos_token_id": 0}, {"top_p": 0.8}, [2], [0, 2], {"eos_token_id": [0, 2], "top_p": 0.8}),
        (
            {"eos_token_id": 0, "bos_token_id": 1},
            None,
            [2, 3],
            [0, 2, 3],
            {"bos_token_id": 1, "eos_token_id": [0, 2, 3]},
        ),
        ({}, None, [2], 2, {"eos_token_id": 2}),
        ({"eos_token_id": None}, {"eos_token_id": None}, [2], 2, {"eos_token_id": 2}),
    ],
)
def test_learned_ends_are_joined_to_those_of_the_base(
    tmp_path: Path, config: Any, generation: Any, learned: list[int], expected_config: Any, expected_generation: Any
) -> None:
    model(tmp_path, config, generation)
    stop_at(tmp_path, learned)
    assert read(tmp_path, "config")["eos_token_id"] == expected_config
    assert read(tmp_path, "generation_config") == expected_generation


def test_files_that_name_the_ends_already_keep_their_bytes(tmp_path: Path) -> None:
    model(tmp_path, {"eos_token_id": [0, 2]}, {"eos_token_id": [2, 0]})
    before = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    assert stop_at(tmp_path, [2]) == []
    assert {path.name: path.stat().st_ino for path in tmp_path.iterdir()} == before


def test_a_model_of_several_parts_says_it_in_the_part_that_speaks(tmp_path: Path) -> None:
    model(tmp_path, {"text_config": {"eos_token_id": 1}, "vision_config": {}}, None)
    stop_at(tmp_path, [5])
    assert read(tmp_path, "config") == {"text_config": {"eos_token_id": [1, 5]}, "vision_config": {}}


def test_answers_that_run_to_their_limit_are_a_warning() -> None:
    assert endless([Answer("a", ended=True)], 8) == []
    (warning,) = endless([Answer("a", ended=True), Answer("b b", ended=False)], 8)
    assert warning.startswith("1 of 2 answers to samples.prompts ran to their limit of 8 tokens")


QUESTION = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Air."}]


def unlike_its_template(run: Path) -> None:
    """Make the base one whose files end texts with another token than its chat template ends turns with."""
    for name, end in (("config", 0), ("generation_config", 0), ("tokenizer_config", "<|endoftext|>")):
        path = run / f"{name}.json"
        content = json.loads(path.read_text())
        content["eos_token" if isinstance(end, str) else "eos_token_id"] = end
        path.unlink()
        path.write_text(json.dumps(content))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["Full", "LoRA"])
def test_what_was_taught_to_end_a_turn_ends_the_answers_of_the_published_model(tmp_path: Path, method: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = Run.at(tmp_path / "base", {}, tokens=None).workshop.layout.model
    unlike_its_template(base)
    settings = {
        "method": method,
        "maxSteps": 40,
        "learningRate": 2e-2,
        "samples": {"prompts": ["Why?"], "maxTokens": 3},
    }
    run = Run.at(
        tmp_path / "run", settings | {"checkpoint": {"everySteps": 1000}}, rows=[{"messages": QUESTION}] * 4,
        tokens=None, model=base, output={"uri": "pvc://data/out"},
    )  # fmt: skip
    (warning,) = run.go()["warnings"]
    assert "ran to their limit of 3 tokens" in warning
    result = save(run.job, run.workshop.layout).result
    assert result is not None
    assert "warnings" not in result
    out = run.workshop.layout.claims / "data/out"
    assert read(out, "generation_config")["eos_token_id"] == read(out, "config")["eos_token_id"] == [0, 2]
    assert read(base, "generation_config")["eos_token_id"] == 0
    tokenizer = AutoTokenizer.from_pretrained(out)
    turns = tokenizer.apply_chat_template(
        QUESTION[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = AutoModelForCausalLM.from_pretrained(out).generate(**turns, max_new_tokens=40, do_sample=False)
    if method == "Full":  # an adapter of random weights learns no answer in so few steps
        assert tokenizer.decode(said[0, turns["input_ids"].shape[1] :]) == "Air.<|im_end|>"


@pytest.mark.slow
def test_an_adapter_by_itself_comes_with_a_warning_and_its_remedy(tmp_path: Path) -> None:
    base = Run.at(tmp_path / "base", {}, tokens=None).workshop.layout.model
    unlike_its_template(base)
    run = Run.at(
        tmp_path / "run", {"method": "LoRA", "maxSteps": 1}, rows=[{"messages": QUESTION}] * 4, tokens=None,
        model=base, output={"uri": "pvc://data/out", "format": "Adapter"},
    )  # fmt: skip
    run.go()
    result = save(run.job, run.workshop.layout).result
    assert result is not None
    (warning,) = result["warnings"]
    assert "<|im_end|> (2)" in warning
    assert "eos_token_id" in warning
