"""Tokenizers in other forms than tokenizer.json: converted where that is proven, refused where it would be a guess.

A sentencepiece model says everything about itself, so a conversion can be held against sentencepiece's own ids, and
tekken.json (see `tekken`) against tiktoken's. A plain tiktoken vocabulary says only which bytes are merged: how text is
cut before that is a regular expression in somebody's code, and another one would give other ids for the same text.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from finetune.steps.tokenizer_files import tekken
from finetune.steps.tokenizer_files.agreement import FURTHER, PROBES, SPACE

SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
TIKTOKEN = ("tiktoken.model", "*.tiktoken")
OTHERS = (*TIKTOKEN, tekken.NAME)
"""Vocabularies that nobody can be made to read new tokens from."""

REMEDY = "take a repository or revision of the model that has tokenizer.json"


class NotConvertible(ValueError):
    """There is no tokenizer.json, and none can be made that is known to be right; the message says why."""


def converted(folder: Path) -> Tokenizer:
    """The tokenizer of a folder that has no tokenizer.json, as one; raises NotConvertible.

    transformers converts, sentencepiece judges: every text of PROBES must get the same ids. Where they differ (for
    Mistral's model_type, transformers forgets the space before a text), or those of FURTHER do (for Llama's it does so
    where the text begins with one), the model's own pieces are taken as they are, if these differ less.
    """
    if (path := folder / tekken.NAME).is_file():
        try:
            return tekken.converted(path)
        except tekken.NotExact as error:
            raise NotConvertible(f"the model has no tokenizer.json but {path.name}: {error}; {REMEDY}") from error
    for path in sorted(folder.iterdir()):
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in TIKTOKEN):
            raise _tiktoken(path)
    models = [folder / name for name in SENTENCEPIECE if (folder / name).is_file()]
    if not models:
        raise NotConvertible(f"the model has neither tokenizer.json nor a sentencepiece model; {REMEDY}")
    model = models[0]
    original = _sentencepiece(model)
    by_transformers = _by_transformers(folder, model)
    if _difference(model, original, by_transformers, (*PROBES, *FURTHER)) is None:
        return by_transformers
    by_pieces = _by_pieces(model, by_transformers)
    for texts in ((*PROBES, *FURTHER), PROBES):
        for tokenizer in (by_pieces, by_transformers):
            if tokenizer is not None and _difference(model, original, tokenizer, texts) is None:
                return tokenizer
    raise NotConvertible(str(_difference(model, original, by_transformers, PROBES)))


def _difference(model: Path, original: Any, tokenizer: Tokenizer, texts: Sequence[str]) -> str | None:
    for probe in texts:
        expected, ids = original.encode(probe), tokenizer.encode(probe, add_special_tokens=False).ids
        if ids != expected:
            return (
                f"the model has no tokenizer.json, and transformers' conversion of {model.name} is not exact: "
                f"{probe!r} becomes {ids[:8]}, sentencepiece says {expected[:8]}; {REMEDY}"
            )
    return None


def _by_pieces(path: Path, by_transformers: Tokenizer) -> Tokenizer | None:
    """A byte-pair model with sentencepiece's pieces, as Llama 2's tokenizer.json has them; what comes before and behind
    a text is transformers' own. None for models of other kinds."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2
    model = proto.ModelProto()
    model.ParseFromString(path.read_bytes())
    if model.trainer_spec.model_type != proto.TrainerSpec.BPE or not model.trainer_spec.byte_fallback:
        return None
    kinds = proto.ModelProto.SentencePiece.Type
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == kinds.NORMAL}
    ids = {piece.piece: id_ for id_, piece in enumerate(model.pieces)}
    merges = []
    for name, score in scores.items():
        halves = ((name[:cut], name[cut:]) for cut in range(1, len(name)))
        merges += [
            (-score, ids[left], ids[right], left, right) for left, right in halves if {left, right} <= ids.keys()
        ]
    unknown = next(piece.piece for piece in model.pieces if piece.type == kinds.UNKNOWN)
    tokenizer = Tokenizer(
        BPE(
            ids,
            [(left, right) for *_, left, right in sorted(merges)],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = [normalizers.Prepend(SPACE)] if model.normalizer_spec.add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, special=piece.type != kinds.USER_DEFINED, normalized=False)
            for piece in model.pieces
            if piece.type in (kinds.UNKNOWN, kinds.CONTROL, kinds.USER_DEFINED)
        ]
    )
    tokenizer.post_processor = by_transformers.post_processor
    return tokenizer


def _sentencepiece(path: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError as error:
        # Llama 3 calls its tiktoken vocabulary tokenizer.model too: lines of a base64 word and a rank
        if len(path.open("rb").readline(1024).split()) == 2:
            raise _tiktoken(path) from error
        raise NotConvertible(f"{path.name} cannot be read: {error}") from error


def _by_transformers(folder: Path, path: Path) -> Tokenizer:
    from transformers import AutoTokenizer  # slow to import, and seldom needed

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    except Exception as error:
        raise NotConvertible(
            f"the model has no tokenizer.json, and transformers cannot convert {path.name}: {error}"
        ) from error
    return Tokenizer.from_str(tokenizer.to_str())


def _tiktoken(path: Path) -> NotConvertible:
    return NotConvertible(
        f"the model has no tokenizer.json but {path.name}, a tiktoken vocabulary: it lacks the rule by which text is "
        f"cut, and a guess would change old text; {REMEDY}"
    )
