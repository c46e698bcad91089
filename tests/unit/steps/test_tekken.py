"""A model with tekken.json alone gets a tokenizer.json with mistral-common's ids, or is refused with a remedy.

The golden files are a tekken.json of a few merges, and the ids that mistral-common gives texts by it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer

from finetune.steps.download import step as download
from finetune.steps.reload import step as reload
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.tokenizer_files import tekken
from finetune.steps.tokens import step as add_tokens
from tests.models import tiny
from tests.unit.steps.jobs import report_of

GOLDEN = Path(__file__).parent / "golden"
IDS: dict[str, list[int]] = json.loads((GOLDEN / "tekken_ids.json").read_text())["ids"]
SPEC = {
    "model": {"uri": "pvc://mine"},
    "tokens": {"add": [{"content": "<obs>"}, {"content": "<mark>", "special": True}]},
}


def document() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((GOLDEN / "tekken.json").read_text())
    return content


def claim(folder: Path, written: dict[str, Any]) -> Path:
    """A workspace beside a claim with a model that has this tekken.json, as Mistral's repositories do."""
    mine = folder / "claims/mine"
    mine.mkdir(parents=True)
    tiny(mine, padding=48)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (mine / name).unlink(missing_ok=True)
    (mine / "tekken.json").write_text(json.dumps(written))
    return folder


def test_it_is_converted_with_the_ids_of_mistral_common() -> None:
    tokenizer = tekken.converted(GOLDEN / "tekken.json")
    assert {text: tokenizer.encode(text).ids for text in IDS} == IDS
    assert [tokenizer.token_to_id(name) for name in ("<s>", "[INST]", "[/THINK]", "<SPECIAL_11>")] == [1, 3, 7, 11]
    assert tokenizer.get_vocab_size() == document()["config"]["default_vocab_size"]


@pytest.mark.slow
def test_a_job_trains_such_a_model_and_adds_tokens_to_it(tmp_path: Path) -> None:
    folder = claim(tmp_path, document())
    result = report_of(download, folder, SPEC).result
    assert result is not None and result["warnings"] == ["tokenizer.json was made from tekken.json, with its ids"]
    assert not (folder / "claims/mine/tokenizer.json").exists()
    loaded = AutoTokenizer.from_pretrained(folder / "model")
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<s>", "</s>", "<pad>")
    assert {text: loaded(text)["input_ids"] for text in IDS} == IDS
    added = report_of(add_tokens, folder, SPEC).result
    assert added is not None and added["added"] == 2
    assert not (folder / "prepared/tekken.json").exists()
    extended = AutoTokenizer.from_pretrained(folder / "prepared")
    served = Tokenizer.from_file(str(folder / "prepared/tokenizer.json"))
    assert {text: extended(text)["input_ids"] for text in IDS} == {text: served.encode(text).ids for text in IDS} == IDS
    assert extended("so<obs>", add_special_tokens=False)["input_ids"][-1] == 432
    assert report_of(reload, folder, SPEC).result is not None


def without_names(written: dict[str, Any]) -> None:
    del written["special_tokens"]


def with_gaps(written: dict[str, Any]) -> None:
    written["special_tokens"][3]["rank"] = 9


def with_bytes_twice(written: dict[str, Any]) -> None:
    written["vocab"][300] = written["vocab"][301]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            without_names,
            "tekken.json: it is of the old form, in which special tokens have no names (write its tokenizer.json once",
        ),
        (with_gaps, "tekken.json: it cannot be read (ValueError: tekken.json special_tokens ranks must be contiguous"),
        (with_bytes_twice, "tekken.json: transformers' conversion is not exact: '"),
        (lambda written: written["config"].pop("pattern"), "tekken.json: it cannot be read (KeyError: 'pattern')"),
    ],
    ids=["no names", "gaps", "bytes twice", "no rule"],
)
def test_what_cannot_be_converted_exactly_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    written = document()
    change(written)
    folder = claim(tmp_path, written)
    report_of(download, folder, SPEC)
    with pytest.raises(StepFailure) as caught:
        report_of(add_tokens, folder, SPEC)
    assert caught.value.error.reason == "UnsupportedTokenizer" and said in caught.value.error.message
    assert caught.value.error.message.endswith("take a repository or revision of the model that has tokenizer.json")


def test_what_cannot_be_converted_is_refused_without_new_tokens_too(tmp_path: Path) -> None:
    written = document()
    without_names(written)
    folder, spec = claim(tmp_path, written), {"model": SPEC["model"]}
    report_of(download, folder, spec)
    with pytest.raises(StepFailure) as caught:
        report_of(reload, folder, spec)
    assert caught.value.error.reason == "UnsupportedTokenizer"
    assert "it is of the old form, in which special tokens have no names" in caught.value.error.message


def test_a_conversion_that_gives_other_ids_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.mistral.tokenizer import MistralConverter

    right = MistralConverter.converted

    def other(self: Any) -> Tokenizer:
        tokenizer = right(self)
        tokenizer.normalizer = normalizers.NFKC()
        return tokenizer

    monkeypatch.setattr(MistralConverter, "converted", other)
    with pytest.raises(tekken.NotExact, match=r"conversion is not exact: '.*' becomes"):
        tekken.converted(GOLDEN / "tekken.json")
