"""llama.cpp as people use it: its own converter, and its binding for Node.js, which is published with binaries.

Both come from the npm package node-llama-cpp, which holds the sources of the release that it was built from, so that
converter and binding are of one version. They are fetched once, into build/families.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

BUILD = Path(__file__).parents[2] / "build" / "families"
PACKAGES = Path(__file__).parent / "npm"

CONVERT = """
import json, sys
folder, pairs, options = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
sys.path.insert(0, folder)
import convert_hf_to_gguf
for name, source, target in pairs:
    sys.argv[1:] = [source, "--outfile", target, "--outtype", "f32", "--model-name", name, *options]
    convert_hf_to_gguf.main()
"""
"""One process for several models: importing what the converter needs takes longer than a tiny model."""


class Refused(Exception):
    """llama.cpp does not take the model; the message is its own."""


@dataclass(frozen=True)
class Question:
    """A GGUF file, texts of which the ids are asked for, and ids behind which the next token's probability is."""

    model: str
    texts: Sequence[str]
    ids: Sequence[int]


@dataclass(frozen=True)
class Answer:
    """The ids of each text, without a token before or behind; the logarithm of each token's probability."""

    ids: list[list[int]]
    logarithms: list[float]


@cache
def packages() -> Path:
    """The folder of node_modules, installed from the lock file."""
    folder = BUILD / "npm"
    lock = (PACKAGES / "package-lock.json").read_bytes()
    installed = folder / "installed.json"
    if not installed.is_file() or installed.read_bytes() != lock:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copyfile(PACKAGES / name, folder / name)
        # what is optional are the binding's binaries for other machines and for graphics cards, of 600 MB; `npm ci`
        # takes no lock file where some of them are not to be had
        command = ["npm", "install", "--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        installed.write_bytes(lock)
    return folder / "node_modules"


@cache
def sources() -> Path:
    """llama.cpp's sources, of the release that the binding was built from."""
    bundle = packages() / "node-llama-cpp" / "llama" / "gitRelease.bundle"
    folder = BUILD / f"llama.cpp-{version()}"
    if not folder.is_dir():
        partial = Path(tempfile.mkdtemp(dir=BUILD))
        subprocess.run(["git", "clone", "--quiet", bundle, partial / "clone"], check=True, capture_output=True)
        (partial / "clone").rename(folder)
        partial.rmdir()
    return folder


@cache
def version() -> str:
    """The release's tag."""
    tag: str = json.loads((packages() / "node-llama-cpp" / "llama" / "llama.cpp.info.json").read_text())["tag"]
    return tag


def convert(name: str, folders: Sequence[Path], target: Path, options: Sequence[str] = ()) -> list[Path]:
    """Convert checkpoints to GGUF in f32, under the model's name in public; `options` are the converter's own.

    Raises Refused.
    """
    files = [target / f"{index}.gguf" for index in range(len(folders))]
    pairs = [[name, str(folder), str(file)] for folder, file in zip(folders, files, strict=True)]
    process = subprocess.run(
        [sys.executable, "-c", CONVERT, sources(), json.dumps(pairs), *options], capture_output=True, text=True
    )
    if process.returncode:
        raise Refused(f"the converter: {process.stderr.strip().splitlines()[-1]}")
    return files


def read(questions: Sequence[Question], folder: Path) -> list[Answer]:
    """What the binding makes of GGUF files; raises Refused."""
    reader, answers = BUILD / "npm" / "read.mjs", folder / "answers.json"
    packages()
    shutil.copyfile(PACKAGES / "read.mjs", reader)  # beside node_modules, where it finds the binding
    asked = {"questions": [asdict(question) for question in questions], "answers": str(answers)}
    process = subprocess.run(
        ["node", reader],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if not key.startswith("NODE_LLAMA_CPP")},
    )
    if process.returncode or not answers.is_file():
        said = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        raise Refused(
            f"the binding: {next((line for line in said if 'Error: ' in line or ': error' in line), said[-1])}"
        )
    return [Answer(**answer) for answer in json.loads(answers.read_text())]
