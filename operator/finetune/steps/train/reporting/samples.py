"""Prompts of the spec, answered by a model: the same way before and after training."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.api.spec import Objective, Samples, Training
from finetune.steps.inference.likelihood import Continuation, Prompts
from finetune.steps.workspace.proof import read_proof
from finetune.steps.workspace.staging import digest, flush
from finetune.steps.workspace.token_record import read_record

BEFORE = "samples-before.json"
"""In the folder of the checkpoints: a resumed attempt does not ask the base model again."""

PROBED = 16
"""New tokens whose probability is computed again after training."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What a model says: special tokens shown, cut before the token that ends it; whether one does."""

    text: str
    ended: bool


def answers(model: Any, base: Path, samples: Samples, ends: Sequence[int], *, chat: bool) -> list[Answer]:
    """The model's greedy answers. Uses no random numbers.

    `base` is the folder of the tokenizer; `ends` are ids that end an answer beside those that the model knows; `chat`
    makes each prompt a user's turn where there is a chat template.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    started, trained = time.monotonic(), model.training
    model.eval()
    try:
        said = [_answer(model, tokenizer, prompt, samples.max_tokens, ends, chat) for prompt in samples.prompts]
    finally:
        model.train(trained)
    log.info("answering %d prompts took %.1f s", len(said), time.monotonic() - started)
    return said


def answers_before(
    model: Callable[[], Any], base: Path, training: Training, identity: Any, folder: Path, ends: Sequence[int]
) -> list[str]:
    """What the model says before training: asked once, then kept in `folder`. `model` gives it when it has to be asked;
    `identity` tells one from another."""
    assert training.samples is not None
    key = digest([identity, training.samples.wire(), training.objective, *ends])
    try:
        kept = json.loads((folder / BEFORE).read_text())
        if kept["key"] == key:
            return list(kept["answers"])
    except (OSError, ValueError, KeyError):
        pass
    said = [answer.text for answer in answers(model(), base, training.samples, ends, chat=as_chat(training))]
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{BEFORE}.partial"
    partial.write_text(json.dumps({"key": key, "answers": said}, ensure_ascii=False))
    flush(partial)
    partial.rename(folder / BEFORE)
    return said


def chances(model: Any, base: Path, proof: Path) -> list[dict[str, Any]]:
    """How likely each new token that reload probed is by now, at the same two places, in TokenProbability's form."""
    from transformers import AutoTokenizer

    try:
        message = read_proof(proof)["message"]
    except (OSError, ValueError, KeyError):
        return []
    if message is None:
        return []
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    prompts = Prompts.of(tokenizer, message)
    trained = model.training
    model.eval()
    with torch.inference_mode():
        plain, generation = (
            None if ids is None else Continuation(model, ids.to(model.device))
            for ids in (prompts.plain, prompts.generation)
        )
        found = [
            {
                "token": record.content,
                "withoutPrompt": plain.probability([record.id]) if plain else None,
                "withPrompt": generation.probability([record.id]) if generation else None,
            }
            for record in read_record(base)[:PROBED]
        ]
    model.train(trained)
    return found


def as_chat(training: Training) -> bool:
    """Whether prompts are turns of a conversation: a model that learns plain text is asked in plain text."""
    return training.objective != Objective.PRETRAINING


def _answer(model: Any, tokenizer: Any, prompt: str, longest: int, ends: Sequence[int], chat: bool) -> Answer:
    if chat and tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    ids = encoded["input_ids"].to(model.device)
    known = model.generation_config.eos_token_id
    stops = sorted({*(known if isinstance(known, list) else [known]), *ends} - {None})
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=longest,
            do_sample=False,
            eos_token_id=stops or None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    new = output[0, ids.shape[1] :].tolist()
    ended = bool(new) and new[-1] in stops
    while new and new[-1] in stops:
        new.pop()
    return Answer(str(tokenizer.decode(new, skip_special_tokens=False)), ended)


def endless(said: Sequence[Answer], longest: int) -> list[str]:
    """A warning where answers ran to their limit."""
    count = sum(not answer.ended for answer in said)
    if not count:
        return []
    return [
        f"{count} of {len(said)} answers to samples.prompts ran to their limit of {longest} tokens: the model may not "
        "have learned to stop (or raise samples.maxTokens)"
    ]
