"""What a proof of an extended model leaves open, and why: a proof that does not say so is read as more than it is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from finetune.steps.reload.proof import Gap, Proof
from finetune.steps.tokenizer_files.agreement import PROBES, TOKENIZER, probes
from finetune.steps.tokenizer_files.conversion import SENTENCEPIECE
from finetune.steps.workspace.token_record import TokenRecord

READ = 4096
"""New tokens around which texts are read by transformers and by tokenizer.json alike."""

GROUPS = 3
"""Kinds of tensors that are named."""


def gaps(folder: Path, base: Path, records: Sequence[TokenRecord], proof: Proof) -> Iterator[Gap]:
    """What was not proven of the model in `folder`, which has the tokens of `records` more than `base`; what matters
    most first."""
    if not proof.was_run:
        yield Gap("that it runs", "loading it needs more memory than is free: names and shapes were compared")
    if proof.not_loaded:
        count = len(proof.not_loaded)
        yield Gap(
            f"{count:,} tensors that are not loaded ({_kinds(proof.not_loaded)})",
            "transformers has no place for them in the model that it trains: their bytes are the base model's, whether "
            "they work was not tried",
        )
    yield from _sentencepiece(folder, base)
    if (folder / TOKENIZER).is_file():
        around = sum(record.piece is None for record in records[:READ])
        count = len(probes(Tokenizer.from_file(str(folder / TOKENIZER))))
        yield Gap(
            "ids of all texts",
            f"tokenizer.json and transformers were compared on {count} texts and around {around:,} new tokens, before "
            "and after the edit on one text; load-dataset compares rows of the job's own",
        )
    if proof.equal_states is not None:
        yield Gap(
            "states of all texts",
            "hidden states were compared on one old text; where all old weights are equal, others follow from them",
        )
    learned = sum(record.piece is not None for record in records)
    if learned:
        yield Gap(
            f"chances of {learned:,} learned pieces",
            "they come up within words, after other pieces: each has its id and its row, and its text comes back",
        )
    if later := sum(item.without_prompt_before is None for item in proof.probabilities):
        yield Gap(f"{later:,} tokens' chances before", "each takes two passes of the base model; those after are there")


def _kinds(names: Sequence[str]) -> str:
    """The beginnings of tensors' names: a tower, a layer that predicts a further token."""
    kinds = list(dict.fromkeys(".".join(name.split(".")[:3]) for name in names))
    return ", ".join(kinds[:GROUPS]) + (", ..." if len(kinds) > GROUPS else "")


def _sentencepiece(folder: Path, base: Path) -> Iterator[Gap]:
    for name in SENTENCEPIECE:
        if (folder / name).is_file():
            yield Gap(
                f"{name} around new tokens",
                f"sentencepiece gives the ids of tokenizer.json on {len(PROBES)} texts; beside an added token it cuts "
                "by rules of its own, so that of these each one's id and name was compared",
            )
        elif (base / name).is_file():
            yield Gap(
                f"engines that read {name}",
                "it was left out, because it could not be made to say what tokenizer.json says: add-tokens warns why",
            )
    if not any((base / name).is_file() for name in SENTENCEPIECE) and _made_of_sentencepiece(folder / TOKENIZER):
        yield Gap(
            "engines that read tokenizer.model",
            "the base model has none, although its tokenizer is of sentencepiece's kind: llama.cpp's converter may "
            "read it otherwise than tokenizer.json says",
        )


def _made_of_sentencepiece(path: Path) -> bool:
    if not path.is_file():
        return False
    model = json.loads(path.read_bytes()).get("model", {})
    return bool(model.get("byte_fallback")) or model.get("type") == "Unigram"
