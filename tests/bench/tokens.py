"""add-tokens beside `cp` and beside transformers, on generated checkpoints, all in one run.

Each side is a process of its own, measured from outside: wall time from its start to its end, imports included, and
peak of resident memory. The checkpoint is read once before each run, so all sides find it in the page cache, and dirty
pages are written back before each starts. What is measured several times counts with its best time: others work on the
machine as well.

Two ways with transformers: the careful one gives the same tensors as add-tokens, bit for bit; the default one is
`resize_token_embeddings` as it is called in most scripts. Both sides leave their result in the page cache there, as
save_pretrained does; beside `cp` the times with the result forced to disk are shown, too, as the step really does it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from finetune.api.contract import Layout
from finetune.steps.cache import MODELS, cached
from finetune.steps.model_files.checkpoint import Checkpoint, read_checkpoint
from finetune.steps.model_files.safetensors_file import Header, Tensor, write_header
from finetune.steps.runtime.memory import available_memory
from finetune.steps.workspace.staging import publish
from tests.bench.process import Measured, best, measure
from tests.bench.table import FOLDER, Row, write
from tests.models import smollm2

SHARD = 400 << 20
WORDS = [f"<marker-{number}>" for number in range(8)] + [f"myocardial infarction type {number}" for number in range(8)]
PAD = 64
COMMIT = "0" * 40
MEMORY_GOAL = 200 << 20
WARM_RUNS = 7

OURS = """
import sys
from finetune.steps import __main__
from finetune.steps.workspace import staging
if "--no-fsync" in sys.argv: staging.make_durable = lambda folder: None
sys.exit(__main__.main(["add-tokens"]))
"""

COPY = 'mkdir "$2" && cp -r "$1"/. "$2"'
COPY_DURABLE = f'{COPY} && sync "$2"/* "$2"'

DEFAULT = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

source, target, words, multiple, shard = sys.argv[1], sys.argv[2], sys.argv[3].split("|"), int(sys.argv[4]), sys.argv[5]
tokenizer = AutoTokenizer.from_pretrained(source)
tokenizer.add_tokens(words)
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=multiple)
model.save_pretrained(target, max_shard_size=shard)
tokenizer.save_pretrained(target)
"""

CAREFUL = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

source, target, words, multiple, shard = sys.argv[1], sys.argv[2], sys.argv[3].split("|"), int(sys.argv[4]), sys.argv[5]
tokenizer = AutoTokenizer.from_pretrained(source)
length = len(tokenizer)
pieces = [tokenizer.encode(f" {word}" if word[0].isalnum() else word, add_special_tokens=False) for word in words]
tokenizer.add_tokens(words)
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
model.resize_token_embeddings(len(tokenizer), mean_resizing=False, pad_to_multiple_of=multiple)
matrices = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
with torch.no_grad():
    for weight in {id(weight): weight for weight in matrices}.values():
        total = torch.zeros(weight.shape[1], dtype=torch.float64)
        for first in range(0, length, 4096):
            total += weight[first : min(first + 4096, length)].double().sum(0)
        for index, ids in enumerate(pieces):
            weight[length + index] = weight[ids].float().mean(0).to(weight.dtype)
        weight[length + len(words) :] = (total / length).to(weight.dtype)
model.save_pretrained(target, max_shard_size=shard)
tokenizer.save_pretrained(target)
"""


@dataclass(frozen=True)
class Case:
    """A checkpoint to generate."""

    gigabytes: float
    tied: bool
    sharded: bool
    hidden: int = 2048

    @property
    def name(self) -> str:
        form = "sharded" if self.sharded else "one file"
        return f"{self.gigabytes:g} GB, {'tied' if self.tied else 'untied'}, {form}"


def generate(case: Case, folder: Path) -> None:
    """Write a bf16 Llama checkpoint with SmolLM2's tokenizer into an empty folder."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(smollm2() / name, folder / name)
    config = json.loads((smollm2() / "config.json").read_text())
    rows = config["vocab_size"]
    ends, one = (sum(2 * int(np.prod(shape)) for _, shape in shapes(case, rows, layers)) for layers in (0, 1))
    layers = max(1, round((case.gigabytes * 1e9 - ends) / (one - ends)))
    config |= {
        "hidden_size": case.hidden,
        "intermediate_size": case.hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": case.hidden // 16,
        "tie_word_embeddings": case.tied,
    }
    (folder / "config.json").write_text(json.dumps(config))
    files: list[list[Tensor]] = [[]]
    for name, shape in shapes(case, rows, layers):
        size, start = 2 * int(np.prod(shape)), files[-1][-1].end if files[-1] else 0
        if case.sharded and files[-1] and start + size > SHARD:
            files.append([])
            start = 0
        files[-1].append(Tensor(name, "BF16", shape, start, start + size))
    bits = np.frombuffer(np.random.default_rng(0).bytes(64 << 20), "<u2")
    pool = memoryview(((bits & 0x80FF) | 0x3C00).astype("<u2")).cast("B")  # random signs and digits, around 0.01
    names = {}
    for index, tensors in enumerate(files):
        file = f"model-{index + 1:05}-of-{len(files):05}.safetensors" if case.sharded else "model.safetensors"
        names |= dict.fromkeys((tensor.name for tensor in tensors), file)
        with (folder / file).open("wb") as written:
            write_header(written, Header({tensor.name: tensor for tensor in tensors}, {"format": "pt"}, 0))
            for tensor in tensors:
                for first in range(0, tensor.size, len(pool)):
                    written.write(pool[: min(len(pool), tensor.size - first)])
    if case.sharded:
        index = {"metadata": {"total_size": sum(tensors[-1].end for tensors in files)}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shapes(case: Case, rows: int, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, intermediate = case.hidden, case.hidden * 11 // 4
    yield "model.embed_tokens.weight", (rows, hidden)
    for layer in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"model.layers.{layer}.self_attn.{name}.weight", (hidden, hidden)
        for name in ("gate_proj", "up_proj"):
            yield f"model.layers.{layer}.mlp.{name}.weight", (intermediate, hidden)
        yield f"model.layers.{layer}.mlp.down_proj.weight", (hidden, intermediate)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{name}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not case.tied:
        yield "lm_head.weight", (rows, hidden)


class Bench:
    """One checkpoint in a folder of its own: the base model of the workspace `job`, kept in the cache beside it."""

    def __init__(self, case: Case, folder: Path, repeat: int) -> None:
        self.case, self.folder, self.repeat = case, folder, repeat
        self.take_model("job", lambda partial: generate(case, partial))

    def take_model(self, job: str, write: Callable[[Path], None]) -> None:
        """What the step download does: the base model enters a workspace by way of the cache."""
        layout = Layout(workspace=self.folder / job, cache=self.folder / "cache")
        layout.workspace.mkdir()

        def fill(partial: Path) -> dict[str, Any]:
            write(partial)
            return {"commit": COMMIT}

        publish(layout.model, COMMIT, cached(layout, MODELS, lambda: COMMIT, fill))

    @property
    def model(self) -> Path:
        return self.folder / "job" / "model"

    def ours(self, *flags: str) -> Measured:
        """add-tokens without a cache."""
        command, job = [sys.executable, "-c", OURS, *flags], self.folder / "job"
        return self._best(command, job_environment(job), job / "prepared", self.repeat)

    def copy(self, script: str) -> Measured:
        command = ["sh", "-c", script, "cp", str(self.model), str(self.folder / "copy")]
        measured = self._best(command, dict(os.environ), self.folder / "copy", self.repeat)
        shutil.rmtree(self.folder / "copy")
        return measured

    def transformers(self, script: str) -> Measured:
        shutil.rmtree(self.folder / "peer", ignore_errors=True)
        shard = f"{SHARD // 10**6}MB" if self.case.sharded else "50GB"
        command = [sys.executable, "-c", script, str(self.model), str(self.folder / "peer")]
        return measure([*command, "|".join(WORDS), str(PAD), shard], job_environment(self.folder / "job"), self.model)

    def warm(self) -> Measured:
        """add-tokens for a further job, which finds the extended model in the cache."""
        shared = {"FINETUNE_CACHE": str(self.folder / "cache")}
        for job, repeat in (("first", 1), ("second", WARM_RUNS)):
            self.take_model(job, lambda _: None)
            workspace = self.folder / job
            environment = job_environment(workspace) | shared
            measured = self._best([sys.executable, "-c", OURS], environment, workspace / "prepared", repeat)
        if not json.loads((workspace / "report.json").read_text())["result"]["fromCache"]:
            raise SystemExit("the second job did not find the first one's model")
        return measured

    def _best(self, command: list[str], environment: dict[str, str], result: Path, repeat: int) -> Measured:
        runs = []
        for _ in range(repeat):
            shutil.rmtree(result, ignore_errors=True)
            runs.append(measure(command, environment, self.model))
        return best(runs)


def equal(left: Path, right: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit, in whichever files."""
    ours, theirs = read_checkpoint(left), read_checkpoint(right)
    if {name: (t.dtype, t.shape) for name, t in ours.tensors.items()} != {
        name: (t.dtype, t.shape) for name, t in theirs.tensors.items()
    }:
        return False
    return all(
        mine == other
        for name in ours.tensors
        for mine, other in zip(blocks(ours, name), blocks(theirs, name), strict=True)
    )


def blocks(checkpoint: Checkpoint, name: str) -> Iterator[bytes]:
    """The bytes of a tensor."""
    file, header = next((file, header) for file, header in checkpoint.headers.items() if name in header.tensors)
    tensor = header.tensors[name]
    with (checkpoint.folder / file).open("rb") as read:
        for done in range(0, tensor.size, 1 << 24):
            yield os.pread(read.fileno(), min(1 << 24, tensor.size - done), header.data_start + tensor.start + done)


def job_environment(workspace: Path) -> dict[str, str]:
    spec = {
        "model": {"uri": "hf://bench/generated"},
        "tokens": {"add": [{"content": word} for word in WORDS], "padToMultipleOf": PAD},
        "dataset": {"sources": [{"uri": "pvc://data/rows.jsonl"}], "packing": "Disabled"},
        "training": {"epochs": 1},
    }
    job = {"name": "bench", "namespace": "bench", "uid": "1", "created": datetime.now(UTC).isoformat(), "spec": spec}
    (workspace / "job.json").write_text(json.dumps(job))
    return {key: value for key, value in os.environ.items() if not key.startswith("FINETUNE_")} | {
        "FINETUNE_JOB": str(workspace / "job.json"),
        "FINETUNE_WORKSPACE": str(workspace),
        "FINETUNE_REPORT": str(workspace / "report.json"),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "HF_HUB_OFFLINE": "1",
    }


def at_most(case: str, metric: str, value: float, unit: str, limit: float) -> Row:
    return Row(case, metric, value, unit, f"at most {limit:g}", value <= limit)


def rows_of(bench: Bench, fixed: Measured, *, peers: bool) -> Iterator[Row]:
    """All measurements of one case; `fixed` is what add-tokens takes where there are no weights to speak of."""
    case = bench.case.name
    copied, copied_durably = bench.copy(COPY), bench.copy(COPY_DURABLE)
    quick, durable = bench.ours("--no-fsync"), bench.ours()
    for way, ours, copy in (("no fsync", quick, copied), ("fsync", durable, copied_durably)):
        yield Row(case, f"add-tokens, {way}", ours.seconds, "s")
        yield Row(case, f"cp, {way}", copy.seconds, "s")
        yield at_most(case, f"over cp, {way}", ours.seconds / copy.seconds, "x", 1.3)
        yield Row(case, f"over cp, {way}, start aside", (ours.seconds - fixed.seconds) / copy.seconds, "x")
    yield at_most(case, "peak memory", durable.resident / 2**20, "MiB", MEMORY_GOAL / 2**20)
    if peers:
        for way, script in (("careful", CAREFUL), ("default", DEFAULT)):
            peer = bench.transformers(script)
            yield Row(case, f"transformers, {way}", peer.seconds, "s")
            yield Row(case, f"transformers, {way}, peak memory", peer.resident / 2**20, "MiB")
            times = peer.seconds / quick.seconds
            yield Row(case, f"times faster than {way}", times, "x", "at least 4", times >= 4)
            yield at_most(case, f"memory over {way}", quick.resident / peer.resident, "x", 0.1)
            if script is CAREFUL:
                same = equal(bench.folder / "job/prepared", bench.folder / "peer")
                yield Row(case, "equal to careful, bit for bit", float(same), "", "equal", same)
        shutil.rmtree(bench.folder / "peer")
    shutil.rmtree(bench.folder / "job/prepared")
    yield Row(case, "add-tokens, warm cache", bench.warm().seconds, "s")


def across(rows: Sequence[Row]) -> Iterator[Row]:
    """Does memory, or the time with a warm cache, depend on the size?"""
    for metric, limit in (("peak memory", 1.1), ("add-tokens, warm cache", 1.3)):
        values = [row.value for row in rows if row.metric == metric]
        yield at_most("all cases", f"largest over smallest: {metric}", max(values) / min(values), "x", limit)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="0.5,2,4", help="sizes of the checkpoints in GB")
    parser.add_argument("--peers-up-to", type=float, default=2, help="largest size to load with transformers, in GB")
    parser.add_argument("--repeat", type=int, default=3, help="runs of add-tokens and cp, of which the best counts")
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    notes = [
        f"bf16 checkpoints, {len(WORDS)} tokens, rows padded to a multiple of {PAD}; {os.cpu_count()} processors",
        "wall time of whole processes, imports included; the checkpoint was in the page cache for all",
        f"the best of {arguments.repeat} runs of add-tokens and cp (warm cache: {WARM_RUNS}), one run of transformers, "
        f"which was measured up to {arguments.peers_up_to:g} GB: it holds the model in memory more than once",
        "start: Python, imports, reading and writing the tokenizer; the same for any size",
        "fsync: the result is forced to disk before the process ends, which takes as long as the disk takes",
        "sharded: add-tokens writes the shards with token matrices and links the others, cp copies all",
    ]
    with tempfile.TemporaryDirectory(prefix="tokens-", dir=FOLDER) as name:
        scratch = Path(name)
        (scratch / "warm-up").mkdir()
        environment = job_environment(scratch / "warm-up")
        for module in ("torch, transformers", "finetune.steps.tokens.step"):
            subprocess.run([sys.executable, "-c", f"import {module}"], env=environment, check=True)
        smallest = Case(0, tied=True, sharded=False, hidden=64)
        fixed = Bench(smallest, folder_for(scratch, "fixed"), arguments.repeat).ours("--no-fsync")
        rows.append(Row("any case", "start", fixed.seconds, "s"))
        for size in sorted(float(size) for size in arguments.sizes.split(",")):
            peers = size <= arguments.peers_up_to
            if shutil.disk_usage(FOLDER).free < (3.3 if peers else 2.2) * size * 1e9 + 2e9:
                notes.append(f"{size:g} GB was left out: the disk has too little room")
                continue
            if peers and available_memory() < 5 * size * 1e9:
                notes.append(f"{size:g} GB was left out for transformers: there is too little free memory")
                peers = False
            for tied in (True, False):
                for sharded in (False, True):
                    case = Case(size, tied, sharded)
                    folder = folder_for(scratch, "case")
                    bench = Bench(case, folder, arguments.repeat)
                    rows += rows_of(bench, fixed, peers=peers)
                    shutil.rmtree(folder)
    rows += across(rows)
    return 0 if write("tokens", rows, "add-tokens beside cp and transformers", notes) else 1


def folder_for(scratch: Path, name: str) -> Path:
    (scratch / name).mkdir()
    return scratch / name


if __name__ == "__main__":
    sys.exit(main())
