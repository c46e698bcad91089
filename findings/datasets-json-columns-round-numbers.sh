#!/usr/bin/env bash
# datasets reads a JSONL column whose values have several shapes as its Json type, and then numbers lose their digits: in
# that column all but ten decimals, and in every other column of the batch as well, also in one of plain floats.
#
# Coordinates, log-probabilities and scores of one file come out otherwise than those of the next, depending on whether
# some other column happened to have one shape or two. json.loads and pandas' own reader keep every digit.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'datasets==5.2.0' 'pyarrow==26.0.1' 'pandas==3.1.1'
cat > "$folder/read.py" <<'PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path

import datasets

datasets.disable_progress_bars()
folder = Path(sys.argv[1])
NUMBER = 0.12345678901234568
print(*(f"{name} {version(name)}" for name in ("datasets", "pyarrow", "pandas")))


def read(name, calls):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"v": NUMBER, "calls": call}) + "\n" for call in calls))
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / name))
    print(f"{name:14} type of calls: {str(rows.features['calls'])[:60]}")
    print(f"{'':14} v written {NUMBER!r}, read {rows[0]['v']!r}; calls read {rows[0]['calls']!r}")
    return rows[0]


one = read("one shape", [[{"lat": NUMBER}], [{"lat": 1.5}]])
several = read("several shapes", [[{"lat": NUMBER}], [{"days": "x"}], [{"lat": "a"}]])
as_seen = one["v"] == NUMBER and several["v"] != NUMBER and several["calls"][0]["lat"] != NUMBER
sys.exit(0 if as_seen else "the behaviour has changed")
PYTHON
HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/read.py" "$folder"
