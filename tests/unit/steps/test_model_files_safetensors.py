"""A safetensors header is believed only as far as the file bears it out."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from finetune.steps.model_files.checkpoint import NoSafetensors, read_checkpoint
from finetune.steps.model_files.safetensors_file import InvalidSafetensors, read_header, write_header
from tests.models import tiny

GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def file_of(tmp_path: Path, header: Any, data: bytes = bytes(16), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_headers_of_real_files_are_read_and_written_back_the_same(tmp_path: Path) -> None:
    path = tiny(tmp_path, tied=False) / "model.safetensors"
    header = read_header(path)
    assert header.data_start + header.data_size == path.stat().st_size
    with (tmp_path / "again").open("wb") as file:
        write_header(file, header)
        file.write(bytes(header.data_size))
    again = read_header(tmp_path / "again")
    assert (again.tensors, again.metadata) == (header.tensors, header.metadata)
    assert again.data_start % 8 == 0


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"[1]", "does not start with '{'"),
        (b"{nonsense", "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b'{"\xff": 1}', "not valid JSON"),
        (b'{"w": 1, "w": 2}', "names 'w' twice"),
        (b'{"w": {"dtype": "F32", "dtype": "F16"}}', "names 'dtype' twice"),
        ({"w": 7}, "not an object"),
        ({"w": GOOD | {"dtype": "Q4"}}, "unknown dtype 'Q4'"),
        ({"w": GOOD | {"dtype": ["F32"]}}, "unknown dtype"),
        ({"w": GOOD | {"shape": [-2, -2]}}, "invalid shape"),
        ({"w": GOOD | {"shape": [True, 4]}}, "invalid shape"),
        ({"w": GOOD | {"shape": [1 << 70]}}, "invalid shape"),
        ({"w": GOOD | {"shape": [1] * 65}}, "invalid shape"),
        ({"w": GOOD | {"shape": [2, 3]}}, "needs 24 bytes"),
        ({"w": GOOD | {"data_offsets": [16, 0]}}, "invalid data_offsets"),
        ({"w": GOOD | {"data_offsets": [0, 16, 32]}}, "invalid data_offsets"),
        ({"w": GOOD | {"data_offsets": [16, 32]}}, "a hole of 16 bytes"),
        ({"w": GOOD, "v": GOOD}, "overlap"),
        (
            {"w": GOOD | {"shape": [4, 4], "data_offsets": [0, 64]}},
            "truncated: its tensors take 64 bytes, 16 are there",
        ),
        ({"w": GOOD | {"shape": [2], "data_offsets": [0, 8]}}, "8 bytes follow the last tensor"),
        ({"__metadata__": {"format": 1}, "w": GOOD}, "not a map of strings"),
    ],
)
def test_a_lying_header_is_refused_with_the_reason(tmp_path: Path, header: Any, words: str) -> None:
    with pytest.raises(InvalidSafetensors, match=r"^model\.safetensors: ") as caught:
        read_header(file_of(tmp_path, header))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("length", "words"),
    [(1 << 63, "more than the format allows"), (100_000_001, "more than the format allows"), (500, "truncated")],
)
def test_a_claimed_length_is_not_believed(tmp_path: Path, length: int, words: str) -> None:
    with pytest.raises(InvalidSafetensors, match=words):
        read_header(file_of(tmp_path, {"w": GOOD}, length=length))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InvalidSafetensors, match="too few"):
        read_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"model.norm.weight": "../../etc/passwd"}, "no safetensors file beside it"),
        ({"model.norm.weight": "absent.safetensors"}, "missing"),
        ({"absent": "model-00001-of-00003.safetensors"}, "no such tensor"),
        ({}, "no weight_map"),
    ],
)
def test_an_index_is_not_believed(tmp_path: Path, weight_map: dict[str, str], words: str) -> None:
    tiny(tmp_path, sharded=True)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InvalidSafetensors, match=words):
        read_checkpoint(tmp_path)


def test_a_shard_must_not_hold_what_the_index_does_not_expect(tmp_path: Path) -> None:
    path = tiny(tmp_path, sharded=True) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(InvalidSafetensors, match=r"holds 'model\.norm\.weight'"):
        read_checkpoint(tmp_path)


def test_a_folder_without_weights_is_told_apart_from_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(NoSafetensors):
        read_checkpoint(tmp_path)
