"""Added tokens that a byte-level decoder would corrupt, and the decoder that does not.

Byte-level tokenizers (GPT-2 and its descendants) write each byte as one printable character and read it back when they
decode. An added token is plain text, yet the decoder reads it the same way whenever all its characters happen to be in
that table: `café` becomes `caf` and the broken byte E9. A decoder that first rewrites exactly those tokens in the
table's own alphabet gives them back whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from tokenizers import Regex, Tokenizer, decoders


def keep_decodable(tokenizer: Tokenizer, contents: Iterable[str]) -> list[str]:
    """Mend the decoder for those of the added tokens that need it, and return them."""
    if tokenizer.decoder is None or b"ByteLevel" not in tokenizer.decoder.__getstate__():
        return []
    broken = [content for content in contents if _misread(content)]
    if broken:
        replacements = [decoders.Replace(_exactly(content), as_bytes(content)) for content in broken]
        tokenizer.decoder = decoders.Sequence([*replacements, tokenizer.decoder])
    return broken


def as_bytes(text: str) -> str:
    """Text in the byte-level alphabet."""
    table = _alphabet()
    return "".join(table[byte] for byte in text.encode())


def _misread(content: str) -> bool:
    return not content.isascii() and set(content) <= set(_alphabet().values())


def _exactly(content: str) -> Regex:
    return Regex(rf"\A{re.escape(content)}\z")


@cache
def _alphabet() -> dict[int, str]:
    """GPT-2's bytes_to_unicode: printable bytes stand for themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    return table | {byte: chr(0x100 + index) for index, byte in enumerate(others)}
