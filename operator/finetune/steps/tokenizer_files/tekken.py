"""tekken.json, Mistral's own form of a tokenizer, as tokenizer.json.

Other than a plain tiktoken vocabulary it holds the rule by which text is cut, so a conversion can be held against
tiktoken, which Mistral's own library encodes with. That library puts the first token before every text and reads no
special tokens in it; tokenizer.json reads them, as everybody does who has a chat template.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from finetune.steps.tokenizer_files.agreement import FURTHER, PROBES

NAME = "tekken.json"

NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
"""What the settings of transformers call the special tokens that have a part to play."""

WRITTEN_ONCE = (
    "write its tokenizer.json once, where transformers and mistral-common are installed: python -c 'from "
    "transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer as convert; "
    'convert("tekken.json").save_pretrained(".")\''
)


class NotExact(ValueError):
    """It cannot be converted, or not with the same ids; the message says why and what to do."""


def converted(path: Path) -> Tokenizer:
    """The tokenizer of a tekken.json, with its ids. Raises NotExact.

    transformers converts, tiktoken judges; every special token has to have its own id.
    """
    try:
        document = json.loads(path.read_bytes())
        config, declared = document["config"], document.get("special_tokens")
        if declared is None:
            raise NotExact(f"it is of the old form, in which special tokens have no names ({WRITTEN_ONCE})")
        from transformers.integrations.mistral.tokenizer import MistralConverter  # slow to import, and seldom needed

        tokenizer = MistralConverter(str(path)).converted()
        reserved = int(config.get("default_num_special_tokens") or len(declared))
        reference = _reference(document, tokenizer.get_vocab_size() - reserved)
        names = {entry["token_str"]: int(entry["rank"]) for entry in declared}
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, NotExact):
            raise
        raise NotExact(f"it cannot be read ({type(error).__name__}: {str(error)[:120]})") from error
    for text in (*PROBES, *FURTHER):
        expected = [reserved + id_ for id_ in reference.encode_ordinary(text)]
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if ids != expected:
            raise NotExact(f"transformers' conversion is not exact: {text!r} becomes {ids[:8]}, not {expected[:8]}")
    for name, id_ in names.items():
        if tokenizer.token_to_id(name) != id_:
            raise NotExact(f"{name!r} has id {id_} in it and would get {tokenizer.token_to_id(name)}")
    first = NAMED["bos_token"]
    if first in names:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, names[first])]
        )
    return tokenizer


def settings(tokenizer: Tokenizer) -> dict[str, str]:
    """Which of its tokens settings have a name for."""
    return {name: token for name, token in NAMED.items() if tokenizer.token_to_id(token) is not None}


def _reference(document: dict[str, Any], size: int) -> Any:
    from tiktoken import Encoding

    ranks = {base64.b64decode(entry["token_bytes"]): rank for rank, entry in enumerate(document["vocab"][:size])}
    return Encoding(NAME, pat_str=document["config"]["pattern"], mergeable_ranks=ranks, special_tokens={})
