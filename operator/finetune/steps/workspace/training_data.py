"""The training data that load-dataset leaves in the workspace and train reads: its format, said once.

The folder `dataset` has one of these for each part: TRAIN, and VALIDATION where rows are held out. Each is a dataset
that `datasets.load_from_disk` reads, and trl with it: a stream of Arrow, and a state that names the stream's file.

A row has `input_ids` and `labels`; where it holds several examples (packed, or the two of a pair), also `seq_lengths`,
the length of each. The first label of an example is always IGNORED: nothing predicts that token. Beside the rows lies
where each example comes from (`origins`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

TRAIN, VALIDATION = "train", "validation"

IDS, LABELS, LENGTHS = "input_ids", "labels", "seq_lengths"

IGNORED = -100
"""The label of a token that carries no loss, as in torch and transformers."""

FILE = "data-00000-of-00001.arrow"
STATE = "state.json"


def write_state(folder: Path, fingerprint: str) -> None:
    """Say that FILE holds the rows; `fingerprint` tells these from others."""
    state: dict[str, Any] = {
        "_data_files": [{"filename": FILE}],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / STATE).write_text(json.dumps(state, indent=1))


def read_rows(folder: Path) -> pa.Table:
    """The rows of a part, memory-mapped. `datasets` is not asked: importing it (and pandas with it) takes seconds."""
    files = [entry["filename"] for entry in json.loads((folder / STATE).read_text())["_data_files"]]
    tables = [pa.ipc.open_stream(pa.memory_map(str(folder / name))).read_all() for name in files]
    return pa.concat_tables(tables)
