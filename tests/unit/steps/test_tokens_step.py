"""add-tokens: what a user may ask for, what is refused with which words, and that it is all or nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers

from finetune.api.contract import ExitCode
from finetune.steps.model_files.floats import Floats, decode, encode
from finetune.steps.model_files.safetensors_file import read_header
from finetune.steps.runtime import memory
from finetune.steps.tokens import step
from finetune.steps.workspace.staging import publish, published
from finetune.steps.workspace.token_record import read_record
from tests.models import tiny
from tests.unit.steps.adding import refusal, result
from tests.unit.steps.jobs import job_file, layout, outcome_of, report_of


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    publish(layout(tmp_path).model, "base", lambda partial: {"made": str(tiny(partial))})
    return tmp_path


def add(*tokens: str | dict[str, Any], **more: Any) -> dict[str, Any]:
    listed = [token if isinstance(token, dict) else {"content": token} for token in tokens]
    return {"tokens": {"add": listed, **more} if listed else more}


FROM = {"configMap": {"name": "terms", "key": "terms.txt"}}


def rows(workspace: Path, first: int, last: int) -> Floats:
    """Rows of the extended (bf16) embedding."""
    path = workspace / "prepared/model.safetensors"
    header = read_header(path)
    tensor = header.tensors["model.embed_tokens.weight"]
    start, row_bytes = header.data_start + tensor.start, tensor.size // tensor.shape[0]
    data = path.read_bytes()[start + first * row_bytes : start + last * row_bytes]
    return decode(data, "BF16").reshape(last - first, -1)


def test_the_report_counts_tokens_and_rows(workspace: Path) -> None:
    present = {"content": "<|im_end|>", "special": True}
    assert result(workspace, add("<think>", present, padToMultipleOf=1)) == {
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


def test_a_token_that_is_there_as_another_kind_is_said_to_stay_so(workspace: Path) -> None:
    (warning,) = result(workspace, add("<|im_end|>"))["warnings"]
    assert warning == "'<|im_end|>' is there already as a special token: decoding with skip_special_tokens hides it"


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
        ("one\n" + "x" * 1_000_000, "has 1,000,000 characters"),
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


def test_a_list_that_is_too_long_is_refused(workspace: Path) -> None:
    (workspace / "tokens.txt").write_text("\n".join(f"token{number}" for number in range(200_001)))
    assert "more than 200,000 tokens" in refusal(workspace, add(addFrom=FROM)).error.message
    with (workspace / "tokens.txt").open("wb") as file:
        file.truncate(65 << 20)
    assert "65.0 MiB, at most 64.0 MiB" in refusal(workspace, add(addFrom=FROM)).error.message


def test_all_problems_are_told_at_once_with_their_lines(workspace: Path) -> None:
    lines = [b"fine", b"", b"caf\xe9", b"   ", b"fine", b"a\tb", b"ok"] + [b""] * 20
    (workspace / "tokens.txt").write_bytes(b"\n".join(lines))
    error = refusal(workspace, add("<think>", "bad\x07bell", addFrom=FROM)).error
    assert error.message.startswith(
        "spec.tokens: 25 of the tokens cannot be added, the first 10: "
        "spec.tokens.add[1].content: the token 'bad\\x07bell' contains the control character U+0007; "
        "line 2: the token is empty; line 3: not UTF-8 at its byte 4 (0xE9); "
        "line 4: the token '   ' is only white space; line 5: 'fine' was asked for already in line 1; "
        "line 6: the token 'a\\tb' contains the control character U+0009; line 8: the token is empty; "
    )
    assert "line 11: " in error.message and "line 12: " not in error.message
    assert "Save the list as UTF-8." in error.hint and "Ask for each token once." in error.hint


def test_a_sentencepiece_vocabulary_is_read_as_such(workspace: Path) -> None:
    rows = ["<unk>\t0", "<s>\t0", "<0x0A>\t0", "▁cardiac\t-7.25", "ology\t-9", "▁ECG▁lead\t-1e-05"]
    (workspace / "tokens.txt").write_text("\n".join([*rows, '{"piece": "▁心筋"}']) + "\n", encoding="utf-8")
    assert result(workspace, add(addFrom=FROM))["added"] == 4
    contents = [record.content for record in read_record(workspace / "prepared")]
    assert contents == [" cardiac", "ology", " ECG lead", " 心筋"]


def test_a_list_may_lie_in_a_claim(workspace: Path) -> None:
    path = workspace / "claims/corpus/terms.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    assert result(workspace, add(addFrom={"uri": "pvc://corpus/terms.txt"}))["added"] == 2
    (workspace / "prepared").rename(workspace / "done")
    path.write_text("one\n\n")
    message = refusal(workspace, add(addFrom={"uri": "pvc://corpus/terms.txt"})).error.message
    assert message == "line 2 of pvc://corpus/terms.txt: the token is empty"
    failure = refusal(workspace, add(addFrom={"uri": "pvc://corpus/none.txt"}))
    assert (failure.code, failure.error.reason) == (ExitCode.NO_INPUT, "TokensNotFound")


@pytest.mark.slow
def test_two_hundred_thousand_tokens_are_added(workspace: Path) -> None:
    (workspace / "tokens.txt").write_text("\n".join(f"naïve{number}" for number in range(200_000)), encoding="utf-8")
    outcome = outcome_of("add-tokens", workspace, add(addFrom=FROM))
    assert (outcome.code, outcome.result["added"]) == (0, 200_000), outcome.log[-2000:]


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


def test_equal_starts_of_any_kind_get_a_warning_and_noise_parts_them(workspace: Path) -> None:
    heart = {"meanOf": "Description", "text": "the patient with infarction"}
    for init in ({"copyOf": "<|im_start|>"}, {"meanOf": "Vocabulary"}, heart):
        (warning,) = result(workspace, add("<a>", "<b>", init=init))["warnings"]
        assert "(<a>, <b>)" in warning and "equal" in warning and "init.noise" in warning
        first, second = rows(workspace, 384, 386)
        assert (first == second).all()
        assert "warnings" not in result(workspace, add("<a>", "<b>", init=init | {"noise": 0.01}))
        first, second = rows(workspace, 384, 386)
        assert (first != second).any()


def test_a_description_is_the_mean_of_its_pieces_before_any_token_was_added(workspace: Path) -> None:
    """Here the new token itself is in the description."""
    described = {"content": "infarction", "init": {"meanOf": "Description", "text": "patients with infarction"}}
    assert result(workspace, add(described, "patients"))["added"] == 2
    record, _ = read_record(workspace / "prepared")
    pieces = Tokenizer.from_file(str(workspace / "model/tokenizer.json")).encode(" patients with infarction").ids
    assert record.init == {"meanOf": "Description", "rows": pieces, "leadingSpace": True}
    old = rows(workspace, 0, 384)
    assert rows(workspace, 384, 385).tobytes() == decode(encode(old[pieces].mean(axis=0), "BF16"), "BF16").tobytes()


def test_a_description_without_pieces_is_refused(workspace: Path) -> None:
    path = workspace / "model/tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.normalizer = normalizers.Replace("x", "")
    tokenizer.save(str(path))
    failure = refusal(workspace, add("<a>", init={"meanOf": "Description", "text": "xxx"}))
    assert failure.error.message.startswith("spec.tokens.init.text: 'xxx' has no pieces")


def test_drawn_rows_depend_on_seed_and_id_alone(workspace: Path) -> None:
    normal = {"sample": "Normal"}

    def drawn(seed: int, *tokens: str) -> Floats:
        result(workspace, add(*tokens, init=normal) | {"training": {"epochs": 1, "seed": seed}})
        return rows(workspace, 384, 384 + len(tokens))

    two = drawn(1, "<a>", "<b>")
    assert (drawn(1, "<x>", "<y>", "<z>")[:2] == two).all()
    assert (drawn(2, "<a>", "<b>") != two).any(axis=1).all()
    assert read_record(workspace / "prepared")[0].init == {"sample": "Normal", "seed": 2}


def test_a_covariance_beyond_the_memory_is_refused(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 50_000)
    failure = refusal(workspace, add("<a>", init={"sample": "Normal"}))
    assert failure.error.reason == "OutOfMemory" and "3.2 MiB of memory, 48.8 KiB are free" in failure.error.message
    assert "spec.prepare.resources.limits.memory" in failure.error.hint


def test_a_stale_vocabulary_is_left_out_and_every_list_knows_the_tokens(workspace: Path) -> None:
    model = workspace / "model"
    (model / "tokenizer.model").write_bytes(b"sentencepiece")
    (model / "old.tiktoken").write_bytes(b"IQ== 0\n")
    (model / "added_tokens.json").write_text('{"<|im_end|>": 2}')
    settings = json.loads((model / "tokenizer_config.json").read_text())
    special = {"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    settings["added_tokens_decoder"] = {"2": special | {"special": True}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    warnings = result(workspace, add("<think>"))["warnings"]
    assert [warning.partition(" was left out")[0] for warning in warnings] == ["old.tiktoken", "tokenizer.model"]
    prepared = workspace / "prepared"
    assert not (prepared / "tokenizer.model").exists() and not (prepared / "old.tiktoken").exists()
    assert json.loads((prepared / "added_tokens.json").read_text()) == {"<|im_end|>": 2, "<think>": 384}
    decoder = json.loads((prepared / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert decoder["384"] == special | {"content": "<think>", "special": False}


def test_tokens_that_only_tokenizer_config_knows_keep_their_ids(workspace: Path) -> None:
    path = workspace / "model/tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["added_tokens_decoder"] = {"384": {"content": "<pad>", "special": True}}
    path.write_text(json.dumps(settings))
    counted = result(workspace, add({"content": "<pad>", "special": True}, "<think>"))
    assert (counted["alreadyPresent"], counted["vocabularySizeBefore"]) == (1, 385)
    assert "only 384 rows" in counted["warnings"][0]
    assert [record.id for record in read_record(workspace / "prepared")] == [385]


def test_contradicting_tokenizer_files_are_refused(workspace: Path) -> None:
    path = workspace / "model/tokenizer_config.json"
    path.write_text(json.dumps({"added_tokens_decoder": {"500": {"content": "<pad>", "special": True}}}))
    failure = refusal(workspace, add("<think>"))
    assert failure.error.reason == "UnsupportedTokenizer" and "'<pad>'" in failure.error.message


def lie(header: dict[str, Any], tensor: str, **changes: Any) -> None:
    header[tensor] |= changes


NORM = "model.norm.weight"
LAST = "model.embed_tokens.weight"
"""The matrix itself, and a tensor that is only carried along."""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda header: lie(header, LAST, data_offsets=[0, 49_152 + 2]), "its data_offsets span 49154"),
        (lambda header: lie(header, LAST, dtype="F32"), "needs 98304 bytes"),
        (lambda header: lie(header, LAST, dtype="Q4_1"), "unknown dtype 'Q4_1'"),
        (lambda header: lie(header, LAST, shape=[-384, -64]), "invalid shape"),
        (lambda header: lie(header, LAST, shape=[384 << 60, 64]), "invalid shape"),
        (lambda header: lie(header, LAST, shape=[64, 384]), "has shape [64, 384]"),
        (lambda header: lie(header, LAST, shape=[384 * 64]), "has shape [24576]"),
        (lambda header: lie(header, NORM, data_offsets=[0, 128]), "overlap"),
        (lambda header: lie(header, NORM, data_offsets=[1 << 40, (1 << 40) + 128]), "a hole of"),
        (lambda header: header.pop(NORM), "128 bytes follow the last tensor"),
        (lambda header: header.pop(LAST), "a hole of 49152 bytes"),
        (lambda header: header.update(__metadata__=["pt"]), "__metadata__ is not a map"),
    ],
)
def test_a_lying_header_stops_the_step_before_it_writes(
    workspace: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    path = workspace / "model/model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    assert words in broken_model(workspace)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:100_000], "truncated"),
        (lambda data: data[:500], "truncated"),
        (lambda data: data[:-1], "truncated"),
        (lambda data: data[:5], "too few"),
        (lambda data: b"", "too few"),
        (lambda data: data + b"\0", "1 bytes follow the last tensor"),
        (lambda data: struct.pack("<Q", len(data) - 7) + data[8:], "truncated"),
        (lambda data: struct.pack("<Q", 1 << 62) + data[8:], "more than the format allows"),
        (lambda data: struct.pack("<Q", 99_999_999) + data[8:], "truncated"),
        (lambda data: data[:8] + b"[" + data[9:], "does not start with '{'"),
        (lambda data: data[:9] + b"\xff" + data[10:], "not valid JSON"),
        (lambda data: data.replace(b"layers.1.input_layernorm", b"layers.0.input_layernorm", 1), "twice"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1", "more than the format allows"),
    ],
)
def test_a_damaged_file_stops_the_step_before_it_writes(
    workspace: Path, damage: Callable[[bytes], bytes], words: str
) -> None:
    path = workspace / "model/model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert words in broken_model(workspace)


def broken_model(workspace: Path) -> str:
    """Why add-tokens refuses the model's files; it leaves them as they are and writes nothing."""
    before = {path.name: path.read_bytes() for path in (workspace / "model").iterdir()}
    failure = refusal(workspace, add("<think>"))
    assert failure.code in (ExitCode.BAD_DATA, ExitCode.BAD_CONFIGURATION)
    assert failure.error.reason in ("CorruptModel", "UnsupportedModel")
    assert failure.error.message.startswith("spec.model: ")
    assert {path.name: path.read_bytes() for path in (workspace / "model").iterdir()} == before
    assert [path.name for path in (workspace / "prepared.partial").iterdir()] == [".inputs"]
    return failure.error.message


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
from finetune.steps.runtime import disk
if "--unchecked" in sys.argv: disk.require_space = lambda *_: None
sys.exit(__main__.main(["add-tokens"]))' $FLAG
code=$?; cd "$FINETUNE_WORKSPACE"; echo "left:"; find . -path "./prepared*" -type f; diff -r "$SEED" model; exit $code
"""


@pytest.mark.parametrize("flag", ["", "--unchecked"], ids=["foreseen", "while-writing"])
def test_a_full_disk_is_said_to_be_one(tmp_path: Path, flag: str) -> None:
    namespace = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs takes a mount namespace, which this machine does not allow")
    publish(layout(tmp_path / "seed").model, "base", lambda partial: {"made": str(tiny(partial, hidden=512))})
    (tmp_path / "workspace").mkdir()
    environment = job_file(tmp_path, add("<think>")) | {
        "FINETUNE_WORKSPACE": str(tmp_path / "workspace"),
        "SEED": str(tmp_path / "seed/model"),
        "PYTHON": sys.executable,
        "SIZE": "12m",
        "FLAG": flag,
    }
    process = subprocess.run([*namespace, "sh", "-c", FULL], env=environment, capture_output=True, text=True)
    error = json.loads((tmp_path / "report.json").read_text())["error"]
    assert (process.returncode, error["reason"]) == (78, "DiskFull"), process.stderr
    assert re.search(r"takes [\d.]+ MiB, the workspace has [\d.]+ MiB left", error["message"])
    assert "spec.workspace.size" in error["hint"]
    assert set(process.stdout.partition("left:\n")[2].split()) <= {"./prepared.partial/.inputs"}


def test_torch_is_not_imported_and_memory_stays_small(workspace: Path) -> None:
    outcome = outcome_of("add-tokens", workspace, add("<think>"), PYTHONPROFILEIMPORTTIME="1")
    assert outcome.code == 0
    imported = {line.rpartition("|")[2].strip() for line in outcome.log.splitlines() if line.startswith("import time:")}
    assert "numpy" in imported
    assert not imported & {"torch", "transformers", "safetensors"}


def test_whatever_is_wrong_with_any_token_is_told_at_once(workspace: Path) -> None:
    spec = add(
        "Ġthe",
        {"content": "<a>", "init": {"copyOf": "<nowhere>"}},
        "<b>",
        {"content": "<c>", "init": {"copyOf": "?!?!"}},
    )
    error = refusal(workspace, spec).error
    assert "3 of the tokens cannot be added: " in error.message
    for words in (
        "spec.tokens.add[1].init.copyOf: '<nowhere>'",
        "spec.tokens.add[3].init.copyOf",
        "spec.tokens.add[0]: 'Ġthe'",
    ):
        assert words in error.message


def test_what_a_list_gets_wrong_is_told_together_with_what_the_model_finds_wrong(workspace: Path) -> None:
    (workspace / "tokens.txt").write_text("fine\n\nĠthe\na\tb\nfine\n", encoding="utf-8")
    there = {"content": "<nowhere>", "reuse": True}
    spec = add("<b>", {"content": "<a>", "init": {"copyOf": "?!?!"}}, there, addFrom=FROM)
    error = refusal(workspace, spec).error
    assert error.message == (
        "spec.tokens: 6 of the tokens cannot be added: line 2 of ConfigMap terms, key terms.txt: the token is empty; "
        "line 4: the token 'a\\tb' contains the control character U+0009; line 5: 'fine' was asked for already in "
        "line 1; spec.tokens.add[2].reuse: '<nowhere>' is not one token of the base model's tokenizer; "
        "spec.tokens.add[1].init.copyOf: '?!?!' is not one token of the base model's tokenizer; "
        "line 3 of ConfigMap terms, key terms.txt: 'Ġthe' is the tokenizer's own name of a piece that is not this text"
    )


def test_an_ordinary_token_that_servers_would_hide_gets_a_warning(workspace: Path) -> None:
    (warning,) = result(workspace, add("<|plan|>", {"content": "<|go|>", "special": True}, "<seen>"))["warnings"]
    assert warning.startswith("<|plan|>: llama.cpp's converter takes tokens of this shape for control tokens")


def test_an_adapter_with_new_rows_is_said_to_load_in_peft_only(workspace: Path) -> None:
    spec = add("<seen>") | {"output": {"uri": "pvc://models/out", "format": "Adapter"}}
    (warning,) = result(workspace, spec)["warnings"]
    assert "is loaded by peft alone" in warning
    assert "warnings" not in result(workspace, add("<seen>"))
