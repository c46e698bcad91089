"""Files of JSON Lines as Arrow tables in which nothing is guessed and nothing is lost.

`datasets` takes the types of the first ten megabytes for those of all rows: a field that begins later fails. Arrow
takes texts that look like dates for dates, gives every object the keys of all others, and every number of a column
one type; where that does not fit, `datasets` writes the values anew with ten decimals. So all files are looked through
first. A column whose values are all alike is an Arrow column. Any other stays JSON, as it was written, and becomes
Python's values when it is read (`values_of`).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.json as paj
from datasets.builder import Key

from finetune.steps.rows import compressed
from finetune.steps.rows.file_checks import BadFile, Empty, NotUtf8, require_common
from finetune.steps.rows.messages import MalformedRow

BLOCK = 4 << 20
"""Bytes that are read together, and the rest of their last line."""

AS_WRITTEN = datasets.Json(decode=False)
"""The feature of a column that stays JSON: `datasets` itself would lose decimals and halves of surrogate pairs."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Kinds = dict[str, pa.DataType | None]
"""The Arrow type of each column; None for one that stays JSON."""


class JsonRows(datasets.ArrowBasedBuilder):  # type: ignore[misc]
    """A builder of `datasets` for files of JSON Lines, compressed or not, here or on a hub."""

    VERSION = datasets.Version("1.0.0")

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo()

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        named = {split: list(map(str, files)) for split, files in self.config.data_files.items()}
        files = {
            split: [
                (Path(path), name.rpartition("/")[2])
                for path, name in zip(dl_manager.download(names), names, strict=True)
            ]
            for split, names in named.items()
        }
        kinds: Kinds = {}
        for each in files.values():
            for path, name in each:
                found: Kinds = {}
                for block in _blocks(path, name):
                    found = _merged(found, block.kinds())
                require_common(found, kinds, name)
                kinds = _merged(kinds, found)
        if not kinds:
            raise Empty("there is no row")
        self.info.features = datasets.Features(
            {
                name: AS_WRITTEN if kind is None else datasets.features.features.generate_from_arrow_type(kind)
                for name, kind in kinds.items()
            }
        )
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"files": each, "kinds": kinds})
            for split, each in files.items()
        ]

    def _generate_tables(self, files: Sequence[tuple[Path, str]], kinds: Kinds) -> Iterator[tuple[Key, pa.Table]]:
        schema = self.info.features.arrow_schema
        for number, (path, name) in enumerate(files):
            for place, block in enumerate(_blocks(path, name)):
                yield Key(number, place), block.table(kinds).cast(schema)


def values_of(name: str, column: pa.ChunkedArray) -> list[Any]:
    """A column as Python's values, whether it stays JSON or not. Raises MalformedRow for a text that is none."""
    values: list[Any] = column.to_pylist()
    if not is_json(column.type):
        return values
    decoded = [None if value is None else json.loads(value) for value in values]
    for index, (written, value) in enumerate(zip(values, decoded, strict=True)):
        if written is not None and _SURROGATE.search(written):
            _require_text(name, index, value)
    return decoded


def _require_text(name: str, index: int, value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        failure = MalformedRow(f"column {name} holds {half}, half of a surrogate pair, which is no character")
        failure.index = index
        raise failure from error


def is_json(kind: pa.DataType) -> bool:
    """Whether a column of this type stays JSON."""
    return isinstance(kind, pa.JsonType)


def _blocks(path: Path, name: str) -> Iterator[_Block]:
    line = 1
    with compressed.opened(path) as file:
        while data := file.read(BLOCK):
            data += file.readline()
            if line == 1:
                data = data.removeprefix(codecs.BOM_UTF8)
            yield _Block(data, name, line)
            line += data.count(b"\n")


class _Block:
    """Some whole lines of a file."""

    def __init__(self, data: bytes, name: str, line: int) -> None:
        self._data, self._name, self._line = data, name, line

    def kinds(self) -> Kinds:
        """The columns in order of appearance; raises BadFile for the first line that is no JSON object in UTF-8."""
        self._require_utf8()
        if not self._data.strip():
            return {}
        try:
            table = paj.read_json(pa.BufferReader(self._data), self._options)
        except pa.ArrowException:
            return self._kinds_of_values()
        if table.num_rows != self._data.count(b"\n") + (
            not self._data.endswith(b"\n")
        ):  # blank lines, or two objects on one
            return self._kinds_of_values()
        return {name: _kind(table[name]) for name in table.column_names}

    def table(self, kinds: Kinds) -> pa.Table:
        """The rows, with all of these columns."""
        alike = {name: kind for name, kind in kinds.items() if kind is not None}
        if len(alike) == len(kinds):
            try:
                options = paj.ParseOptions(pa.schema(alike.items()), unexpected_field_behavior="ignore")
                return paj.read_json(pa.BufferReader(self._data), self._options, options)
            except pa.ArrowException:
                pass
        rows = list(self._values())
        columns = {}
        for name, kind in kinds.items():
            values = [row.get(name) for row in rows]
            if kind is None:
                values, kind = [None if value is None else json.dumps(value) for value in values], pa.string()
            columns[name] = pa.array(values, kind)
        return pa.table(columns)

    @property
    def _options(self) -> paj.ReadOptions:
        return paj.ReadOptions(use_threads=False, block_size=len(self._data) + 1)

    def _kinds_of_values(self) -> Kinds:
        """The same where Arrow refuses the lines: numbers and texts in one column, half a surrogate pair, ..."""
        rows = list(self._values())
        kinds: Kinds = {}
        for name in dict.fromkeys(key for row in rows for key in row):
            try:
                kinds[name] = _kind(pa.chunked_array([pa.array([row.get(name) for row in rows])]))
            except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError, ValueError):
                kinds[name] = None
        return kinds

    def _values(self) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(self._data.split(b"\n"), start=self._line):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise BadFile(f"line {number} of {self._name}, column {error.colno}: {error.msg}") from error
            except (ValueError, RecursionError) as error:
                raise BadFile(f"line {number} of {self._name}: {error}") from error
            if not isinstance(value, dict):
                raise BadFile(f"line {number} of {self._name} is no JSON object")
            yield value

    def _require_utf8(self) -> None:
        try:
            self._data.decode()
        except UnicodeDecodeError as error:
            line = self._line + self._data.count(b"\n", 0, error.start)
            raise NotUtf8(f"line {line} of {self._name} is not UTF-8: {error}") from error


def _kind(column: pa.ChunkedArray | pa.Array) -> pa.DataType | None:
    """The Arrow type that keeps the column's values as they are written, if there is one."""
    kind = column.type
    if pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_null(kind) or pa.types.is_string(kind) or pa.types.is_boolean(kind) or pa.types.is_int64(kind):
        return kind
    arrays = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    if pa.types.is_list(kind):
        inner = _kind(pa.chunked_array([array.flatten() for array in arrays], kind.value_type))
        return None if inner is None else pa.list_(inner)
    if not pa.types.is_struct(kind) or not kind.num_fields:
        return None  # a float: 1 and 1.0 would be the same
    present = pa.chunked_array([array.filter(array.is_valid()) for array in arrays], kind)
    fields: list[tuple[str, pa.DataType]] = []
    for index, field in enumerate(kind):
        values = pa.chunked_array([array.field(index) for array in present.chunks], field.type)
        inner = _kind(values)
        if inner is None or values.null_count:  # null, or not there: Arrow does not tell
            return None
        fields.append((field.name, inner))
    return pa.struct(fields)


def _merged(one: Kinds, other: Kinds) -> Kinds:
    null = pa.null()
    return {name: _common(one.get(name, null), other.get(name, null)) for name in {**one, **other}}


def _common(one: pa.DataType | None, other: pa.DataType | None) -> pa.DataType | None:
    """The type of values of both types; None where there is none."""
    if one is None or other is None:
        return None
    if pa.types.is_null(one) or one == other:
        return other
    if pa.types.is_null(other):
        return one
    if pa.types.is_list(one) and pa.types.is_list(other):
        inner = _common(one.value_type, other.value_type)
        return None if inner is None else pa.list_(inner)
    if pa.types.is_struct(one) and pa.types.is_struct(other) and {f.name for f in one} == {f.name for f in other}:
        fields = [(field.name, _common(field.type, other.field(field.name).type)) for field in one]
        return None if any(kind is None for _, kind in fields) else pa.struct(fields)
    return None
