"""The column GGUF: what llama.cpp makes of a model after add-tokens, and after training and save.

Its converter takes the folder as published, its binding loads the file; the ids of texts are those of tokenizer.json,
and the probabilities of the next token those of transformers. Texts without a new token on which llama.cpp reads the
base model otherwise too are its own matter, and only counted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from finetune.steps.reload.step import run as reload
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.save.step import run as save
from finetune.steps.tokenizer_files.agreement import FURTHER, PROBES, around
from tests.families.llama_cpp import Answer, Question, Refused, convert, read
from tests.families.loading import loaded
from tests.unit.steps.runs import Run

TOKENS: list[dict[str, Any]] = [
    {"content": "<think>"},
    {"content": "</think>"},
    {"content": "<|plan|>", "special": True},
    {"content": "Anämie"},
]
PLAIN = (*PROBES, *FURTHER)
SPACED = {"content": " Anämie"}
"""Some of transformers' classes decode by rules of their own, and break a letter that stands for a byte in their
vocabulary."""
TEXT = "Why? <think>Air scatters\nshort waves</think> <|plan|>Anämie."
STRIPPED = (
    "with rstrip for the new tokens: in models called Phi-3 llama.cpp strips the white space behind every token, and "
    "add-tokens warns of it"
)
WITHOUT_PREDICTION = ("qwen3_next", "qwen3_5")
CLOSE = 0.02
"""How far logarithms of probabilities may be apart, of the width of all; llama.cpp keeps keys and values in f16."""


@dataclass(frozen=True)
class Reading:
    """A text that llama.cpp and tokenizer.json do not read alike."""

    text: str
    expected: list[int]
    found: list[int]

    def __str__(self) -> str:
        return f"{self.text!r} is {self.found} by llama.cpp and {self.expected} by tokenizer.json"


def gguf_of(name: str, base: Path, folder: Path) -> str:
    """`yes`, with what is llama.cpp's own matter, or what is wrong; StepFailure where a step refuses."""
    tokens, remedies = TOKENS, []
    if _strips(base):
        tokens, remedies = [token | {"rstrip": True} for token in tokens], [STRIPPED]
    try:
        run = _trained(base, folder / "run", tokens)
    except StepFailure as failure:
        if failure.error.reason != "TokenNotDecodable":
            raise
        remedies.append(f"with {SPACED['content']!r} for {tokens[-1]['content']!r}, as reload's refusal says")
        tokens = [*tokens[:-1], SPACED]
        run = _trained(base, folder / "again", tokens)
    folders = [run.base, run.workshop.layout.claims / "data/out"]
    with_token = [*around(str(token["content"]) for token in tokens), TEXT]
    texts = [*PLAIN, *with_token]
    try:
        answers = _asked(name, folders, texts, folder)
    except Refused as refusal:
        return f"llama.cpp refuses it: {refusal}"
    own: set[str] = set()
    for place, answer in zip(folders, answers, strict=True):
        different = _differences(place, texts, answer)
        new = [reading for reading in different if reading.text in with_token]
        if new:
            return f"ids: {len(new)} of {len(with_token)} texts with a new token differ: {new[0]}"
        own |= {reading.text for reading in different}
        if (apart := _apart(place, answer)) > CLOSE:
            return f"probabilities are apart by {apart:.0%}"
    if own:
        (answer,) = _asked(name, [base], [*own], folder)
        already = {reading.text for reading in _differences(base, [*own], answer)}
        if already != own:
            return f"ids of {min(own - already)!r} differ, and did not in the base model"
        remedies.append(f"llama.cpp reads {min(own)!r} otherwise than tokenizer.json, in the base model too")
    if options := _options(base):
        remedies.append(f"converted with {' '.join(options)}: the layer that predicts a further token is left out")
    return "; ".join(["yes", *remedies])


def _trained(base: Path, folder: Path, tokens: list[dict[str, Any]]) -> Run:
    training = {"method": "Full", "maxSteps": 1, "learningRate": 1e-2}
    output, dataset = {"uri": "pvc://data/out"}, {"packing": "Disabled"}
    run = Run.at(folder, training, tokens=tokens, model=base, dataset=dataset, output=output)
    reload(run.job, run.workshop.layout)
    run.go()
    save(run.job, run.workshop.layout)
    return run


def _strips(base: Path) -> bool:
    """Whether most tokens of the base swallow the white space behind them: of such models add-tokens says that the new
    ones need it too."""
    path = base / "tokenizer.json"
    added = Tokenizer.from_file(str(path)).get_added_tokens_decoder().values() if path.is_file() else []
    return sum(token.rstrip for token in added) * 2 > len(added)


def _options(model: Path) -> list[str]:
    """The converter wants the whole of the layer that predicts a further token, which tiny models have but parts of."""
    config = json.loads((model / "config.json").read_bytes())
    return ["--no-mtp"] if config["model_type"] in WITHOUT_PREDICTION else []


def _asked(name: str, folders: Sequence[Path], texts: Sequence[str], folder: Path) -> list[Answer]:
    files = convert(name, folders, folder, _options(folders[0]))
    return read([Question(str(file), texts, _ids(place)) for file, place in zip(files, folders, strict=True)], folder)


def _differences(folder: Path, texts: Sequence[str], answer: Answer) -> list[Reading]:
    encodings = _tokenizer(folder).encode_batch(list(texts), add_special_tokens=False)
    readings = (
        Reading(text, encoding.ids, found) for text, encoding, found in zip(texts, encodings, answer.ids, strict=True)
    )
    return [reading for reading in readings if reading.expected != reading.found]


def _apart(folder: Path, answer: Answer) -> float:
    with torch.no_grad():
        logits = loaded(folder)(input_ids=torch.tensor([_ids(folder)]), use_cache=False).logits[0, -1]
    expected, found = torch.log_softmax(logits, -1), torch.tensor(answer.logarithms)
    return float((expected - found[: len(expected)]).abs().max() / (expected.max() - expected.min()))


def _ids(folder: Path) -> list[int]:
    ids: list[int] = _tokenizer(folder).encode(TEXT, add_special_tokens=False).ids
    return ids


def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
