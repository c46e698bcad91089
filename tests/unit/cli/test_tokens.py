"""`finetune tokens` on a folder: what it shows, makes and refuses, and that the model it reads is left alone."""

import hashlib
import json
import os
import subprocess
import sys

import pytest

from tests.models import tiny
from tests.unit.steps import quantised

pytestmark = pytest.mark.slow


@pytest.fixture
def finetune(tmp_path):
    """Runs the command beside a folder `model`; the real steps run as its processes."""
    tiny(tmp_path / "model", sharded=True, tied=False)

    def command(*arguments):
        process = subprocess.run(
            [sys.executable, "-m", "finetune.cli", "tokens", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "160"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert not list(tmp_path.glob(".finetune-tokens-*"))
        return process.returncode, process.stdout

    command.folder = tmp_path
    return command


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def row(output, name):
    (line,) = [line for line in output.splitlines() if line.strip().startswith(name)]
    return line


def test_a_dry_run_shows_pieces_inits_and_shapes_and_writes_nothing(finetune):
    before = digests(finetune.folder / "model")
    code, output = finetune("model", "--add", "<think>", "--add", "xylem", "--add", "<|im_end|>", "--dry-run")
    assert code == 0, output
    assert "384" in row(output, "<think>") and "the mean of its pieces" in row(output, "<think>")
    assert "␣" in row(output, "xylem").split("385")[1]
    assert "there already: <|im_end|> (2)" in output
    assert row(output, "tokens").split() == ["tokens", "384", "386"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert "BF16" in row(output, name) and "384 × 64" in row(output, name) and "448 × 64" in row(output, name)
    assert "+16.4 kB" in row(output, "weights on disk")
    assert [path.name for path in finetune.folder.iterdir()] == ["model"] and digests(
        finetune.folder / "model"
    ) == before


def test_the_folder_that_it_makes_is_a_proven_model_of_its_own(finetune):
    before = digests(finetune.folder / "model")
    code, output = finetune(
        "model", "--add", "<think>", "--init", "copyOf=<|im_start|>", "--output", "out/new", "--probe", "Why?"
    )
    assert code == 0, output
    assert "a copy of <|im_start|>" in output
    assert "how likely each token is right after “Why?”" in output
    assert "✔ proven: 1 new tokens round-trip, tokenizer.json and transformers give the same ids" in " ".join(
        output.split()
    )
    made = finetune.folder / "out/new"
    assert json.loads((made / "finetune-tokens.json").read_text())[0]["init"] == {"copyOf": "<|im_start|>", "row": 1}
    assert json.loads((made / "finetune-reload.json").read_text())["message"] == "Why?"
    assert json.loads((made / "config.json").read_text())["vocab_size"] == 448
    assert all(path.stat().st_nlink == 1 for path in made.iterdir())
    assert digests(finetune.folder / "model") == before


JOB = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: job}
spec:
  model: {uri: "hf://org/model"}
  tokens:
    add: [{content: "<pause>", special: true}]
    addFrom: {configMap: {name: terms, key: terms.txt}}
  dataset: {sources: [{uri: "hf://datasets/org/data"}], packing: Disabled}
  training: {epochs: 1}
"""
TERMS = """\
---
apiVersion: v1
kind: ConfigMap
metadata: {name: terms}
data: {terms.txt: "BRCA1\\nTP53\\n"}
"""


def test_the_tokens_of_a_job_and_its_list(finetune):
    file = finetune.folder / "job.yaml"
    file.write_text(JOB)
    code, output = finetune("model", "-f", file, "--dry-run")
    assert code == 66 and "the ConfigMap terms, key terms.txt is not in the file" in output
    file.write_text(JOB + TERMS)
    code, output = finetune("model", "-f", file, "--no-reload", "--output", "new")
    assert code == 0, output
    assert "special" in row(output, "<pause>") and row(output, "TP53")
    assert not (finetune.folder / "new/finetune-reload.json").exists()
    (finetune.folder / "other.txt").write_text("EGFR\n")
    code, output = finetune("model", "-f", file, "--add-from", "other.txt", "--dry-run")
    assert code == 0 and row(output, "EGFR") and "TP53" not in output


def test_a_chat_template_that_would_be_left_out_is_refused(finetune):
    file = finetune.folder / "job.yaml"
    file.write_text(JOB.replace('org/model"}', 'org/model", chatTemplate: {text: "{{ messages }}"}}') + TERMS)
    code, output = finetune("model", "-f", file, "--no-reload", "--output", "new")
    assert code == 64 and "spec.model.chatTemplate" in output
    code, output = finetune("model", "-f", file, "--dry-run")
    assert code == 0, output


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere", "--add", "x", "--dry-run"], 66, "nowhere is not a folder"),
        (["model", "--add", "x"], 64, "--output FOLDER"),
        (["model", "--dry-run"], 64, "no tokens: name them with --add"),
        (["model", "--add", "x", "--output", "model"], 64, "there is something already"),
        (["model", "--add", "x", "--init", "copyOf", "--dry-run"], 64, "write WAY=WHAT"),
        (["model", "--add", "x", "--init", "copyof=y", "--dry-run"], 78, "did you mean copyOf?"),
        (["model", "--add", "<x>", "--init", "copyOf=<|im_strat|>", "--dry-run"], 78, "Did you mean '<|im_start|>'"),
        (["model", "--add", "x", "--add", "x", "--dry-run"], 78, "spec.tokens.add[1]  'x' is listed twice"),
        (["model", "--add-from", "bad.txt", "--output", "new"], 78, "line 2 of bad.txt: the token is empty"),
        (["model", "--add-from", "none.txt", "--dry-run"], 66, "none.txt: there is no such file"),
    ],
)
def test_what_is_wrong_is_said_with_the_remedy(finetune, arguments, code, words):
    (finetune.folder / "bad.txt").write_text("fine\n\nok\n")
    seen, output = finetune(*arguments)
    assert (seen, words in output) == (code, True), output
    assert not (finetune.folder / "new").exists()


def test_quantised_weights_are_written_out_in_the_folder_that_it_makes(finetune):
    quantised.fp8_blocks(finetune.folder / "fp8")
    before = digests(finetune.folder / "fp8")
    code, output = finetune("fp8", "--add", "<think>", "--output", "new")
    assert code == 0, output
    assert "fp8 weights were written out as bf16: 437.5 KiB became 675.9 KiB" in output
    config = json.loads((finetune.folder / "new/config.json").read_text())
    assert "quantization_config" not in config and config["vocab_size"] == 448
    assert digests(finetune.folder / "fp8") == before


def test_a_quantisation_that_it_does_not_know_is_refused_with_what_helps(finetune):
    path = finetune.folder / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "awq"}}))
    code, output = finetune("model", "--add", "<think>", "--dry-run")
    assert code == 78
    assert "quantised by awq" in output and "base_model" in output
