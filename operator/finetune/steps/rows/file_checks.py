"""What is wrong with files that hold rows, said before `datasets` reads them, with the line.

The readers underneath count in blocks, fill up short rows of a CSV file with nothing, and let bytes pass that are not
UTF-8.
"""

from __future__ import annotations

import codecs
import csv
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

BLOCK = 1 << 20
"""Characters that are read together."""


class BadFile(Exception):
    """A file that cannot be read as what it is taken for; the message has its name and the line."""


class NotUtf8(BadFile):
    """A file in another encoding."""


class Damaged(BadFile):
    """A file that is not whole."""


class Empty(BadFile):
    """Files without a row."""


class DifferentColumns(BadFile):
    """A file whose columns are not those of the file before it."""


@contextmanager
def opened(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """The file's text; what is wrong with its bytes becomes a BadFile."""
    try:
        with path.open("rt", encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise NotUtf8(f"line {_line_in_another_encoding(path)} of {path.name} is not UTF-8: {error}") from error


def _line_in_another_encoding(path: Path) -> int:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                codecs.decode(line, "utf-8")
            except UnicodeDecodeError:
                return number
    return 0


def csv_columns(paths: Iterable[Path], separator: str) -> list[str]:
    """The columns of CSV files by the names that pandas gives them, the same in all files; every row has a cell for
    each. One without a name, as pandas writes its index, is `Unnamed: N`; the second of a name is `NAME.1`."""
    csv.field_size_limit(sys.maxsize)  # one cell may hold a book
    columns: list[str] = []
    for path in paths:
        with opened(path, newline="") as file:
            rows = csv.reader(file, delimiter=separator)
            try:
                header = next(rows, [])
                if not header:
                    raise BadFile(f"{path.name} has no header")
                names = _as_pandas_names(header)
                if columns and names != columns:
                    raise DifferentColumns(
                        f"{path.name} has the columns {', '.join(names)}; the files before it have {', '.join(columns)}"
                    )
                columns = columns or names
                for row in rows:
                    if row and len(row) != len(header):
                        raise BadFile(
                            f"line {rows.line_num} of {path.name} has {len(row)} cells, and the header has "
                            f"{len(header)}"
                        )
            except csv.Error as error:
                raise BadFile(f"line {rows.line_num} of {path.name}: {error}") from error
    return columns


def lines_of_rows(path: Path, separator: str | None) -> Iterator[int]:
    """The number of the line on which each row begins: of a CSV file where there is a separator, else of JSON Lines."""
    with opened(path, newline="" if separator else None) as file:
        if separator is None:
            yield from (number for number, line in enumerate(file, start=1) if line.strip())
            return
        rows = csv.reader(file, delimiter=separator)
        next(rows)
        before = rows.line_num
        for row in rows:
            if row:
                yield before + 1
            before = rows.line_num


def _as_pandas_names(header: Sequence[str]) -> list[str]:
    names: list[str] = []
    for place, name in enumerate(header):
        wanted = name = name or f"Unnamed: {place}"
        count = 0
        while wanted in names or (count and wanted in header):
            count += 1
            wanted = f"{name}.{count}"
        names.append(wanted)
    return names


def require_common(names: Iterable[str], before: Iterable[str], file: str) -> None:
    """Raise where a file has no column of those before it: its rows are something else. A column that only some files
    have is optional."""
    found, known = list(names), list(dict.fromkeys(before))
    if found and known and not set(found) & set(known):
        raise DifferentColumns(
            f"its files have different columns: {file} has {', '.join(found)}; those before it have {', '.join(known)}"
        )


def require_text(paths: Iterable[Path]) -> None:
    """Raise where a text is in another encoding, or its compressed file is not whole."""
    for path in paths:
        with opened(path) as file:
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
