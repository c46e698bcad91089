"""A tokenizer's document with further pieces. Old ids, old merges and old scores stay as they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from finetune.steps.tokens.learn.families import Continued, Family, NotLearnable


@dataclass(frozen=True)
class Growth:
    """What is appended: the pieces' names in the order of their ids, merges in the order of their rank, and for
    Unigram a score for each piece."""

    names: Sequence[str]
    merges: Sequence[tuple[str, str]] = ()
    scores: Sequence[float] = field(default=())


def grown(continued: Continued, growth: Growth) -> Tokenizer:
    """The tokenizer with the pieces of `growth`."""
    document = {**continued.document, "model": _model(continued, growth)}
    return Tokenizer.from_str(json.dumps(document, ensure_ascii=False))


def model_alone(continued: Continued, growth: Growth | None = None) -> Tokenizer:
    """The tokenizer's model without what precedes and follows it."""
    if growth is None:
        return Tokenizer(continued.tokenizer.model)
    parts: dict[str, Any] = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    document = {"version": continued.document["version"], "added_tokens": [], **parts}
    return Tokenizer.from_str(json.dumps({**document, "model": _model(continued, growth)}, ensure_ascii=False))


def lowest_score(continued: Continued) -> float:
    """The lowest score of a Unigram model. None may be lower: the penalty of unknown characters is counted from it, and
    old text would be cut elsewhere."""
    return min(float(score) for _, score in continued.document["model"]["vocab"])


def _model(continued: Continued, growth: Growth) -> dict[str, Any]:
    """New ids follow the whole old vocabulary. `tokenizers` numbers added tokens by the size of the model's vocabulary
    when it reads them, so those that lie behind it are made part of it, or they would move."""
    model = continued.document["model"]
    names = {id_: name for name, id_ in continued.tokenizer.get_vocab(with_added_tokens=True).items()}
    length = max(names, default=-1) + 1
    if continued.family != Family.UNIGRAM:
        vocab = {**model["vocab"], **continued.added}
        vocab |= {name: length + index for index, name in enumerate(growth.names)}
        return {**model, "vocab": vocab, "merges": [*model["merges"], *map(list, growth.merges)]}
    held = len(model["vocab"])
    if missing := [id_ for id_ in range(held, length) if id_ not in names]:
        raise NotLearnable(f"the id {missing[0]} below its largest id {length - 1} belongs to no token")
    lowest = lowest_score(continued)
    behind = [[names[id_], lowest] for id_ in range(held, length)]
    new = [[name, score] for name, score in zip(growth.names, growth.scores, strict=True)]
    return {**model, "vocab": [*model["vocab"], *behind, *new]}
