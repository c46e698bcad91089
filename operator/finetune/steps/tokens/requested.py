"""The tokens that a job asks for, from `spec.tokens.add` and from a list kept elsewhere, checked one by one.

A list may be plain lines, objects with a `piece`, or the piece and score of a sentencepiece `.vocab` file. Whatever is
wrong with any of them is found in one go: nobody mends a thousand lines one failed job at a time.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from finetune.api.contract import ExitCode, Layout
from finetune.api.spec import NewToken, TokenInit, Tokens, TokensFrom
from finetune.steps.runtime.disk import in_words
from finetune.steps.runtime.failure import StepFailure

MAX_LENGTH = 512
"""Characters of a token, as in the CRD."""

MAX_TOKENS = 200_000
"""Tokens of a job. An embedding with more new rows than that is a new vocabulary, not an extension."""

MAX_BYTES = 64 << 20
"""Size of a list: it is held in memory."""

SCORED = re.compile(r"(.*)\t-?\d+(?:\.\d+)?(?:e-?\d+)?")
"""A line of a sentencepiece `.vocab` file: a piece, a tab, the logarithm of its probability."""

CONTROLS = re.compile(r"<unk>|<s>|</s>|<pad>|<0x[0-9A-F]{2}>")
"""What such a file lists besides text: control symbols and bytes, of which every model has its own."""

SPACE = "▁"
"""How sentencepiece writes a space in a piece."""


@dataclass(frozen=True)
class Requested:
    """A token with the place where the user wrote it, for error messages."""

    token: NewToken
    place: str

    @property
    def content(self) -> str:
        return self.token.content

    def init(self, default: TokenInit | None) -> tuple[TokenInit | None, str]:
        """How its rows start, and the field that says so; None is the mean of its pieces."""
        if self.token.init is not None:
            return self.token.init, f"{self.place}.init"
        return default, "spec.tokens.init"


class _Unusable(ValueError):
    """This cannot be a token; the remedy comes with it."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


@dataclass
class _Collection:
    """What was read so far: tokens, the places of their texts, and what was wrong."""

    found: list[Requested] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    problems: list[tuple[str, _Unusable]] = field(default_factory=list)

    def take(self, place: str, token: NewToken, short: str) -> None:
        """Add a token unless something is wrong with its text; `short` is what problems of others call its place."""
        _check(token.content)
        if (former := self.places.get(token.content)) is not None:
            raise _Unusable(f"{_shown(token.content)} was asked for already in {former}", "Ask for each token once.")
        self.places[token.content] = short
        self.found.append(Requested(token, place))
        if len(self.found) > MAX_TOKENS:
            raise _invalid("spec.tokens", f"more than {MAX_TOKENS:,} tokens", "Add fewer tokens.")

    def faults(self) -> list[StepFailure]:
        """Each thing that is wrong."""
        return [
            StepFailure(ExitCode.BAD_CONFIGURATION, "InvalidToken", f"{place}: {problem}", problem.remedy)
            for place, problem in self.problems
        ]


def requested_tokens(tokens: Tokens, layout: Layout) -> tuple[list[Requested], list[StepFailure]]:
    """All tokens that can be, in the order of the spec and then of the list; and a failure, naming field or line, for
    each that is empty, blank, over-long, repeated, not UTF-8, or has control characters.

    Raises StepFailure for a list that cannot be read.
    """
    collection = _Collection()
    for index, token in enumerate(tokens.add or ()):
        place = f"spec.tokens.add[{index}]"
        try:
            collection.take(place, token, place)
        except _Unusable as problem:
            collection.problems.append((f"{place}.content", problem))
    if tokens.add_from is not None:
        name, path = _list(tokens.add_from, layout)
        for number, line in _lines(path, name):
            short, place = f"line {number}", f"line {number} of {name}"
            try:
                content = _content(line)
                if content is not None:
                    collection.take(place, NewToken.model_construct(content=content), short)
            except _Unusable as problem:
                # the list is named once, or a message about several lines would hold little else
                collection.problems.append((short if collection.problems else place, problem))
    return collection.found, collection.faults()


def _list(source: TokensFrom, layout: Layout) -> tuple[str, Path]:
    """How to call the list, and where it is mounted."""
    if source.config_map is not None:
        return f"ConfigMap {source.config_map.name}, key {source.config_map.key}", layout.tokens_file
    assert source.uri is not None  # one of the two, says the CRD
    return source.uri, layout.claim_path(source.uri)


def _lines(path: Path, name: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a list, without their ends, numbered from 1."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise _invalid(
                f"spec.tokens.addFrom ({name})",
                f"the list has {in_words(size)}, at most {in_words(MAX_BYTES)} are read",
                "Give a list of tokens, not a corpus; a corpus goes into spec.tokens.learn.",
            )
        data = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise StepFailure(
            ExitCode.NO_INPUT,
            "TokensNotFound",
            f"spec.tokens.addFrom ({name}): there is no file {path}",
            "Check the names in spec.tokens.addFrom.",
        ) from error
    lines = data.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n") if data else []
    for number, line in enumerate(lines, start=1):
        yield number, line.removesuffix(b"\r")


def _content(line: bytes) -> str | None:
    """The text of the token that a line asks for; None for a control symbol of a `.vocab` file."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"not UTF-8 at its byte {error.start + 1} (0x{line[error.start]:02X})"
        raise _Unusable(what, "Save the list as UTF-8.") from error
    if text.startswith('{"'):
        return _piece(text).replace(SPACE, " ")
    if scored := SCORED.fullmatch(text):
        piece = scored.group(1)
        return None if CONTROLS.fullmatch(piece) else piece.replace(SPACE, " ")
    return text


def _piece(line: str) -> str:
    try:
        piece = json.loads(line)["piece"]
    except (ValueError, KeyError, RecursionError) as error:
        raise _Unusable(f"{_shown(line)} is not an object with a piece", 'Write {"piece": "..."}.') from error
    if not isinstance(piece, str):
        raise _Unusable(f"the piece {str(piece)[:32]!r} is not a string", 'Write {"piece": "..."}.')
    return piece


def _check(content: str) -> None:
    if not content:
        raise _Unusable("the token is empty", "Remove it or write its text.")
    if len(content) > MAX_LENGTH:
        raise _Unusable(
            f"the token {_shown(content)} has {len(content):,} characters", f"At most {MAX_LENGTH} are possible."
        )
    if not content.strip():
        raise _Unusable(f"the token {_shown(content)} is only white space", "Remove it or write its text.")
    for character in content:
        if unicodedata.category(character) in ("Cc", "Cs") or _is_noncharacter(ord(character)):
            raise _Unusable(
                f"the token {_shown(content)} contains the control character U+{ord(character):04X}",
                "Remove the character: text that people write does not contain it.",
            )


def _is_noncharacter(code: int) -> bool:
    """Code points that Unicode keeps out of all text (and byte_level.MARK is one)."""
    return 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 32 else f"{text[:32]!r}..."


def _invalid(place: str, message: str, hint: str) -> StepFailure:
    return StepFailure(ExitCode.BAD_CONFIGURATION, "InvalidToken", f"{place}: {message}", hint)
