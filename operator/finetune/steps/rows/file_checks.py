"""What is wrong with files that hold rows, said before `datasets` reads them, with line and row; and JSON arrays as
lines, since an array would have to be read whole.

The readers underneath count in blocks, fill up short rows of a CSV file with nothing, and let bytes pass that are not
UTF-8.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

BLOCK = 1 << 20
"""Characters that are read together."""

_SPACE = re.compile(r"[ \t\r\n]*")


class BadFile(Exception):
    """A file that cannot be read as what it is taken for; the message has its name and the line."""


class NotUtf8(BadFile):
    """A file in another encoding."""


class Damaged(BadFile):
    """A file that is not whole."""


class DifferentColumns(BadFile):
    """A file whose columns are not those of the file before it."""


@contextmanager
def _opened(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise NotUtf8(f"line {_line_in_another_encoding(path)} of {path.name} is not UTF-8: {error}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Damaged(f"{path.name}: {error}") from error


def _line_in_another_encoding(path: Path) -> int:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                codecs.decode(line, "utf-8")
            except UnicodeDecodeError:
                return number
    return 0


def csv_columns(paths: Iterable[Path], separator: str) -> list[str]:
    """The columns of CSV files, which are the same in all of them; every row has a cell for each."""
    columns: list[str] = []
    for path in paths:
        with _opened(path, newline="") as file:
            rows = csv.reader(file, delimiter=separator)
            header = next(rows, [])
            if not header:
                raise BadFile(f"{path.name} has no header")
            if columns and header != columns:
                raise DifferentColumns(
                    f"{path.name} has the columns {', '.join(header)}; the files before it have {', '.join(columns)}"
                )
            columns = columns or header
            for row in rows:
                if row and len(row) != len(header):
                    raise BadFile(
                        f"line {rows.line_num} of {path.name} has {len(row)} cells, and the header has {len(header)}"
                    )
    return columns


def is_array(path: Path) -> bool:
    """Whether a JSON file holds one array, and not an object on every line."""
    with _opened(path) as file:
        return file.read(BLOCK).lstrip()[:1] == "["


def write_as_lines(path: Path, target: Path) -> None:
    """Write the objects of a JSON array one on a line."""
    with _opened(path) as file, target.open("w", encoding="utf-8") as lines:
        for value in _array(file, path.name):
            lines.write(json.dumps(value, ensure_ascii=False) + "\n")


def _array(file: IO[str], name: str) -> Iterator[dict[str, Any]]:
    """The objects of an array, of which one block and one object at a time are in memory."""
    decoder = json.JSONDecoder()
    text, place, line, row, ended = "", 0, 1, 0, False

    def skip() -> None:
        nonlocal place, line
        match = _SPACE.match(text, place)
        assert match is not None
        line += text.count("\n", place, match.end())
        place = match.end()

    def more() -> None:
        nonlocal text, place, ended
        block = file.read(max(BLOCK, len(text) - place))
        text, place, ended = text[place:] + block, 0, not block

    def expect(characters: str) -> str:
        nonlocal place
        skip()
        while place == len(text) and not ended:
            more()
            skip()
        found = text[place : place + 1]
        if not found or found not in characters:
            wanted = " or ".join(characters)
            raise BadFile(f"line {line} of {name}, after row {row}: {found or 'the end'} instead of {wanted}")
        place += 1
        return found

    expect("[")
    skip()
    separator = ","
    while separator == ",":
        skip()
        while len(text) - place < 2 and not ended:
            more()
            skip()
        if not row and text[place : place + 1] == "]":
            return
        while True:
            try:
                value, end = decoder.raw_decode(text, place)
                if end == len(text) and not ended:
                    more()
                    continue
                break
            except json.JSONDecodeError as error:
                if not ended and not _certain(error, len(text)):
                    more()
                    continue
                raise BadFile(f"row {row + 1}, from line {line} of {name} on: {error}") from error
        row += 1
        if isinstance(value, str):
            value = {"text": value}
        if not isinstance(value, dict):
            raise BadFile(f"row {row}, on line {line} of {name}, is no JSON object")
        yield value
        line += text.count("\n", place, end)
        place = end
        separator = expect(",]")


def _certain(error: json.JSONDecodeError, length: int) -> bool:
    """Whether more text could not make it right: what is wrong does not lie at the end."""
    return error.pos < length - 16 and not error.msg.startswith("Unterminated string")


def require_text(paths: Iterable[Path]) -> None:
    """Raise where a text is in another encoding, or its compressed file is not whole."""
    for path in paths:
        with _opened(path) as file:
            while file.read(BLOCK):
                pass


def require_parquet(paths: Iterable[Path]) -> None:
    """Raise where a Parquet file has no beginning or no end."""
    import pyarrow as pa
    import pyarrow.parquet

    for path in paths:
        try:
            pyarrow.parquet.ParquetFile(path).close()
        except pa.ArrowInvalid as error:
            raise Damaged(f"{path.name}: {str(error).splitlines()[0]}") from error


def require_objects(path: str) -> None:
    """Raise what is wrong with the first line of a JSON Lines file, local or on the hub, that is no JSON object."""
    import fsspec

    name = path.rpartition("/")[2]
    with fsspec.open(path, "rb", compression="infer") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    raise BadFile(f"line {number} of {name} is no JSON object")
            except UnicodeDecodeError as error:
                raise NotUtf8(f"line {number} of {name} is not UTF-8: {error}") from error
            except ValueError as error:
                raise BadFile(f"line {number} of {name}: {error}") from error
