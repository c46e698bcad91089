"""From places in a text to places among its tokens."""

from __future__ import annotations

from typing import Any

Span = tuple[int, int]
"""Start and end: of characters in a text, or of tokens in an example."""


def token_span(encoding: Any, span: Span, length: int) -> Span:
    """The tokens of a `tokenizers.Encoding` of which a part lies in `span`; `length` is the text's, in characters.

    That is transformers' own assistant mask: where the header ends in a space, the answer's first letter is in the
    token of that space. The offsets of all tokens are asked for only where a character belongs to none: as Python
    objects they cost as much as tokenising.
    """
    start, end = span
    if start >= end:
        return 0, 0
    if span == (0, length):
        return 0, len(encoding)
    first = encoding.char_to_token(start)
    last = len(encoding) if end >= length else encoding.char_to_token(end)
    if first is None or last is None:
        touched = [index for index, (begin, stop) in enumerate(encoding.offsets) if begin < end and stop > start]
        return (touched[0], touched[-1] + 1) if touched else (0, 0)
    if end < length and encoding.token_to_chars(last)[0] < end:
        last += 1
    return first, last
