"""The tokens that a job asks for, from `spec.tokens.add` and from the mounted ConfigMap, checked one by one."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune.api.contract import ExitCode
from finetune.api.spec import NewToken, TokenInit, Tokens
from finetune.steps.failure import StepFailure

MAX_LENGTH = 512
"""Characters of a token, as in the CRD."""

MAX_TOKENS = 100_000
"""Tokens of a job. An embedding with more new rows than that is a new vocabulary, not an extension."""


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


def requested_tokens(tokens: Tokens, file: Path) -> list[Requested]:
    """All tokens, in the order of the spec and then of the file.

    Raises StepFailure naming field or line for what is empty, blank, over-long, repeated or has control characters.
    """
    found: list[Requested] = []
    places: dict[str, str] = {}
    for requested in _all(tokens, file):
        if (former := places.get(requested.content)) is not None:
            raise _invalid(requested.place, f"{requested.content!r} was asked for already in {former}", "Remove one.")
        places[requested.content] = requested.place
        found.append(requested)
        if len(found) > MAX_TOKENS:
            raise _invalid("spec.tokens", f"more than {MAX_TOKENS} tokens", "Add fewer tokens.")
    return found


def _all(tokens: Tokens, file: Path) -> Iterator[Requested]:
    for index, token in enumerate(tokens.add or ()):
        place = f"spec.tokens.add[{index}]"
        _check(token.content, f"{place}.content")
        yield Requested(token, place)
    if tokens.add_from is not None:
        source = tokens.add_from.config_map
        for number, content in _lines(file, f"spec.tokens.addFrom (ConfigMap {source.name}, key {source.key})"):
            place = f"line {number} of ConfigMap {source.name}, key {source.key}"
            _check(content, place)
            yield Requested(NewToken.model_validate({"content": content}), place)


def _lines(file: Path, field: str) -> Iterator[tuple[int, str]]:
    """Line numbers and contents: plain lines, or JSON objects with a `piece`."""
    try:
        text = file.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise StepFailure(
            ExitCode.NO_INPUT,
            "TokensNotFound",
            f"{field}: there is no file {file}",
            "Check the ConfigMap's name and key in spec.tokens.addFrom.",
        ) from error
    except UnicodeDecodeError as error:
        raise _invalid(field, f"not UTF-8 at byte {error.start}", "Save the list as UTF-8.") from error
    lines = text.removesuffix("\n").split("\n") if text else []
    for number, line in enumerate(lines, start=1):
        content = line.removesuffix("\r")
        yield number, _piece(content, f"{field}, line {number}") if content.startswith('{"') else content


def _piece(line: str, place: str) -> str:
    try:
        piece = json.loads(line)["piece"]
    except (ValueError, KeyError, RecursionError) as error:
        raise _invalid(place, f"{line[:80]!r} is not an object with a piece", 'Write {"piece": "..."}.') from error
    if not isinstance(piece, str):
        raise _invalid(place, f"the piece {str(piece)[:80]!r} is not a string", 'Write {"piece": "..."}.')
    return piece


def _check(content: str, place: str) -> None:
    if not content:
        raise _invalid(place, "the token is empty", "Remove it or write its text.")
    if not content.strip():
        raise _invalid(place, f"the token {content[:MAX_LENGTH]!r} is only white space", "Remove it or write its text.")
    if len(content) > MAX_LENGTH:
        raise _invalid(
            place, f"the token {content[:32]!r}... has {len(content)} characters", f"At most {MAX_LENGTH} are possible."
        )
    for character in content:
        if unicodedata.category(character) in ("Cc", "Cs"):
            raise _invalid(
                place,
                f"the token {content!r} contains the control character U+{ord(character):04X}",
                "Remove the character: text that people write does not contain it.",
            )


def _invalid(place: str, message: str, hint: str) -> StepFailure:
    return StepFailure(ExitCode.BAD_CONFIGURATION, "InvalidToken", f"{place}: {message}", hint)
