"""Added tokens that a byte-level decoder would corrupt, and the decoder that does not.

Byte-level tokenizers (GPT-2 and its descendants) write each byte as one printable character and read it back when they
decode. An added token is plain text, yet the decoder reads it the same way whenever all its characters happen to be in
that table: `café` becomes `caf` and the broken byte E9. A token with any other character is taken as the text that it
is. So exactly those tokens get a mark that is not in the table, and afterwards the mark is taken away.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from functools import cache
from itertools import groupby

from tokenizers import Regex, Tokenizer, decoders

MARK = "\ufdd1"
"""A noncharacter: Unicode keeps it out of all text, for uses like this one."""


def keep_decodable(tokenizer: Tokenizer, contents: Iterable[str]) -> list[str]:
    """Mend the decoder for those of the added tokens that need it, and return them."""
    if tokenizer.decoder is None or b"ByteLevel" not in tokenizer.decoder.__getstate__():
        return []
    broken = [content for content in contents if _misread(content)]
    if broken:
        marked = decoders.Replace(Regex(rf"\A(?={any_of(sorted(broken))}\z)"), MARK)
        tokenizer.decoder = decoders.Sequence([marked, tokenizer.decoder, decoders.Replace(MARK, "")])
    return broken


def text_of_bytes(name: str) -> str | None:
    """The text that a piece of a byte-level vocabulary stands for; None when its bytes are only a part of one."""
    bytes_of = {character: byte for byte, character in _alphabet().items()}
    try:
        return bytes(bytes_of[character] for character in name).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return None


def any_of(words: list[str]) -> str:
    """A regular expression for any of some sorted, distinct words, shaped like a prefix tree: it is tried on each token
    that is ever decoded, and thousands of alternatives one after the other would be felt."""
    prefix = os.path.commonprefix(words)  # noqa: RUF071 - of characters, not of paths
    rests = [word[len(prefix) :] for word in words]
    branches = [any_of(list(group)) for first, group in groupby(rests, key=lambda rest: rest[:1]) if first]
    tail = branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})" if branches else ""
    if tail and "" in rests:
        tail = f"(?:{tail})?"
    return re.escape(prefix) + tail


def bytes_shown(name: str) -> str:
    """The bytes that a byte-level token's name stands for, as <0xE6><0x96>; other names as they are."""
    byte_of = {character: byte for byte, character in _alphabet().items()}
    if not set(name) <= set(byte_of):
        return name
    return "".join(f"<0x{byte_of[character]:02X}>" for character in name)


def _misread(content: str) -> bool:
    return not content.isascii() and set(content) <= set(_alphabet().values())


@cache
def _alphabet() -> dict[int, str]:
    """GPT-2's bytes_to_unicode: printable bytes stand for themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    return table | {byte: chr(0x100 + index) for index, byte in enumerate(others)}
