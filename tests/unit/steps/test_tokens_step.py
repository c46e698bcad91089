"""add-tokens: what a user may ask for, what is refused with which words, and that it is all or nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from finetune.api.contract import ExitCode
from finetune.steps.failure import StepFailure
from finetune.steps.staging import publish, published
from finetune.steps.tokens import step
from finetune.steps.tokens.record import read_record
from tests.models import tiny
from tests.unit.steps.jobs import job_file, layout, outcome_of, report_of


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    publish(layout(tmp_path).model, "base", lambda partial: {"made": str(tiny(partial))})
    return tmp_path


def add(*tokens: str | dict[str, Any], **more: Any) -> dict[str, Any]:
    listed = [token if isinstance(token, dict) else {"content": token} for token in tokens]
    return {"tokens": {"add": listed, **more} if listed else more}


FROM = {"configMap": {"name": "terms", "key": "terms.txt"}}


def result(workspace: Path, spec: dict[str, Any]) -> dict[str, Any]:
    report = report_of(step, workspace, spec)
    assert report.result is not None
    return report.result


def refusal(workspace: Path, spec: dict[str, Any]) -> StepFailure:
    with pytest.raises(StepFailure) as caught:
        report_of(step, workspace, spec)
    assert not (workspace / "prepared").exists()
    assert caught.value.error.hint
    return caught.value


def test_the_report_counts_tokens_and_rows(workspace: Path) -> None:
    assert result(workspace, add("<think>", "<|im_end|>", padToMultipleOf=1)) == {
        "added": 1,
        "alreadyPresent": 1,
        "vocabularySize": 385,
        "vocabularySizeBefore": 384,
        "embeddingRows": 385,
        "embeddingRowsBefore": 384,
    }
    assert [record.content for record in read_record(workspace / "prepared")] == ["<think>"]


def test_rows_never_shrink(tmp_path: Path) -> None:
    publish(layout(tmp_path).model, "base", lambda partial: {"made": str(tiny(partial, padding=200))})
    counted = result(tmp_path, add("<think>"))
    assert (counted["embeddingRows"], counted["vocabularySize"]) == (584, 385)


def test_when_all_tokens_are_there_the_model_is_taken_as_it_is(workspace: Path) -> None:
    assert result(workspace, add("<|im_end|>"))["added"] == 0
    assert (workspace / "prepared/model.safetensors").samefile(workspace / "model/model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        assert (workspace / "prepared" / name).read_bytes() == (workspace / "model" / name).read_bytes()


def test_the_same_tokens_again_do_nothing_others_start_anew(workspace: Path) -> None:
    first = result(workspace, add("<think>"))
    before = (workspace / "prepared/model.safetensors").stat()
    assert result(workspace, add("<think>")) == first
    assert (workspace / "prepared/model.safetensors").stat() == before
    assert result(workspace, add("<think>", "<other>"))["added"] == 2


def test_tokens_come_from_plain_lines_and_pieces(workspace: Path) -> None:
    (workspace / "tokens.txt").write_text('foo bar\r\n{"piece": "心筋"}\nnaïve\n', encoding="utf-8")
    assert result(workspace, add("<think>", addFrom=FROM))["added"] == 4
    assert [record.content for record in read_record(workspace / "prepared")] == ["<think>", "foo bar", "心筋", "naïve"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("one\n\nthree\n", "line 2 of ConfigMap terms, key terms.txt: the token is empty"),
        ("one\n   \n", "line 2 of ConfigMap terms, key terms.txt: the token '   ' is only white space"),
        ("one\ntwo\none\n", "line 3 of ConfigMap terms, key terms.txt: 'one' was asked for already in line 1"),
        ("one\n" + "x" * 600, "line 2 of ConfigMap terms, key terms.txt: the token 'xxxxxxxx"),
        ("one\n" + "x" * 1_000_000, "has 1000000 characters"),
        ("a\tb\n", "the control character U+0009"),
        ("one\u0000\n", "the control character U+0000"),
        ('{"piece": 3}\n', "the piece '3' is not a string"),
        ('{"pieces": "x"}\n', "is not an object with a piece"),
        ("<think>\n", "was asked for already in spec.tokens.add[0]"),
    ],
)
def test_a_bad_line_is_named_with_its_number(workspace: Path, lines: str, words: str) -> None:
    (workspace / "tokens.txt").write_text(lines, encoding="utf-8")
    failure = refusal(workspace, add("<think>", addFrom=FROM))
    assert (failure.code, failure.error.reason) == (ExitCode.BAD_CONFIGURATION, "InvalidToken")
    assert words in failure.error.message


def test_a_list_that_is_not_utf8_or_too_long_is_refused(workspace: Path) -> None:
    (workspace / "tokens.txt").write_bytes(b"one\n\xff\xfe\n")
    assert "not UTF-8 at byte 4" in refusal(workspace, add(addFrom=FROM)).error.message
    (workspace / "tokens.txt").write_text("\n".join(f"token{number}" for number in range(200_000)))
    assert "more than 100000 tokens" in refusal(workspace, add(addFrom=FROM)).error.message


def test_a_missing_list_is_named(workspace: Path) -> None:
    failure = refusal(workspace, add(addFrom=FROM))
    assert (failure.code, failure.error.reason) == (ExitCode.NO_INPUT, "TokensNotFound")
    assert "spec.tokens.addFrom (ConfigMap terms, key terms.txt)" in failure.error.message


def test_control_characters_in_the_spec_are_named(workspace: Path) -> None:
    message = refusal(workspace, add("fine", "bad\x07bell")).error.message
    assert message.startswith("spec.tokens.add[1].content: ") and "U+0007" in message


def test_an_unknown_source_is_named_with_similar_ones(workspace: Path) -> None:
    failure = refusal(workspace, add("fine", {"content": "<think>", "init": {"copyOf": "<|im_strat|>"}}))
    assert (failure.code, failure.error.reason) == (ExitCode.BAD_CONFIGURATION, "UnknownToken")
    assert failure.error.message.startswith("spec.tokens.add[1].init.copyOf: '<|im_strat|>'")
    assert "'<|im_start|>'" in failure.error.hint
    failure = refusal(workspace, add("fine", init={"copyOf": "nothing like it"}))
    assert failure.error.message.startswith("spec.tokens.init.copyOf: ")


def test_the_name_of_another_piece_is_refused(workspace: Path) -> None:
    failure = refusal(workspace, add("Ġthe"))
    assert failure.error.reason == "TokenCollision" and "spec.tokens.add[0]" in failure.error.message


def test_two_copies_of_one_source_get_a_warning(workspace: Path) -> None:
    copy = {"copyOf": "<|im_start|>"}
    (warning,) = result(workspace, add({"content": "<a>", "init": copy}, {"content": "<b>", "init": copy}))["warnings"]
    assert warning.startswith("2 new tokens copy '<|im_start|>' (<a>, <b>)") and "1/3 each" in warning


def test_inits_of_a_later_release_are_refused(workspace: Path) -> None:
    spec = add({"content": "<a>", "init": {"meanOf": "Description", "text": "the first letter"}})
    assert refusal(workspace, spec).error.reason == "NotImplemented"
    assert refusal(workspace, add({"content": "<a>", "init": {"sample": "Normal"}})).error.reason == "NotImplemented"


def test_a_stale_vocabulary_is_left_out_and_every_list_knows_the_tokens(workspace: Path) -> None:
    model = workspace / "model"
    (model / "tokenizer.model").write_bytes(b"sentencepiece")
    (model / "added_tokens.json").write_text('{"<|im_end|>": 2}')
    settings = json.loads((model / "tokenizer_config.json").read_text())
    special = {"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    settings["added_tokens_decoder"] = {"2": special | {"special": True}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (warning,) = result(workspace, add("<think>"))["warnings"]
    assert "tokenizer.model was left out" in warning
    prepared = workspace / "prepared"
    assert not (prepared / "tokenizer.model").exists()
    assert json.loads((prepared / "added_tokens.json").read_text()) == {"<|im_end|>": 2, "<think>": 384}
    decoder = json.loads((prepared / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert decoder["384"] == special | {"content": "<think>", "special": False}


def test_tokens_that_only_tokenizer_config_knows_keep_their_ids(workspace: Path) -> None:
    path = workspace / "model/tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["added_tokens_decoder"] = {"384": {"content": "<pad>", "special": True}}
    path.write_text(json.dumps(settings))
    counted = result(workspace, add("<pad>", "<think>"))
    assert (counted["alreadyPresent"], counted["vocabularySizeBefore"]) == (1, 385)
    assert "only 384 rows" in counted["warnings"][0]
    assert [record.id for record in read_record(workspace / "prepared")] == [385]


def test_contradicting_tokenizer_files_are_refused(workspace: Path) -> None:
    path = workspace / "model/tokenizer_config.json"
    path.write_text(json.dumps({"added_tokens_decoder": {"500": {"content": "<pad>", "special": True}}}))
    failure = refusal(workspace, add("<think>"))
    assert failure.error.reason == "UnsupportedTokenizer" and "'<pad>'" in failure.error.message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "brand_new"}, "model_type 'brand_new' is not among gemma"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"vocab_size": 500}, "has shape [384, 64]"),
        ({"tie_word_embeddings": False}, "there is no tensor lm_head.weight"),
    ],
)
def test_a_checkpoint_that_cannot_be_proven_is_refused(workspace: Path, changes: dict[str, Any], words: str) -> None:
    path = workspace / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    failure = refusal(workspace, add("<think>"))
    assert (failure.code, failure.error.reason) == (ExitCode.BAD_CONFIGURATION, "UnsupportedModel")
    assert words in failure.error.message


def test_a_truncated_model_is_refused_and_left_alone(workspace: Path) -> None:
    os.truncate(workspace / "model/model.safetensors", 100_000)
    before = (workspace / "model/model.safetensors").read_bytes()
    failure = refusal(workspace, add("<think>"))
    assert (failure.code, failure.error.reason) == (ExitCode.BAD_DATA, "CorruptModel")
    assert "truncated" in failure.error.message
    assert (workspace / "model/model.safetensors").read_bytes() == before


def test_a_model_without_tokenizer_json_is_refused(workspace: Path) -> None:
    (workspace / "model/tokenizer.json").unlink()
    assert refusal(workspace, add("<think>")).error.reason == "UnsupportedTokenizer"


def test_killed_at_any_moment_it_leaves_nothing_half(tmp_path: Path) -> None:
    original = tiny(tmp_path / "tiny", tied=False, sharded=True, hidden=512, layers=2)
    spec = add("<think>")
    for moment in (0.0, 0.02, 0.1):
        folder = tmp_path / str(moment)
        publish(layout(folder).model, "base", lambda partial: {"made": str(shutil.copytree(original, partial / "x"))})
        for path in (folder / "model/x").iterdir():
            path.rename(folder / "model" / path.name)
        process = subprocess.Popen(
            [sys.executable, "-m", "finetune.steps", "add-tokens"],
            env=job_file(folder, spec),
            stdout=subprocess.DEVNULL,
        )
        while not (folder / "prepared.partial").exists() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (folder / "prepared").exists() or published(folder / "prepared") is not None
        report_of(step, folder, spec)
        assert not list(folder.glob("prepared.*"))
    for moment in ("0.02", "0.1"):
        for path in (tmp_path / "0.0/prepared").iterdir():
            assert path.read_bytes() == (tmp_path / moment / "prepared" / path.name).read_bytes()


FULL = """
mount -t tmpfs -o size=$SIZE tmpfs "$FINETUNE_WORKSPACE" && cp -r "$SEED" "$FINETUNE_WORKSPACE/model" &&
"$PYTHON" -c 'import sys
from finetune.steps import __main__
from finetune.steps.tokens import step
if "--unchecked" in sys.argv: step.require_space = lambda *_: None
sys.exit(__main__.main(["add-tokens"]))' $FLAG
code=$?; ls "$FINETUNE_WORKSPACE"; exit $code
"""


@pytest.mark.parametrize("flag", ["", "--unchecked"])
def test_a_full_disk_is_said_to_be_one(tmp_path: Path, flag: str) -> None:
    publish(layout(tmp_path / "seed").model, "base", lambda partial: {"made": str(tiny(partial, hidden=512))})
    (tmp_path / "workspace").mkdir()
    environment = job_file(tmp_path, add("<think>")) | {
        "FINETUNE_WORKSPACE": str(tmp_path / "workspace"),
        "SEED": str(tmp_path / "seed/model"),
        "PYTHON": sys.executable,
        "SIZE": "12m",
        "FLAG": flag,
    }
    namespace = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
    process = subprocess.run([*namespace, "sh", "-c", FULL], env=environment, capture_output=True, text=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (process.returncode, report["error"]["reason"]) == (78, "DiskFull"), process.stderr
    assert "spec.workspace.size" in report["error"]["hint"]
    assert "prepared" not in process.stdout.split()


def test_torch_is_not_imported_and_memory_stays_small(workspace: Path) -> None:
    outcome = outcome_of("add-tokens", workspace, add("<think>"), PYTHONPROFILEIMPORTTIME="1")
    assert outcome.code == 0
    imported = {line.rpartition("|")[2].strip() for line in outcome.log.splitlines() if line.startswith("import time:")}
    assert "numpy" in imported
    assert not imported & {"torch", "transformers", "safetensors"}
