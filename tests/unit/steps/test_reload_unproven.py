"""The proof says what it does not prove: in a few words in the status, with the reasons in its file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.cli.token_picture import proof_picture
from finetune.steps.reload import step as reload
from finetune.steps.tokens import step as add_tokens
from finetune.steps.workspace.staging import publish
from tests.models import tiny
from tests.unit.steps.jobs import layout, report_of
from tests.unit.steps.published import with_prediction_layer
from tests.unit.steps.vocabularies import byte_fallback
from tests.vocabularies import sentencepiece

TOKENS = {"tokens": {"add": [{"content": "<obs>"}]}}


def unproven(folder: Path, make: Callable[[Path], Any], spec: dict[str, Any] = TOKENS) -> tuple[str, dict[str, str]]:
    """What the status says of an extended model's proof, and what its file says was not proven, and why."""

    def write(partial: Path) -> dict[str, Any]:
        make(partial)
        return {}

    publish(layout(folder).model, "base", write)
    report_of(add_tokens, folder, spec)
    result = report_of(reload, folder, spec).result
    assert result is not None
    proof = json.loads((folder / "finetune-reload.json").read_text())
    return result["proof"], {gap["what"]: gap["why"] for gap in proof["notProven"]}


def with_tokenizer(change: Callable[[Path], Any], **settings: Any) -> Callable[[Path], Any]:
    def make(partial: Path) -> None:
        tiny(partial, padding=200)
        (partial / "tokenizer.json").unlink()
        (partial / "tokenizer_config.json").write_text(json.dumps(settings))
        change(partial)

    return make


def test_of_every_model_it_is_said_that_texts_were_compared_on_samples(tmp_path: Path) -> None:
    status, found = unproven(tmp_path, tiny)
    assert status.endswith("hidden states of old text bit-equal; not proven: ids of all texts, states of all texts")
    assert "were compared on 24 texts and around 1 new tokens" in found["ids of all texts"]
    assert json.loads((tmp_path / "finetune-reload.json").read_text())["family"] == "llama"


def test_tensors_that_transformers_does_not_load_are_counted_and_named(tmp_path: Path) -> None:
    status, found = unproven(tmp_path, lambda folder: with_prediction_layer(folder, "glm4_moe", copies=True))
    listed = json.loads((tmp_path / "finetune-reload.json").read_text())["notLoaded"]
    assert "model.layers.2.embed_tokens.weight" in listed and "model.embed_tokens.weight" not in listed
    what = f"{len(listed)} tensors that are not loaded (model.layers.2)"
    assert f"not proven: {what}, ids of all texts" in status
    assert found[what].startswith("transformers has no place for them in the model that it trains")


def test_of_a_model_that_was_not_run_it_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "available_memory", lambda: 1 << 20)
    status, found = unproven(tmp_path, tiny)
    assert status.endswith("; not proven: that it runs, ids of all texts") and next(iter(found)) == "that it runs"


def test_what_is_known_of_engines_that_read_a_sentencepiece_model_is_said(tmp_path: Path) -> None:
    llama = {"tokenizer_class": "LlamaTokenizer", "legacy": True}
    kept = with_tokenizer(lambda folder: (folder / "tokenizer.model").write_bytes(sentencepiece()), **llama)
    _, found = unproven(tmp_path / "kept", kept)
    assert "gives the ids of tokenizer.json on 8 texts" in found["tokenizer.model around new tokens"]

    def other(folder: Path) -> None:
        byte_fallback().save(str(folder / "tokenizer.json"))
        (folder / "tokenizer.model").write_bytes(sentencepiece())

    _, found = unproven(tmp_path / "left out", with_tokenizer(other, tokenizer_class="PreTrainedTokenizerFast"))
    assert "it was left out" in found["engines that read tokenizer.model"]

    absent = with_tokenizer(lambda folder: byte_fallback().save(str(folder / "tokenizer.json")), **llama)
    _, found = unproven(tmp_path / "absent", absent)
    assert "the base model has none" in found["engines that read tokenizer.model"]


def test_chances_that_were_not_computed_are_counted(tmp_path: Path) -> None:
    many = {"tokens": {"add": [{"content": f"<{number}>"} for number in range(70)]}}
    _, found = unproven(tmp_path, tiny, many)
    assert found["6 tokens' chances before"] == "each takes two passes of the base model; those after are there"


def test_the_command_line_lists_each_with_its_reason(tmp_path: Path) -> None:
    status, found = unproven(tmp_path, tiny)
    lines = [str(part) for part in proof_picture(tmp_path / "finetune-reload.json", status).renderables[1:]]  # type: ignore[attr-defined]
    assert lines[0].endswith("hidden states of old text bit-equal")
    assert lines[1:] == [f"not proven: {what}: {why}" for what, why in found.items()]
