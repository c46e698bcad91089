"""add-tokens with spec.tokens.learn: from a corpus in a claim to a model whose status says what learning brought."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from finetune.api.contract import MAX_REPORT_BYTES, ExitCode
from finetune.api.spec import LearnTokens
from finetune.steps.model_files.checkpoint import read_checkpoint
from finetune.steps.reload import step as reload
from finetune.steps.runtime.progress import Progress
from finetune.steps.tokens.learn.job import moving
from finetune.steps.workspace.staging import publish
from finetune.steps.workspace.token_record import read_record
from tests.models import tiny
from tests.poems import made as poems
from tests.unit.steps.adding import refusal, result
from tests.unit.steps.flow import Workshop
from tests.unit.steps.jobs import layout, report_of
from tests.unit.steps.vocabularies import ENGLISH, KINDS


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    publish(layout(tmp_path).model, "base", lambda partial: {"made": str(tiny(partial, dtype="float32"))})
    write(tmp_path, "poems.jsonl", poems())
    write(tmp_path, "english.jsonl", ENGLISH)
    return tmp_path


def write(workspace: Path, name: str, texts: list[str]) -> None:
    folder = workspace / "claims/corpus"
    folder.mkdir(parents=True, exist_ok=True)
    folder.joinpath(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def learn(size: int = 40, *, protect: str | None = None, minimum: int = 2, **tokens: Any) -> dict[str, Any]:
    lesson = {"source": {"uri": "pvc://corpus/poems.jsonl"}, "size": size, "minimumSaving": minimum}
    if protect:
        lesson["protect"] = {"uri": f"pvc://corpus/{protect}"}
    return {"tokens": {"learn": lesson, "padToMultipleOf": 8, **tokens}}


def test_the_status_says_what_was_learned_and_what_it_brought(workspace: Path) -> None:
    counted = result(workspace, learn(protect="english.jsonl"))
    assert (counted["added"], counted["learned"], counted["vocabularySize"]) == (40, 40, 424)
    assert (counted["embeddingRows"], counted["vocabularySizeBefore"]) == (424, 384)
    assert counted["protectedCharacters"] == sum(map(len, ENGLISH))
    held_out = counted["charactersPerToken"]
    assert held_out["after"] > 1.3 * held_out["before"] > 0
    assert not (workspace / "prepared/.corpus").exists()


def test_progress_tells_of_rows_read_pieces_found_and_bytes_written(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[object, int, int | None]] = []
    monkeypatch.setattr(
        Progress, "update", lambda self, current, total, *, unit: told.append((unit, current, total)), raising=True
    )
    result(workspace, learn())
    assert [unit for unit, _ in itertools.groupby(told, key=lambda each: each[0])] == ["row", "piece", "row", "byte"]
    assert [current for unit, current, _ in told if unit == "piece"] == list(range(1, 41))
    assert {total for unit, _, total in told if unit == "piece"} == {40}
    assert all(current <= (total or 0) for _, current, total in told)


def test_rows_of_learned_pieces_are_the_means_of_their_pieces(workspace: Path) -> None:
    result(workspace, learn())
    records = read_record(workspace / "prepared")
    assert [record.id for record in records] == list(range(384, 424))
    before, after = (rows(workspace / name) for name in ("model", "prepared"))
    assert np.array_equal(after[:384], before)
    for record in records:
        assert record.piece is not None
        pieces = record.init["rows"]
        assert np.array_equal(after[record.id], before[pieces].astype(np.float64).mean(0).astype(np.float32))
    assert "明月" in {record.content for record in records}


def rows(folder: Path) -> np.ndarray:
    checkpoint = read_checkpoint(folder)
    (file,) = checkpoint.headers
    tensor = checkpoint.tensors["model.embed_tokens.weight"]
    start = checkpoint.headers[file].data_start + tensor.start
    data = (folder / file).read_bytes()[start : start + tensor.size]
    return np.frombuffer(data, np.float32).reshape(tensor.shape)


def test_an_init_of_the_job_holds_for_learned_pieces_too(workspace: Path) -> None:
    result(workspace, learn(init={"meanOf": "Vocabulary"}))
    assert {str(record.init) for record in read_record(workspace / "prepared")} == {"{'meanOf': 'Vocabulary'}"}


def test_rows_that_are_drawn_depend_on_the_jobs_seed(workspace: Path) -> None:
    drawn = []
    for seed in (1, 1, 2):
        result(workspace, learn(init={"sample": "Normal"}) | {"training": {"epochs": 1, "seed": seed}})
        drawn.append(rows(workspace / "prepared")[384:].copy())
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    assert np.unique(drawn[0], axis=0).shape[0] == drawn[0].shape[0]


def test_words_that_are_listed_come_first_and_are_not_learned_again(workspace: Path) -> None:
    counted = result(workspace, learn(add=[{"content": "明月"}]))
    assert (counted["added"], counted["learned"]) == (41, 40)
    listed, *pieces = read_record(workspace / "prepared")
    assert (listed.content, listed.id, listed.piece) == ("明月", 384, None)
    assert "明月" not in {record.content for record in pieces}
    assert [record.id for record in pieces] == list(range(385, 425))


def test_the_same_corpus_again_does_nothing_a_changed_one_starts_anew(workspace: Path) -> None:
    first = result(workspace, learn())
    before = (workspace / "prepared/model.safetensors").stat()
    assert result(workspace, learn()) == first
    assert (workspace / "prepared/model.safetensors").stat() == before
    write(workspace, "poems.jsonl", poems(seed=7))
    assert result(workspace, learn())["charactersPerToken"] != first["charactersPerToken"]


@pytest.mark.parametrize(
    ("source", "fields"),
    [
        ({"uri": "hf://datasets/team/poems"}, ["spec.tokens.learn.source"]),
        ({"uri": "hf://datasets/team/poems", "revision": "0123456789abcdef0123456789abcdef01234567"}, []),
        ({"uri": "pvc://corpus/poems.txt"}, []),
    ],
)
def test_pieces_of_a_branch_that_may_move_are_never_shared(source: dict[str, Any], fields: list[str]) -> None:
    assert moving(LearnTokens.model_validate({"source": source, "size": 10})) == fields


def test_two_runs_give_the_same_tokenizer_to_the_byte(
    workspace: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    result(workspace, learn())
    other = tmp_path_factory.mktemp("other")
    publish(layout(other).model, "base", lambda partial: {"made": str(tiny(partial, dtype="float32"))})
    write(other, "poems.jsonl", poems())
    result(other, learn())
    for name in ("tokenizer.json", "finetune-tokens.json", "model.safetensors"):
        assert (other / "prepared" / name).read_bytes() == (workspace / "prepared" / name).read_bytes()


def test_fewer_pieces_than_asked_for_are_explained(workspace: Path) -> None:
    counted = result(workspace, learn(5_000, minimum=30))
    assert 0 < counted["learned"] < 5_000
    assert counted["warnings"] == [
        f"{counted['learned']} pieces were learned instead of 5,000: no other saves 30 tokens of the corpus"
    ]


def test_a_corpus_that_teaches_nothing_leaves_the_model_as_it_is(workspace: Path) -> None:
    counted = result(workspace, learn(minimum=1_000_000))
    assert (counted["added"], counted["learned"]) == (0, 0)
    assert counted["charactersPerToken"]["before"] == counted["charactersPerToken"]["after"]
    assert (workspace / "prepared/model.safetensors").samefile(workspace / "model/model.safetensors")


@pytest.mark.parametrize(
    ("spec", "code", "reason", "words"),
    [
        (learn(protect="none.jsonl"), ExitCode.NO_INPUT, "DatasetNotFound", "spec.tokens.learn.protect.uri"),
        (learn(protect="short.jsonl"), None, "", ""),
    ],
)
def test_a_corpus_that_is_not_there_is_named(
    workspace: Path, spec: dict[str, Any], code: ExitCode | None, reason: str, words: str
) -> None:
    write(workspace, "short.jsonl", ["one text is enough to protect"])
    if code is None:
        assert result(workspace, spec)["protectedCharacters"] == 29
        return
    failure = refusal(workspace, spec)
    assert (failure.code, failure.error.reason) == (code, reason)
    assert words in failure.error.message


def test_a_corpus_of_too_few_texts_is_refused(workspace: Path) -> None:
    write(workspace, "poems.jsonl", poems(9))
    failure = refusal(workspace, learn())
    assert (failure.code, failure.error.reason) == (ExitCode.BAD_DATA, "CorpusTooSmall")
    assert failure.error.message.startswith("spec.tokens.learn.source: pvc://corpus/poems.jsonl: ")


def test_a_malformed_row_is_named_with_its_number(workspace: Path) -> None:
    lines = [json.dumps({"text": text}) for text in poems(20)]
    lines[12] = json.dumps({"text": None})
    (workspace / "claims/corpus/poems.jsonl").write_text("\n".join(lines))
    failure = refusal(workspace, learn())
    assert failure.error.reason == "MalformedRow"
    assert "spec.tokens.learn.source: row 13 of pvc://corpus/poems.jsonl" in failure.error.message


def test_a_tokenizer_of_another_kind_is_refused_with_the_remedy(workspace: Path) -> None:
    path = workspace / "model/tokenizer.json"
    document = json.loads(path.read_text())
    document["model"] = {"type": "WordLevel", "vocab": document["model"]["vocab"], "unk_token": "<|endoftext|>"}
    path.write_text(json.dumps(document))
    failure = refusal(workspace, learn())
    assert (failure.code, failure.error.reason) == (ExitCode.BAD_CONFIGURATION, "UnsupportedTokenizer")
    assert "its model is WordLevel" in failure.error.message
    assert "spec.tokens.add" in failure.error.hint


CLASSES = {
    "GPT-2 like": ("GPT2Tokenizer", "PreTrainedTokenizerFast"),
    "Llama 3 like": ("PreTrainedTokenizerFast",),
    "Qwen like": ("Qwen2Tokenizer", "PreTrainedTokenizerFast"),
    "Llama 2 like": ("LlamaTokenizer", "PreTrainedTokenizerFast"),
    "Unigram": ("PreTrainedTokenizerFast",),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "loader"), [(kind, loader) for kind, loaders in CLASSES.items() for loader in loaders]
)
def test_what_was_learned_is_proven_by_reload_whatever_class_loads_it(workspace: Path, kind: str, loader: str) -> None:
    """transformers has classes that build a tokenizer of their own from the file's vocabulary and merges."""
    import transformers

    model = workspace / "model"
    base: Tokenizer = KINDS[kind]()
    length = base.get_vocab_size()
    publish(model, kind, lambda partial: {"made": str(tiny(partial, dtype="float32", padding=length - 384))})
    base.save(str(model / "tokenizer.json"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    special = next(iter(base.get_added_tokens_decoder().values())).content
    names = ("unk_token", "bos_token", "eos_token", "pad_token")
    (model / "tokenizer_config.json").write_text(
        json.dumps(settings | dict.fromkeys(names, special) | {"tokenizer_class": loader})
    )
    (model / "chat_template.jinja").unlink()
    counted = result(workspace, learn(30))
    assert counted["learned"] > 20
    report_of(reload, workspace, learn(30))
    loaded = transformers.AutoTokenizer.from_pretrained(workspace / "prepared")
    written = Tokenizer.from_file(str(workspace / "prepared/tokenizer.json"))
    assert type(loaded).__name__ in (loader, "TokenizersBackend")
    for text in poems(20, seed=3):
        ids = loaded.encode(text, add_special_tokens=False)
        assert ids == written.encode(text, add_special_tokens=False).ids
        assert max(ids) >= length


@pytest.mark.slow
def test_the_steps_image_learns_without_torch(tmp_path: Path) -> None:
    workshop = Workshop.at(tmp_path)
    workshop.write("poems.jsonl", [{"text": text} for text in poems()])
    lesson = {"source": {"uri": "pvc://data/poems.jsonl"}, "size": 40}
    process = workshop.run_without_torch("add-tokens", workshop.job(tokens={"learn": lesson}))
    assert process.returncode == 0, process.stderr
    report = (tmp_path / "report.json").read_text()
    assert json.loads(report)["result"]["learned"] == 40
    assert len(report.encode()) <= MAX_REPORT_BYTES
