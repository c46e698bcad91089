"""Files as people have them: what is in them is read as it is written, or refused with its place."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.api.spec import DatasetSource
from finetune.steps.rows import file_checks, json_rows
from finetune.steps.rows.sources import Rows, opened
from finetune.steps.runtime.failure import StepFailure
from tests.unit.steps.jobs import layout

FIELD = "spec.dataset.sources[0]"
LINE = b'{"text": "Air."}\n'


def read(folder: Path, files: dict[str, bytes], **source: Any) -> Rows:
    for name, content in files.items():
        path = folder / "claims" / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    place = next(iter(files)).partition("/")[0]
    spec = DatasetSource.model_validate({"uri": f"pvc://data/{place}"} | source)
    return opened(spec, layout(folder), folder / "cache", FIELD)


def values(rows: Rows, column: str) -> list[Any]:
    found = rows.columns([column])[0 : len(rows)]
    return list(found[column].to_pylist() if isinstance(found, pa.Table) else found[column])


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def refusal(folder: Path, files: dict[str, bytes], **source: Any) -> StepFailure:
    with pytest.raises(StepFailure) as failure:
        read(folder, files, **source)
    return failure.value


CALL = {"name": "weather", "arguments": {"latitude": 52.520006599999123, "days": 2**70}}
MESSAGES = [
    [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Air."}],
    [{"role": "user", "content": "Warm?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
]


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([{"v": "1815-12-10"}, {"v": "1906-12-09"}], id="texts that look like dates"),
        pytest.param([{"v": 1}, {"v": 2.5}, {"v": 1.0}], id="whole numbers and others"),
        pytest.param([{"v": 0.30000000000000004}, {"v": 0.12345678901234568}], id="all decimals"),
        pytest.param([{"v": 2**70}, {"v": 1}], id="long integers"),
        pytest.param([{"v": "a"}, {"v": 7}, {"v": ["b"]}, {"v": {"c": None}}], id="anything"),
        pytest.param([{"v": {"a": 1}}, {"v": {"b": None}}], id="objects with keys of their own"),
        pytest.param([{"v": [1]}, {"v": []}, {"v": ["a"]}], id="lists of anything"),
        pytest.param([{"v": None}] * 50 + [{"v": {"late": [1]}}], id="a field that begins late"),
        pytest.param([{"v": messages} for messages in MESSAGES], id="an optional field of a message"),
        pytest.param([{"v": MESSAGES[0]}] * 50 + [{"v": MESSAGES[1]}], id="the same, late"),
    ],
)
def test_json_values_are_read_as_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr(json_rows, "BLOCK", 200)
    found = values(read(tmp_path, {"rows.jsonl": lines(*rows)}), "v")
    assert json.dumps(found) == json.dumps([row["v"] for row in rows])


def test_texts_and_plain_conversations_stay_arrow_columns(tmp_path: Path) -> None:
    rows = read(tmp_path, {"rows.jsonl": lines({"text": "a", "messages": MESSAGES[0]})})
    assert isinstance(rows.columns(["text", "messages"])[0:1], pa.Table)


def test_a_late_date_does_not_change_the_texts_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "BLOCK", 20)
    rows = [{"text": "Born on"}, {"text": "1815-12-10"}, {"text": "2020-01-01T10:00:00"}]
    assert values(read(tmp_path, {"rows.jsonl": lines(*rows)}), "text") == [row["text"] for row in rows]


def test_objects_that_look_like_traces_of_an_agent_are_rows_like_others(tmp_path: Path) -> None:
    """`datasets` would want a further package to rewrite them."""
    rows = {"id": "1", "source": "s", "model": "m", "system_prompt": "p", "messages": MESSAGES[0]}
    assert values(read(tmp_path, {"rows.jsonl": lines(rows)}), "messages") == [MESSAGES[0]]


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", lambda data: pa.compress(data, codec="zstd", asbytes=True)),
    ],
)
def test_compressed_files_are_read_as_what_they_hold(
    tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    whole = pack(LINE) + pack(LINE)  # several frames are one file
    assert values(read(tmp_path / "a", {f"rows.jsonl{suffix}": whole}), "text") == ["Air."] * 2
    assert values(read(tmp_path / "b", {"rows.data": whole}, fileFormat="JSONL"), "text") == ["Air."] * 2
    assert values(read(tmp_path / "c", {f"rows.csv{suffix}": pack(b"text\nAir.\n")}), "text") == ["Air."]
    folder = {f"rows/train.json{suffix}": pack(b'[{"text": "a"}]'), f"rows/test.json{suffix}": pack(LINE)}
    assert values(read(tmp_path / "d", folder), "text") == ["a"]
    failure = refusal(tmp_path / "e", {f"rows.jsonl{suffix}": pack(LINE)[:-3]})
    assert (failure.error.reason, f"rows.jsonl{suffix}: " in failure.error.message) == ("DamagedFile", True)


def test_an_archive_is_refused_as_what_it_is(tmp_path: Path) -> None:
    failure = refusal(tmp_path, {"rows.jsonl": b"PK\x03\x04 and so on"})
    assert "rows.jsonl is a zip archive" in failure.error.message
    assert "Unpack it" in (failure.error.hint or "")


ROWS = [{"text": f"Row {number}", "more": {"n": [number]}} for number in range(5)]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(json.dumps({"data": ROWS}), id="on one line"),
        pytest.param(
            json.dumps({"version": "1.0", "info": {"tags": []}, "rows": ROWS, "n": 5}, indent=2), id="indented"
        ),
        pytest.param(json.dumps(ROWS, indent=1), id="an array"),
        pytest.param("\n".join(json.dumps(row, indent=2) for row in ROWS), id="objects over several lines"),
        pytest.param("".join(json.dumps(row) + "\n" for row in ROWS), id="lines"),
    ],
)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_an_object_that_holds_the_rows_is_read_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str
) -> None:
    monkeypatch.setattr(file_checks, "BLOCK", 7)
    rows = read(tmp_path, {name: content.encode()})
    assert values(rows, "text") == [row["text"] for row in ROWS]
    assert values(rows, "more") == [row["more"] for row in ROWS]


def test_one_conversation_is_a_row_and_not_a_list_of_rows(tmp_path: Path) -> None:
    rows = read(tmp_path, {"rows.json": json.dumps({"messages": MESSAGES[0]}, indent=1).encode()})
    assert values(rows, "messages") == [MESSAGES[0]]


def test_an_object_with_several_lists_of_rows_is_refused(tmp_path: Path) -> None:
    failure = refusal(tmp_path, {"rows.json": json.dumps({"train": ROWS, "test": ROWS}).encode()})
    assert "holds several lists of rows (train, test)" in failure.error.message


def test_the_index_that_pandas_writes_is_a_column_that_nothing_needs(tmp_path: Path) -> None:
    rows = read(tmp_path, {"rows.csv": b",text,text,\n0,a,b,c\n"})
    assert rows.column_names == ["Unnamed: 0", "text", "text.1", "Unnamed: 3"]
    assert values(rows, "text") == ["a"]


def test_a_cell_may_hold_a_book(tmp_path: Path) -> None:
    book = "word " * 30_000
    assert values(read(tmp_path, {"rows.csv": f'text\n"{book}"\nshort\n'.encode()}), "text") == [book, "short"]


def test_parquet_files_of_one_source_may_differ_in_types_and_in_optional_columns(tmp_path: Path) -> None:
    folder = tmp_path / "claims" / "data" / "parts"
    folder.mkdir(parents=True)
    parts = [
        {"text": "a", "meta": None, "n": 1, "mixed": 1, "keys": {"a": 1}},
        {"text": "b", "meta": "x", "n": 2.5, "mixed": "one", "keys": {"b": 2}},
        {"text": "c", "further": [1]},
    ]
    for number, part in enumerate(parts):
        pq.write_table(pa.Table.from_pylist([part]), folder / f"{number}.parquet")
    rows = opened(
        DatasetSource.model_validate({"uri": "pvc://data/parts"}), layout(tmp_path), tmp_path / "cache", FIELD
    )
    expected = {
        "text": ["a", "b", "c"],
        "meta": [None, "x", None],
        "n": [1, 2.5, None],
        "mixed": [1, "one", None],
        "keys": [{"a": 1}, {"b": 2}, None],
        "further": [None, None, [1]],
    }
    assert {name: values(rows, name) for name in expected} == expected
    assert isinstance(values(rows, "n")[0], int)


@pytest.mark.parametrize(
    ("files", "split", "index", "place"),
    [
        ({"rows.jsonl": b"\n" + LINE + b"\n" + LINE}, "train", 1, "line 4 of rows.jsonl"),
        ({"rows.jsonl": LINE * 10}, "train[50%:]", 2, "line 8 of rows.jsonl"),
        ({"rows/a.jsonl": LINE * 2, "rows/b.jsonl": LINE * 2}, "train", 3, "line 2 of b.jsonl"),
        ({"rows.csv": b'text\n"a\nb"\nc\n'}, "train", 1, "line 4 of rows.csv"),
        ({"rows.json": b'[{"text": "a"}]'}, "train", 0, None),
    ],
)
def test_a_row_has_its_line(tmp_path: Path, files: dict[str, bytes], split: str, index: int, place: str | None) -> None:
    assert read(tmp_path, files, split=split).line(index) == place


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "a",}', "line 2 of rows.jsonl, column 14"),
        (b'{"text": "a"} {"text": "b"}', "line 2 of rows.jsonl, column 15: Extra data"),
        (b"[" * 100_000, "line 2 of rows.jsonl: maximum recursion depth"),
    ],
)
def test_a_line_that_is_no_json_has_its_column(tmp_path: Path, line: bytes, words: str) -> None:
    failure = refusal(tmp_path, {"rows.jsonl": LINE + line + b"\n"})
    assert failure.error.reason == "MalformedRow"
    assert words in failure.error.message
