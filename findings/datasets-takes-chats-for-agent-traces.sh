#!/usr/bin/env bash
# A JSONL file of ordinary chats cannot be read by datasets when its rows also say id, source, model and system_prompt: it
# is taken for the trace of an agent, whose reader wants another package. With any one of these columns under another
# name, the very same file is read.
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
print("datasets", version("datasets"))
messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
ROW = {"id": "1", "source": "forum", "model": "m", "system_prompt": "Be kind.", "messages": messages}


def outcome(name, row):
    path = folder / f"{name}.jsonl"
    path.write_text(json.dumps(row) + "\n")
    try:
        rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / name))
        return f"read: {rows.column_names}"
    except Exception as error:
        cause = error.__cause__ or error
        return f"{type(error).__name__}: {str(cause).splitlines()[0][:100]}"


found = {"chats": outcome("chats", ROW)}
for column in ("id", "source", "model", "system_prompt"):
    renamed = {("other" if name == column else name): value for name, value in ROW.items()}
    found[f"without {column}"] = outcome(f"without-{column}", renamed)
for name, said in found.items():
    print(f"{name:22} {said}")
as_seen = not found.pop("chats").startswith("read") and all(said.startswith("read") for said in found.values())
sys.exit(0 if as_seen else "the behaviour has changed")
PYTHON
HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/read.py" "$folder"
