"""Asking transformers in a process of its own, which does not see torch.

Where torch is installed, transformers imports it with itself: seconds, and more memory than all the rest of add-tokens.
A tokenizer needs none of it. The process ends with its answer, and its memory with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune.steps.tokenizer_files.agreement import Disagreement


def complete(folder: Path, texts: Sequence[str] = ()) -> str | None:
    """`base.complete` in a process of its own: its result, its errors, ChildProcessError when the process fails."""
    asked = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps({"folder": str(folder), "texts": list(texts)}),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if asked.returncode:
        said = asked.stderr.strip().rpartition("\n")[2] or f"status {asked.returncode}"
        raise ChildProcessError(f"transformers could not be asked about the tokenizer: {said}")
    answer = json.loads(asked.stdout.strip().rpartition("\n")[2])
    if "disagreement" in answer:
        raise Disagreement(answer["disagreement"])
    changed: str | None = answer["changed"]
    return changed


def main() -> None:
    """Answer what stands on stdin, as JSON on a line of stdout."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # what cannot be imported is not there
    from finetune.steps.tokenizer_files import base

    question = json.load(sys.stdin)
    try:
        answer = {"changed": base.complete(Path(question["folder"]), question["texts"])}
    except Disagreement as error:
        answer = {"disagreement": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
