"""Files of JSON that are no lines: an array, an object that holds the list of rows, objects over several lines. They
are written as lines, one row at a time, since they would have to be read whole otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from finetune.steps.rows import file_checks
from finetune.steps.rows.file_checks import BadFile

_SPACE = re.compile(r"[ \t\r\n]*")


def is_document(path: Path, is_row: Callable[[list[str]], bool]) -> bool:
    """Whether a JSON file does not hold one object on every line: it begins with an array, with an object that goes on
    in the next line, or holds one object, which is no row (`is_row` tells by its keys) and has a list of rows in it."""
    with file_checks.opened(path) as file:
        first = next((line for line in file if line.strip()), "")
        if not first.lstrip().startswith("{"):
            return first.lstrip().startswith("[")
        try:
            value = json.loads(first)
        except RecursionError:
            return False
        except ValueError as error:
            return _only_begun(error, first)
        alone = not any(line.strip() for line in file)
        return alone and not is_row(list(value)) and any(map(_is_rows, value.values()))


def _only_begun(error: ValueError, line: str) -> bool:
    return isinstance(error, json.JSONDecodeError) and error.pos >= len(line.rstrip())


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def write_as_lines(path: Path, target: Path, is_row: Callable[[list[str]], bool]) -> None:
    """Write the objects of a JSON document one on a line."""
    with target.open("w", encoding="ascii") as lines:
        for value in _rows(path, is_row):
            lines.write(json.dumps(value) + "\n")


def _rows(path: Path, is_row: Callable[[list[str]], bool]) -> Iterator[dict[str, Any]]:
    with file_checks.opened(path) as file:
        scanner = _Scanner(file, path.name)
        if scanner.next() == "[":
            for value in scanner.array():
                yield scanner.row(value)
            scanner.expect_end()
            return
        lists = _lists(scanner)
    if lists is not None and not is_row(list(lists)):
        holding = [key for key, rows in lists.items() if rows]
        if len(holding) > 1:
            raise BadFile(
                f"{path.name} holds several lists of rows ({', '.join(holding)}), and nothing says which one is meant"
            )
        if holding:
            yield from _rows_of(path, holding[0])
            return
    with file_checks.opened(path) as file:
        scanner = _Scanner(file, path.name)
        while scanner.next():
            yield scanner.row(scanner.value())


def _lists(scanner: _Scanner) -> dict[str, bool] | None:
    """Of the only object of a file: its keys, and whether each holds a list of objects. None where more objects
    follow."""
    found: dict[str, bool] = {}
    for key in scanner.fields():
        if scanner.next() == "[":
            count = others = 0
            for value in scanner.array():
                count, others = count + 1, others + (not isinstance(value, dict))
            found[key] = count > 0 and not others
        else:
            scanner.value()
            found[key] = False
    return None if scanner.next() else found


def _rows_of(path: Path, wanted: str) -> Iterator[dict[str, Any]]:
    with file_checks.opened(path) as file:
        scanner = _Scanner(file, path.name)
        for key in scanner.fields():
            if key == wanted:
                yield from map(scanner.row, scanner.array())
                return
            scanner.value()


class _Scanner:
    """Reads a text of JSON of which one block and one value at a time are in memory. Errors name line and row."""

    def __init__(self, file: IO[str], name: str) -> None:
        self._file, self._name = file, name
        self._decoder = json.JSONDecoder()
        self._text, self._place, self._ended = "", 0, False
        self._line, self._rows = 1, 0

    def next(self) -> str:
        """The next character that is not white space; nothing at the end."""
        self._skip()
        while self._place == len(self._text) and not self._ended:
            self._more()
            self._skip()
        return self._text[self._place : self._place + 1]

    def expect(self, characters: str) -> str:
        """One of these characters, and go on behind it."""
        found = self.next()
        if not found or found not in characters:
            wanted = " or ".join(characters)
            raise BadFile(
                f"line {self._line} of {self._name}, after row {self._rows}: {found or 'the end'} instead of {wanted}"
            )
        self._place += 1
        return found

    def expect_end(self) -> None:
        if found := self.next():
            raise BadFile(f"line {self._line} of {self._name}, after row {self._rows}: {found} instead of the end")

    def value(self) -> Any:
        """The next value, whole."""
        self.next()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._place)
                if end == len(self._text) and not self._ended:  # a number may go on
                    self._more()
                    continue
                break
            except (json.JSONDecodeError, RecursionError) as error:
                if isinstance(error, json.JSONDecodeError) and not (self._ended or _certain(error, len(self._text))):
                    self._more()
                    continue
                raise BadFile(f"row {self._rows + 1}, from line {self._line} of {self._name} on: {error}") from error
        self._line += self._text.count("\n", self._place, end)
        self._place = end
        return value

    def array(self) -> Iterator[Any]:
        """The values of an array, which is next."""
        self.expect("[")
        if self.next() == "]":
            self.expect("]")
            return
        while True:
            yield self.value()
            if self.expect(",]") == "]":
                return

    def fields(self) -> Iterator[str]:
        """The keys of an object, which is next; whoever asks for one reads its value before the next."""
        self.expect("{")
        if self.next() == "}":
            self.expect("}")
            return
        while True:
            if self.next() != '"':
                self.expect('"')
            key = self.value()
            self.expect(":")
            yield str(key)
            if self.expect(",}") == "}":
                return

    def row(self, value: Any) -> dict[str, Any]:
        """The value that was just read, which has to be a row; a text is one by itself."""
        self._rows += 1
        if isinstance(value, str):
            return {"text": value}
        if not isinstance(value, dict):
            raise BadFile(f"row {self._rows}, on line {self._line} of {self._name}, is no JSON object")
        return value

    def _skip(self) -> None:
        match = _SPACE.match(self._text, self._place)
        assert match is not None
        self._line += self._text.count("\n", self._place, match.end())
        self._place = match.end()

    def _more(self) -> None:
        block = self._file.read(max(file_checks.BLOCK, len(self._text) - self._place))
        self._text, self._place, self._ended = self._text[self._place :] + block, 0, not block


def _certain(error: json.JSONDecodeError, length: int) -> bool:
    """Whether more text could not make it right: what is wrong does not lie at the end."""
    return error.pos < length - 16 and not error.msg.startswith("Unterminated string")
