"""Where files prove that transformers takes tokenizer.json as it is, it does; where they do not, it is asked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from finetune.steps.runtime.failure import StepFailure
from finetune.steps.tokenizer_files import apart
from finetune.steps.tokenizer_files.agreement import difference, probes
from finetune.steps.tokenizer_files.as_it_is import HONOURED, proven
from finetune.steps.tokens import step as add_tokens
from finetune.steps.workspace.staging import publish
from tests.models import tiny
from tests.unit.steps.jobs import job_file, layout, report_of
from tests.unit.steps.vocabularies import byte_fallback, byte_level

TOKENS = {"tokens": {"add": [{"content": "<obs>"}]}}
OBJECT = {"__type": "AddedToken", "content": "<|end|>", "lstrip": False, "normalized": False, "rstrip": False}
GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": OBJECT}


def files(folder: Path, model_type: str, settings: dict[str, Any]) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "TokenizersBackend"])
@pytest.mark.parametrize("model_type", HONOURED)
def test_what_is_proven_without_transformers_is_true_of_transformers(
    tmp_path: Path, model_type: str, name: str
) -> None:
    tokenizer = files(tmp_path, model_type, GENERIC | {"tokenizer_class": name})
    assert proven(tmp_path, tokenizer)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert difference(tokenizer, loaded, probes(tokenizer), decoded=True) is None
    assert loaded.get_added_vocab() == {"<|begin|>": 384, "<|end|>": 385}


def special(content: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": content, "special": True, **plain, **flags}


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_class": "GPT2Tokenizer"},
        {"tokenizer_class": None},
        {"pad_token": "[PAD]"},
        {"mask_token": {"content": "[MASK]"}},
        {"extra_special_tokens": {"image_token": "<image>"}},
        {"additional_special_tokens": ["<extra>"]},
        {"added_tokens_decoder": {"385": special("<|end|>", lstrip=True)}},
        {"added_tokens_decoder": {"386": special("<more>")}},
        {"split_special_tokens": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_settings_that_may_change_ids_prove_nothing(tmp_path: Path, change: dict[str, Any]) -> None:
    assert not proven(tmp_path, files(tmp_path, "llama", GENERIC | change))


def test_nor_do_other_files_that_declare_tokens_or_model_types_that_transformers_knows_better(tmp_path: Path) -> None:
    tokenizer = files(tmp_path, "llama", GENERIC)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    assert proven(tmp_path, tokenizer)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    assert not proven(tmp_path, tokenizer)
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|end|>": 385}))
    assert not proven(tmp_path, tokenizer)
    (tmp_path / "added_tokens.json").unlink()
    assert not proven(tmp_path, files(tmp_path, "qwen2", GENERIC))


def model(
    folder: Path, tokenizer: Tokenizer, settings: dict[str, Any], change: Callable[[dict[str, Any]], None]
) -> Path:
    def make(partial: Path) -> dict[str, Any]:
        tiny(partial, padding=200)
        tokenizer.save(str(partial / "tokenizer.json"))
        (partial / "tokenizer_config.json").write_text(json.dumps(settings))
        config = json.loads((partial / "config.json").read_text())
        change(config)
        (partial / "config.json").write_text(json.dumps(config))
        return {}

    publish(layout(folder).model, "base", make)
    return folder


def test_a_model_type_that_takes_its_own_class_whatever_the_settings_name_is_refused_before_weights_are_written(
    tmp_path: Path,
) -> None:
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    base = model(tmp_path, byte_fallback(), settings, lambda config: config.update(model_type="qwen2"))
    with pytest.raises(StepFailure) as caught:
        report_of(add_tokens, base, TOKENS)
    assert caught.value.error.reason == "TokenizersDisagree" and "Qwen2Tokenizer" in caught.value.error.message
    assert not list(tmp_path.glob("prepared*/*.safetensors"))


IMPORTED = """
import sys
from finetune.steps import __main__
assert __main__.main(["add-tokens"]) == 0
print(*sorted({"torch", "transformers"} & sys.modules.keys()))
"""


def test_transformers_is_asked_in_another_process_and_torch_never_imported(tmp_path: Path) -> None:
    base = model(tmp_path, byte_level(), {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>"}, lambda _: None)
    process = subprocess.run(
        [sys.executable, "-c", IMPORTED], env=job_file(base, TOKENS), capture_output=True, text=True, check=True
    )
    assert process.stdout.splitlines()[-1] == ""
    assert (base / "prepared/tokenizer.json").is_file()


def test_the_process_that_asks_sees_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that cannot be imported: whoever tries ends with an error."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise SystemExit('torch was imported')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(sys.path)}")
    base = model(tmp_path / "job", byte_fallback(), {"tokenizer_class": "LlamaTokenizer"}, lambda _: None)
    changed = apart.complete(base / "model")
    assert changed is not None and "now names PreTrainedTokenizerFast" in changed


def test_an_answer_that_does_not_come_is_an_error_that_says_why(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ChildProcessError, match=r"transformers could not be asked about the tokenizer: .*EOF"):
        apart.complete(tmp_path)
