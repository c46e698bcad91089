"""All who read the files of an extended tokenizer get the same ids, whatever class they name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, normalizers, processors
from transformers import AutoTokenizer

from finetune.steps.dataset import step as load_dataset
from finetune.steps.download import step as download
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.tokenizer_files.agreement import probes
from finetune.steps.tokenizer_files.conversion import converted
from finetune.steps.tokens import step as add_tokens
from finetune.steps.workspace.staging import publish
from tests.models import tiny
from tests.unit.steps.jobs import layout, report_of
from tests.unit.steps.vocabularies import QWEN, byte_fallback, byte_level
from tests.vocabularies import sentencepiece

TOKENS = {"tokens": {"add": [{"content": "<obs>"}, {"content": "<mark>", "special": True}]}}
DECLARED = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


def with_marker(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_tokens([AddedToken("<known>", normalized=False)])
    return tokenizer


def model(folder: Path, tokenizer: Tokenizer | None, settings: dict[str, Any], change: Callable[[Path], Any]) -> Path:
    """A workspace with a tiny model that has this tokenizer and these settings."""

    def make(partial: Path) -> dict[str, Any]:
        tiny(partial, padding=200)
        (partial / "tokenizer.json").unlink()
        if tokenizer:
            tokenizer.save(str(partial / "tokenizer.json"))
        (partial / "tokenizer_config.json").write_text(json.dumps(settings))
        change(partial)
        return {}

    publish(layout(folder).model, "base", make)
    return folder


def nothing(_: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("tokenizer", "settings"),
    [
        (lambda: byte_level(split=QWEN), {"tokenizer_class": "GPT2Tokenizer"}),
        (byte_fallback, {"tokenizer_class": "LlamaTokenizer", "legacy": True}),
        (byte_fallback, {"tokenizer_class": "LlamaTokenizerFast", "legacy": False}),
        (
            lambda: with_marker(byte_fallback()),
            {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {"1": DECLARED | {"content": "<s>"}}},
        ),
    ],
    ids=["GPT-2's rules", "Llama's legacy rules", "Llama's rules", "a token that only tokenizer.json knows"],
)
def test_what_transformers_would_build_otherwise_is_loaded_as_it_is(
    tmp_path: Path, tokenizer: Callable[[], Tokenizer], settings: dict[str, Any]
) -> None:
    made = tokenizer()
    result = report_of(add_tokens, model(tmp_path, made, settings, nothing), TOKENS).result
    assert result is not None
    warning = result["warnings"][-1]
    assert "by tokenizer.json and" in warning and "now names PreTrainedTokenizerFast" in warning
    served, trained = (
        Tokenizer.from_file(str(tmp_path / "prepared/tokenizer.json")),
        AutoTokenizer.from_pretrained(tmp_path / "prepared"),
    )
    for text in [*probes(served), "so<obs>so", "<mark> so", "a <obs>"]:
        ids = served.encode(text, add_special_tokens=False).ids
        assert trained.encode(text, add_special_tokens=False) == ids
        if "<obs>" not in text and "<mark>" not in text:
            assert ids == made.encode(text, add_special_tokens=False).ids


def test_what_the_settings_say_of_a_token_wins_in_every_file(tmp_path: Path) -> None:
    tokenizer = with_marker(byte_level())
    known = tokenizer.token_to_id("<known>")
    declared = {str(known): DECLARED | {"content": "<known>", "lstrip": True, "special": False}}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": declared}
    base = model(tmp_path, tokenizer, settings, nothing)
    report_of(add_tokens, base, TOKENS)
    served = Tokenizer.from_file(str(tmp_path / "prepared/tokenizer.json"))
    for folder in ("model", "prepared"):
        trained = AutoTokenizer.from_pretrained(tmp_path / folder)
        for text in ("so  <known> so", "so<known>"):
            assert trained.encode(text) == served.encode(text).ids


def test_a_sentencepiece_model_gets_a_piece_for_each_token_also_where_rows_are_padded(tmp_path: Path) -> None:
    spec = {"tokens": {**TOKENS["tokens"], "padToMultipleOf": 64}}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True}
    base = model(tmp_path, None, settings, lambda folder: (folder / "tokenizer.model").write_bytes(sentencepiece()))
    report_of(add_tokens, base, spec)
    tokenizer = Tokenizer.from_file(str(tmp_path / "prepared/tokenizer.json"))
    pieces = SentencePieceProcessor(str(tmp_path / "prepared/tokenizer.model"))
    assert pieces.vocab_size() == tokenizer.get_vocab_size() == 402
    for name in ("<obs>", "<mark>"):
        assert pieces.piece_to_id(name) == tokenizer.token_to_id(name)
    assert pieces.is_control(401) and not pieces.is_control(400)
    assert "<obs>" in pieces.encode("so<obs>so", out_type=str)
    declared = json.loads((tmp_path / "prepared/tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert (declared["400"]["special"], declared["401"]["special"]) == (False, True)


def test_a_sentencepiece_model_that_says_otherwise_is_left_out_with_the_reason(tmp_path: Path) -> None:
    base = model(
        tmp_path,
        byte_fallback(),
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        lambda folder: (folder / "tokenizer.model").write_bytes(sentencepiece()),
    )
    result = report_of(add_tokens, base, TOKENS).result
    assert result is not None and not (tmp_path / "prepared/tokenizer.model").exists()
    warning = result["warnings"][-1]
    assert "tokenizer.model was left out, and llama.cpp's converter needs it: its id " in warning


PRETRAINING = {
    "dataset": {"sources": [{"uri": "pvc://data/rows.jsonl"}], "packing": "Disabled"},
    "training": {"maxSteps": 1, "objective": "Pretraining"},
}


def rows(folder: Path, *texts: str) -> None:
    (folder / "claims/data").mkdir(parents=True)
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "claims/data/rows.jsonl").write_text("\n".join(lines))


def test_without_new_tokens_the_job_has_a_copy_of_the_model_that_is_read_alike(tmp_path: Path) -> None:
    legacy = {"tokenizer_class": "LlamaTokenizer", "legacy": True}
    base = model(tmp_path / "made", byte_fallback(), legacy, nothing) / "model"
    (tmp_path / "claims").mkdir()
    mine = base.rename(tmp_path / "claims/mine")
    rows(tmp_path, " The model", "</s> the model")
    result = report_of(download, tmp_path, {"model": {"uri": "pvc://mine"}}).result
    assert result is not None and "now names PreTrainedTokenizerFast" in result["warnings"][0]
    assert json.loads((mine / "tokenizer_config.json").read_text()) == legacy
    report_of(load_dataset, tmp_path, PRETRAINING)
    served, trained = (
        Tokenizer.from_file(str(mine / "tokenizer.json")),
        AutoTokenizer.from_pretrained(tmp_path / "model"),
    )
    assert (
        trained.encode("</s> the", add_special_tokens=False) == served.encode("</s> the", add_special_tokens=False).ids
    )


def test_rows_are_compared_although_the_tokenizer_is_that_of_the_file_where_it_splits_special_tokens(
    tmp_path: Path,
) -> None:
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True, "eos_token": "</s>"}
    tokenizer = byte_fallback()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1")  # as transformers has it
    base = model(tmp_path, tokenizer, settings, nothing)
    rows(tmp_path, "The model", "the </s> model")
    with pytest.raises(StepFailure) as caught:
        report_of(load_dataset, base, PRETRAINING)
    assert caught.value.error.reason == "TokenizersDisagree" and "'the </s> model' is [" in caught.value.error.message


def test_rows_that_would_be_learned_with_other_ids_are_refused_with_a_remedy_that_works(tmp_path: Path) -> None:
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "eos_token": "</s>"}
    base = model(tmp_path, byte_fallback(), settings, nothing)
    rows(tmp_path, "The model", " The model")
    with pytest.raises(StepFailure) as caught:
        report_of(load_dataset, base, PRETRAINING)
    error = caught.value.error
    assert error.reason == "TokenizersDisagree" and "' The model' is [" in error.message
    (remedy,) = [word for word in error.hint.split('"') if word.startswith("PreTrained")]
    path = tmp_path / "model/tokenizer_config.json"
    path.unlink()
    path.write_text(json.dumps(settings | {"tokenizer_class": remedy}))
    assert report_of(load_dataset, base, PRETRAINING).result


def test_where_settings_may_not_help_another_base_is_the_remedy(tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))

    base = model(tmp_path, byte_level(), {"tokenizer_class": "PreTrainedTokenizerFast"}, change)
    rows(tmp_path, "cafe\u0301")
    with pytest.raises(StepFailure) as caught:
        report_of(load_dataset, base, PRETRAINING)
    assert caught.value.error.reason == "TokenizersDisagree"
    assert "use a base of another model_type" in caught.value.error.hint


def with_sentencepiece(folder: Path, *normal: normalizers.Normalizer) -> Path:
    """A model whose tokenizer.json says what its sentencepiece model says, but for these normalizers."""

    def change(partial: Path) -> None:
        (partial / "tokenizer.model").write_bytes(sentencepiece())
        tokenizer = converted(partial)
        own = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = normalizers.Sequence([*normal, *own])
        tokenizer.save(str(partial / "tokenizer.json"))

    return model(folder, None, {"tokenizer_class": "LlamaTokenizer", "legacy": True, "eos_token": "</s>"}, change)


def test_rows_that_sentencepiece_reads_otherwise_are_counted_with_an_example(tmp_path: Path) -> None:
    base = with_sentencepiece(tmp_path, normalizers.Replace("ß", "ss"))
    report_of(add_tokens, base, TOKENS)
    assert (tmp_path / "prepared/tokenizer.model").is_file(), "texts that are always compared say nothing of it"
    rows(tmp_path, "The model", "A token is a Maß", "Ein Fuß", "a <obs>ß")
    result = report_of(load_dataset, base, PRETRAINING).result
    assert result is not None and len(result["warnings"]) == 1
    assert result["warnings"][0].startswith(
        "spec.dataset.sources[0]: pvc://data/rows.jsonl: 2 of the first 4 rows are learned with other ids than engines "
        "get that read tokenizer.model (llama.cpp's converter does): 'ß' begins with ["
    )
    assert " by tokenizer.json, [" in result["warnings"][0] and "] by sentencepiece; serve" in result["warnings"][0]


def test_rows_that_sentencepiece_reads_alike_give_no_warning(tmp_path: Path) -> None:
    base = with_sentencepiece(tmp_path)
    report_of(add_tokens, base, TOKENS)
    rows(tmp_path, "The model", "A token is a Maß", "a <obs>", "  two  spaces 水 \n")
    result = report_of(load_dataset, base, PRETRAINING).result
    assert result is not None and "warnings" not in result


def test_a_conversion_keeps_spaces_at_the_beginning_as_sentencepiece_does(tmp_path: Path) -> None:
    """transformers' own for Llama's kind forgets the space before a text that begins with one."""
    base = model(
        tmp_path,
        None,
        {"tokenizer_class": "LlamaTokenizer", "legacy": True},
        lambda folder: (folder / "tokenizer.model").write_bytes(sentencepiece()),
    )
    tokenizer, original = converted(base / "model"), SentencePieceProcessor(model_proto=sentencepiece())
    for text in (" a space before", "  two  spaces", "The model"):
        assert tokenizer.encode(text, add_special_tokens=False).ids == original.encode(text)


def test_a_job_without_tokens_learns_the_ids_of_a_sentencepiece_model(tmp_path: Path) -> None:
    """transformers would convert it with rules of Gemma's, without the space before a text."""
    wrong = {"tokenizer_class": "GemmaTokenizer"}
    base = model(
        tmp_path / "made", None, wrong, lambda folder: (folder / "tokenizer.model").write_bytes(sentencepiece())
    )
    (tmp_path / "claims").mkdir()
    (base / "model").rename(tmp_path / "claims/mine")
    result = report_of(download, tmp_path, {"model": {"uri": "pvc://mine"}}).result
    assert result is not None
    assert result["warnings"][0].startswith("tokenizer.json was made from the sentencepiece model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    original = SentencePieceProcessor(str(tmp_path / "model/tokenizer.model"))
    assert tokenizer.encode("The model", add_special_tokens=False) == original.encode("The model")
    assert not (tmp_path / "claims/mine/tokenizer.json").exists()
