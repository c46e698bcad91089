"""Kinds of tokens: what each flag does, through transformers as whoever trains or serves the model uses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from finetune.steps.reload import step as reload
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.tokenizer_files.agreement import PROBES
from finetune.steps.tokenizer_files.conversion import converted
from finetune.steps.tokens import step
from finetune.steps.workspace.staging import publish
from tests.models import tiny
from tests.unit.steps.jobs import layout, report_of
from tests.vocabularies import sentencepiece


def extended(folder: Path, *tokens: dict[str, Any]) -> Any:
    """The tokenizer, loaded by transformers, of a tiny model with these tokens."""
    publish(layout(folder).model, "base", lambda partial: {"made": str(tiny(partial))})
    report_of(step, folder, {"tokens": {"add": list(tokens)}})
    return AutoTokenizer.from_pretrained(folder / "prepared")


def test_by_default_no_space_is_lost_and_markers_stay_visible(tmp_path: Path) -> None:
    tokenizer = extended(tmp_path, {"content": "<think>"}, {"content": "infarction"})
    text = "a  <think> \n b<think>c  infarction . reinfarction <think>"
    ids = tokenizer.encode(text)
    assert [ids.count(384), ids.count(385)] == [3, 2]
    for skip in (True, False):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == text


def test_special_tokens_are_hidden(tmp_path: Path) -> None:
    tokenizer = extended(tmp_path, {"content": "<pause>", "special": True}, {"content": "<think>"})
    ids = tokenizer.encode("a<pause>b<think>c")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<think>c"
    assert tokenizer.decode(ids) == "a<pause>b<think>c"


def test_lstrip_and_rstrip_swallow_the_spaces_on_their_side(tmp_path: Path) -> None:
    tokenizer = extended(tmp_path, {"content": "<l>", "lstrip": True}, {"content": "<r>", "rstrip": True})
    assert tokenizer.decode(tokenizer.encode("a  <l>  b")) == "a<l>  b"
    assert tokenizer.decode(tokenizer.encode("a  <r>  b")) == "a  <r>b"


def test_single_words_are_not_found_inside_others(tmp_path: Path) -> None:
    tokenizer = extended(tmp_path, {"content": "gene", "singleWord": True})
    assert [tokenizer.encode(text).count(384) for text in ("a gene.", "genes", "gene-7", "oxygene")] == [1, 0, 1, 0]


def test_normalized_tokens_are_found_in_other_normal_forms(tmp_path: Path) -> None:
    def with_normalizer(partial: Path) -> dict[str, Any]:
        path = tiny(partial) / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "NFC"}}))
        return {}

    publish(layout(tmp_path).model, "base", with_normalizer)
    tokens = [{"content": "Ångström", "normalized": True}, {"content": "Zürich"}]
    report_of(step, tmp_path, {"tokens": {"add": tokens}})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "prepared")
    assert 384 in tokenizer.encode("A\u030angstro\u0308m") and 385 not in tokenizer.encode("Zu\u0308rich")


def test_a_word_that_is_one_token_after_a_space_gets_a_warning(tmp_path: Path) -> None:
    publish(layout(tmp_path).model, "base", lambda partial: {"made": str(tiny(partial))})
    result = report_of(step, tmp_path, {"tokens": {"add": [{"content": "the"}, {"content": "cardiac"}]}}).result
    assert result is not None and result["added"] == 2
    (warning,) = result["warnings"]
    assert warning.startswith("'the' after a space is one token already (id ")


def without_tokenizer_json(folder: Path, name: str, content: bytes, tokenizer_class: str = "LlamaTokenizer") -> Path:
    """A workspace whose model has its tokenizer in this file only."""

    def make(partial: Path) -> dict[str, Any]:
        tiny(partial, padding=80)
        for file in ("tokenizer.json", "chat_template.jinja"):
            (partial / file).unlink()
        (partial / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))
        (partial / name).write_bytes(content)
        return {}

    publish(layout(folder).model, "base", make)
    return folder


@pytest.mark.slow
def test_a_sentencepiece_model_is_converted_with_the_same_ids_and_gets_the_tokens(tmp_path: Path) -> None:
    folder = without_tokenizer_json(tmp_path, "tokenizer.model", sentencepiece())
    spec = {"tokens": {"add": [{"content": "<think>"}, {"content": "心筋"}]}}
    result = report_of(step, folder, spec).result
    assert result is not None and result["added"] == 2
    model = SentencePieceProcessor(str(folder / "prepared/tokenizer.model"))
    assert [model.piece_to_id(piece) for piece in ("<think>", "心筋")] == [400, 401]
    before, after = (AutoTokenizer.from_pretrained(folder / name) for name in ("model", "prepared"))
    text = "Why is the sky blue? It scatters  short waves.\nÜber 水"
    assert after.encode(text) == before.encode(text)
    assert after.encode("心筋", add_special_tokens=False) == [401]
    assert report_of(reload, folder, spec).result is not None


def refusal(folder: Path) -> str:
    with pytest.raises(StepFailure) as caught:
        report_of(step, folder, {"tokens": {"add": [{"content": "<think>"}]}})
    assert caught.value.error.reason == "UnsupportedTokenizer" and not (folder / "prepared").exists()
    return caught.value.error.message


@pytest.mark.slow
def test_a_conversion_that_changes_ids_is_refused(tmp_path: Path) -> None:
    folder = without_tokenizer_json(tmp_path, "tokenizer.model", sentencepiece("unigram"), "LlamaTokenizer")
    message = refusal(folder)
    assert "conversion of tokenizer.model is not exact: '" in message
    assert message.endswith("take a repository or revision of the model that has tokenizer.json")


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer_class", ["GemmaTokenizer", "T5Tokenizer"])
def test_where_transformers_converts_wrongly_the_pieces_are_taken_as_they_are(
    tmp_path: Path, tokenizer_class: str
) -> None:
    """As Mistral's repositories with tokenizer.model alone, for which transformers forgets the space before a text."""
    folder = without_tokenizer_json(tmp_path, "tokenizer.model", sentencepiece(), tokenizer_class)
    spec = {"tokens": {"add": [{"content": "<think>"}]}}
    report_of(step, folder, spec)
    tokenizer = AutoTokenizer.from_pretrained(folder / "prepared")
    original = SentencePieceProcessor(str(folder / "model/tokenizer.model"))
    for text in (*PROBES, " a space before"):
        assert tokenizer.encode(text, add_special_tokens=False) == original.encode(text)
    assert report_of(reload, folder, spec).result is not None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tiktoken.model", b"IQ== 0\nIg== 1\n"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n"),
        ("qwen.tiktoken", b"IQ== 0\n"),
    ],
)
def test_a_tiktoken_vocabulary_is_refused_with_the_remedy(tmp_path: Path, name: str, content: bytes) -> None:
    message = refusal(without_tokenizer_json(tmp_path, name, content))
    assert f"no tokenizer.json but {name}, a tiktoken vocabulary" in message
    assert "take a repository or revision of the model that has tokenizer.json" in message


def test_a_broken_or_absent_tokenizer_is_said_to_be_one(tmp_path: Path) -> None:
    folder = without_tokenizer_json(tmp_path, "tokenizer.model", b"\x00garbage\xff" * 9)
    assert "tokenizer.model cannot be read" in refusal(folder)
    (folder / "model/tokenizer.model").unlink()
    assert "neither tokenizer.json nor a sentencepiece model" in refusal(folder)


@pytest.mark.slow
def test_gemmas_kind_is_converted_too(tmp_path: Path) -> None:
    folder = without_tokenizer_json(tmp_path, "tokenizer.model", sentencepiece(prefix=False), "GemmaTokenizer")
    assert converted(folder / "model").encode("x").ids
