"""Whatever tokens are asked for, of whatever tokenizer: the step keeps its promises or refuses and writes nothing."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from finetune.api.contract import Step, StepReport
from finetune.steps.model_files.safetensors_file import read_header
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.tokens import step
from finetune.steps.workspace.token_record import read_record
from tests.models import CORPUS, tiny
from tests.unit.steps.jobs import layout, report_of
from tests.vocabularies import KINDS

pytestmark = pytest.mark.slow

characters = st.characters(exclude_categories=("Cc", "Cs", "Cn", "Co"))
texts = st.text(characters, min_size=1, max_size=12).filter(lambda text: bool(text.strip()))
favourites = ["café", "<think>", "the", " the", "a b", "Ġ", "▁x", "  two", "x ", "ſ", "心筋", "e\u0301", "</s>", "[x]"]
tokens = st.builds(
    lambda content, special, lstrip, rstrip, single, normalized: {
        "content": content,
        "special": special,
        "lstrip": lstrip,
        "rstrip": rstrip,
        "singleWord": single,
        "normalized": normalized,
    },
    st.one_of(texts, st.sampled_from(favourites)),
    *[st.booleans()] * 5,
)
sets = st.lists(tokens, min_size=1, max_size=12, unique_by=lambda token: token["content"])


@cache
def model(kind: str) -> Path:
    """A model with that tokenizer, and rows to spare unless it is the model's own."""
    folder = tiny(Path(mkdtemp()), padding=0 if kind == "byte-level" else 300)
    (folder / "tokenizer.json").write_text(KINDS[kind](), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def added(folder: Path, asked: list[dict[str, Any]], multiple: int = 64) -> tuple[StepReport, list[dict[str, Any]]]:
    """Add the tokens, without those that the step refuses: it names them, and writes nothing meanwhile."""
    while True:
        try:
            return report_of(step, folder, {"tokens": {"add": asked, "padToMultipleOf": multiple}}), asked
        except StepFailure as failure:
            error = failure.error
            assert error.reason in ("InvalidToken", "TokenCollision") and error.hint
            assert not layout(folder).prepared.exists()
            named = {int(index) for index in re.findall(r"spec\.tokens\.add\[(\d+)\]: ", error.message)}
            assert named
            asked = [token for index, token in enumerate(asked) if index not in named]
            if not asked:
                return StepReport(step=Step.ADD_TOKENS), []


@pytest.mark.parametrize("kind", KINDS)
@given(asked=sets, other=texts, multiple=st.sampled_from([1, 64]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_promise_about_new_tokens_holds(
    kind: str, asked: list[dict[str, Any]], other: str, multiple: int
) -> None:
    before = Tokenizer.from_str(KINDS[kind]())
    with TemporaryDirectory() as name:
        folder = Path(name)
        layout(folder).model.symlink_to(model(kind))
        report, asked = added(folder, asked, multiple)
        if not asked:
            return
        prepared = layout(folder).prepared
        after = Tokenizer.from_file(str(prepared / "tokenizer.json"))
        records = read_record(prepared)
        rows = json.loads((prepared / "config.json").read_text())["vocab_size"]
        shape = read_header(prepared / "model.safetensors").tensors["model.embed_tokens.weight"].shape
    assert report.result is not None
    assert (report.result["added"] + report.result["alreadyPresent"], report.result["embeddingRows"]) == (
        len(asked),
        rows,
    )
    assert shape[0] == rows
    length = max(before.get_vocab().values()) + 1
    assert [record.id for record in records] == list(range(length, length + len(records)))
    assert all(record.id < rows for record in records)
    for record in records:
        assert ids(after, record.content) == [record.id]
        twice = after.decode([record.id, record.id], skip_special_tokens=False)
        assert twice in (record.content * 2, (record.content * 2).removeprefix(" "))
        hidden = after.decode([record.id, record.id], skip_special_tokens=True)
        assert hidden == ("" if record.special else twice)
    for text in [*CORPUS.splitlines(), other]:
        if not any(token["content"] in text for token in asked):
            assert ids(after, text) == ids(before, text)


@pytest.mark.parametrize("kind", ["byte-level"])
@given(asked=st.lists(texts, min_size=1, max_size=8, unique=True), parts=st.lists(texts, min_size=2, max_size=9))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_text_with_new_tokens_in_it_comes_back_as_it_was(kind: str, asked: list[str], parts: list[str]) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        layout(folder).model.symlink_to(model(kind))
        _, kept = added(folder, [{"content": content} for content in asked])
        if not kept:
            return
        after = Tokenizer.from_file(str(layout(folder).prepared / "tokenizer.json"))
    text = "".join(part + kept[index % len(kept)]["content"] for index, part in enumerate(parts))
    assert after.decode(ids(after, text), skip_special_tokens=False) == text
