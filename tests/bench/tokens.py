"""add-tokens against the careful way with transformers, on one generated checkpoint of about 2 GB, in one run.

Each side is a process of its own, measured from outside: wall time from its start to its end, peak of resident memory
(all of it, and its anonymous part alone: pages of mapped files can be dropped, anonymous ones cannot). The checkpoint
is read once before each run, so both sides find it in the page cache, and dirty pages are written back before each
starts. Every pair is run twice: leaving the result in the page cache, as save_pretrained does, and forced to disk with
fsync, as the step really does; the goal for time is about the former, since the latter mixes in the disk's speed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from finetune.steps.tokens.checkpoint import read_checkpoint
from finetune.steps.tokens.safetensors_file import Header, Tensor, write_header
from tests.bench.table import FOLDER, Row, write
from tests.models import smollm2

HIDDEN, INTERMEDIATE, LAYERS = 2048, 5632, 16
WORDS = [f"<marker-{number}>" for number in range(8)] + [f"myocardial infarction type {number}" for number in range(8)]
PAD = 64

OURS = """
import sys
from finetune.steps import __main__, staging
if "--no-fsync" in sys.argv: staging.make_durable = lambda folder: None
sys.exit(__main__.main(["add-tokens"]))
"""

PEER = """
import os, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

source, target, words, multiple = sys.argv[1], Path(sys.argv[2]), sys.argv[3].split("|"), int(sys.argv[4])
tokenizer = AutoTokenizer.from_pretrained(source)
length = len(tokenizer)
pieces = [tokenizer.encode(f" {word}" if word[0].isalnum() else word, add_special_tokens=False) for word in words]
tokenizer.add_tokens(words)
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
model.resize_token_embeddings(len(tokenizer), mean_resizing=False, pad_to_multiple_of=multiple)
with torch.no_grad():
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        total = torch.zeros(weight.shape[1], dtype=torch.float64)
        for first in range(0, length, 4096):
            total += weight[first : min(first + 4096, length)].double().sum(0)
        for index, ids in enumerate(pieces):
            weight[length + index] = weight[ids].float().mean(0).to(weight.dtype)
        weight[length + len(words) :] = (total / length).to(weight.dtype)
model.save_pretrained(target, max_shard_size="50GB")
tokenizer.save_pretrained(target)
if "--no-fsync" not in sys.argv:
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
"""


@dataclass(frozen=True)
class Measured:
    """Seconds and peak bytes of a process."""

    seconds: float
    resident: int
    anonymous: int


def generate(folder: Path) -> int:
    """Write an untied bf16 Llama checkpoint with SmolLM2's tokenizer and return its bytes."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(smollm2() / name, folder / name)
    config = json.loads((smollm2() / "config.json").read_text()) | {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": HIDDEN // 16,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors, position = {}, 0
    for name, shape in shapes(config["vocab_size"]):
        size = 2 * int(np.prod(shape))
        tensors[name] = Tensor(name, "BF16", shape, position, position + size)
        position += size
    random = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        write_header(file, Header(tensors, {"format": "pt"}, 0))
        for tensor in tensors.values():
            bits = np.frombuffer(random.bytes(tensor.size), "<u2")
            file.write(((bits & 0x80FF) | 0x3C00).astype("<u2").tobytes())  # random signs and digits, around 0.01
    return position


def shapes(rows: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (rows, HIDDEN)
    for layer in range(LAYERS):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"model.layers.{layer}.self_attn.{name}.weight", (HIDDEN, HIDDEN)
        for name in ("gate_proj", "up_proj"):
            yield f"model.layers.{layer}.mlp.{name}.weight", (INTERMEDIATE, HIDDEN)
        yield f"model.layers.{layer}.mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{name}.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (rows, HIDDEN)


def measure(command: list[str], environment: dict[str, str], warm: Path) -> Measured:
    """Run a process to its end and watch its memory."""
    for path in warm.iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    resident = anonymous = 0
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            break
        values = dict(line.split(":", 1) for line in lines if ":" in line)
        resident = max(resident, int(values.get("VmHWM", "0").split()[0]) * 1024)
        anonymous = max(anonymous, int(values.get("RssAnon", "0").split()[0]) * 1024)
        time.sleep(0.004)
    _, errors = process.communicate()
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(errors.decode())
    return Measured(seconds, resident, anonymous)


def equal(left: Path, right: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    ours, theirs = read_checkpoint(left), read_checkpoint(right)
    if ours.tensors.keys() != theirs.tensors.keys():
        return False
    with (left / "model.safetensors").open("rb") as one, (right / "model.safetensors").open("rb") as other:
        start, peer_start = ours.headers["model.safetensors"].data_start, theirs.headers["model.safetensors"].data_start
        for name, tensor in ours.tensors.items():
            peer = theirs.tensors[name]
            if (tensor.dtype, tensor.shape) != (peer.dtype, peer.shape):
                return False
            for done in range(0, tensor.size, 1 << 24):
                length = min(1 << 24, tensor.size - done)
                mine = os.pread(one.fileno(), length, start + tensor.start + done)
                if mine != os.pread(other.fileno(), length, peer_start + peer.start + done):
                    return False
    return True


def job_environment(folder: Path) -> dict[str, str]:
    spec = {
        "model": {"uri": "hf://bench/generated"},
        "tokens": {"add": [{"content": word} for word in WORDS], "padToMultipleOf": PAD},
        "dataset": {"sources": [{"uri": "pvc://data/rows.jsonl"}], "packing": "Disabled"},
        "training": {"epochs": 1},
    }
    job = {"name": "bench", "namespace": "bench", "uid": "1", "created": datetime.now(UTC).isoformat(), "spec": spec}
    (folder / "job.json").write_text(json.dumps(job))
    return os.environ | {
        "FINETUNE_JOB": str(folder / "job.json"),
        "FINETUNE_WORKSPACE": str(folder),
        "FINETUNE_REPORT": str(folder / "report.json"),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "HF_HUB_OFFLINE": "1",
    }


def compared(case: str, ours: Measured, peer: Measured, *, goal: bool) -> Iterator[Row]:
    for name, measured in (("add-tokens", ours), ("transformers", peer)):
        yield Row(f"{name}, {case}", "time", measured.seconds, "s")
        yield Row(f"{name}, {case}", "peak memory, resident", measured.resident / 2**20, "MiB")
        yield Row(f"{name}, {case}", "peak memory, anonymous", measured.anonymous / 2**20, "MiB")
    times = peer.seconds / ours.seconds
    yield Row(f"ratio, {case}", "times faster", times, "x", *(("at least 4", times >= 4) if goal else ()))
    resident, anonymous = ours.resident / peer.resident, ours.anonymous / peer.anonymous
    yield Row(f"ratio, {case}", "share of memory, resident", resident, "", "at most 0.1", resident <= 0.1)
    yield Row(f"ratio, {case}", "share of memory, anonymous", anonymous, "", "at most 0.1", anonymous <= 0.1)


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="tokens-", dir=FOLDER))
    try:
        size = generate(folder / "model")
        environment = job_environment(folder)
        for module in ("torch, transformers", "finetune.steps.tokens.step"):
            subprocess.run([sys.executable, "-c", f"import {module}"], env=environment, check=True)
        rows: list[Row] = []
        for case, flag in (("no fsync", ["--no-fsync"]), ("fsync", [])):
            for result in ("prepared", "peer"):
                shutil.rmtree(folder / result, ignore_errors=True)
            ours = measure([sys.executable, "-c", OURS, *flag], environment, folder / "model")
            arguments = [str(folder / "model"), str(folder / "peer"), "|".join(WORDS), str(PAD)]
            peer = measure([sys.executable, "-c", PEER, *arguments, *flag], environment, folder / "model")
            rows += compared(case, ours, peer, goal=bool(flag))
        same = equal(folder / "prepared", folder / "peer")
        rows.append(Row("both", "outputs equal bit for bit", float(same), "", "equal", same))
        notes = [
            f"one untied bf16 checkpoint of {size / 2**30:.2f} GiB in one file, {len(WORDS)} tokens, "
            f"rows padded to a multiple of {PAD}; {os.cpu_count()} processors",
            "wall time of whole processes, imports included; the checkpoint was in the page cache for both",
            "fsync: the result is forced to disk before the process ends, which takes as long as the disk takes",
        ]
        return 0 if write("tokens", rows, "add-tokens beside the careful transformers way", notes) else 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
