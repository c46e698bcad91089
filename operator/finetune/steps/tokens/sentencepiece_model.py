"""tokenizer.model with the new tokens: the protobuf that sentencepiece, and servers which convert from it, read.

llama.cpp's converter takes the pieces and scores of Llama 2, Mistral, Gemma and Phi-3 from this file alone; without it,
these models do not convert, or to a tokenizer that gives other ids. It is kept only where it says what tokenizer.json
says: the same name for every id, and the same ids for texts.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from tokenizers import Tokenizer

from finetune.steps.tokenizer_files.agreement import PROBES, SPACE

BELOW = 1.0
"""By how much the score of a learned piece lies below the one before it: merges of low score come last."""


class NotExtendable(ValueError):
    """The model cannot have the new tokens, or says otherwise than tokenizer.json; the message says why."""


def extended(model: bytes, tokenizer: Tokenizer, learned: Collection[int]) -> bytes:
    """A sentencepiece model that has a piece for every id of `tokenizer`, with the same name.

    Added tokens become pieces of the types CONTROL (special ones: never found in text) and USER_DEFINED, the ids of
    `learned` such of type NORMAL; ids without a token become UNUSED ones. Raises NotExtendable.
    """
    from sentencepiece import sentencepiece_model_pb2

    protobuf: Any = sentencepiece_model_pb2  # protobuf makes its classes when it is imported
    proto = protobuf.ModelProto()
    try:
        proto.ParseFromString(model)
    except Exception as error:
        raise NotExtendable("it is no sentencepiece model") from error
    if not proto.pieces:
        raise NotExtendable("it is no sentencepiece model")
    piece_type = protobuf.ModelProto.SentencePiece.Type
    added = tokenizer.get_added_tokens_decoder()
    names = {id_: name for name, id_ in tokenizer.get_vocab(with_added_tokens=True).items()}
    for id_, piece in enumerate(proto.pieces):
        name = names.get(id_, "")
        if name == piece.piece or (id_ in added and added[id_].content.replace(" ", SPACE) == piece.piece):
            continue
        if piece.type == piece_type.BYTE and len(name) == 1 and piece.piece == f"<0x{ord(name):02X}>":
            continue  # Gemma's tokenizer.json calls the byte of a tab by its character
        if id_ not in added or piece.type == piece_type.UNKNOWN:
            raise NotExtendable(f"its id {id_} is {piece.piece!r}, which tokenizer.json calls {name!r}")
        piece.piece, piece.type = _added_piece(added[id_], piece_type)  # a reserved piece that got a name
    lowest = min(piece.score for piece in proto.pieces)
    for id_ in range(len(proto.pieces), max(names) + 1):
        if id_ in learned:
            lowest -= BELOW
            proto.pieces.add(piece=names[id_], score=lowest, type=piece_type.NORMAL)
        elif id_ in added:
            name, kind = _added_piece(added[id_], piece_type)
            proto.pieces.add(piece=name, score=0.0, type=kind)
        elif id_ in names:
            raise NotExtendable(f"it lacks {names[id_]!r}, id {id_} of tokenizer.json")
        else:
            proto.pieces.add(piece=f"[PAD{id_}]", score=0.0, type=piece_type.UNUSED)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    data = bytes(proto.SerializeToString())
    _prove(data, tokenizer)
    return data


def _added_piece(token: Any, piece_type: Any) -> tuple[str, Any]:
    return token.content.replace(" ", SPACE), piece_type.CONTROL if token.special else piece_type.USER_DEFINED


def _prove(model: bytes, tokenizer: Tokenizer) -> None:
    """sentencepiece loads it and gives tokenizer.json's ids for texts without the new tokens.

    Around an added token the two differ by design (tokenizer.json may put a space behind it, as servers that convert
    from the model do too), so of these the piece's id alone is compared, above."""
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise NotExtendable(f"sentencepiece does not take it: {error}") from error
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    for text in PROBES:
        if any(content in text for content in added):
            continue
        ids, found = tokenizer.encode(text, add_special_tokens=False).ids, processor.encode(text)
        if ids != found:
            raise NotExtendable(f"{text!r} is {found[:8]} by it and {ids[:8]} by tokenizer.json")
