"""`make bench-data`: load-dataset beside datasets.map and trl's own preparation, on one generated file of chats.

Both sides read the same JSONL, render the same chat template (SmolLM2's, with generation markers, since trl needs them
to mask), tokenise with SmolLM2's tokenizer, learn the assistant's turns only, and pack into rows of 1,024 tokens by
best fit. load-dataset runs as in its image, where there is no torch; trl cannot be imported without. trl's SFTTrainer
gets a model of a few weights, and is measured until its dataset is prepared and lies on the disk.

The build of the commit FORMER runs the same job beside it, and so does `tokenizers` by itself on texts that were
rendered before (the limit), and the rendering by itself. Time on the processors is told too: on a machine that others
use it says more than time on the clock.

Each side is a process of its own, whose memory is measured from outside. It takes the time itself, once everything is
imported: from the file of rows to the packed dataset on the disk. The results are compared example by example: ids and
labels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from finetune.steps.dataset.step import BATCH
from finetune.steps.workspace.staging import MANIFEST
from tests.bench.process import Measured, best, measure
from tests.bench.table import FOLDER, Row, write
from tests.models import CORPUS, smollm2

LENGTH = 1024
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "config.json")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)

OURS = """
import sys, time
import datasets.packaged_modules
from transformers import AutoTokenizer
import finetune.steps.command, finetune.steps.dataset.step, finetune.steps.dataset.write
started, before = time.perf_counter(), time.process_time()
code = finetune.steps.command.main(["load-dataset"])
open(sys.argv[1], "w").write(f"{time.perf_counter() - started} {time.process_time() - before}")
sys.exit(code)
"""

PEER = """
import sys, time
from datasets import load_dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

seconds, model, rows, output, length, processes = sys.argv[1:]
started = time.perf_counter()
tokenizer = AutoTokenizer.from_pretrained(model)
config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8,
    num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
options = SFTConfig(output_dir=output, max_length=int(length), packing=True, packing_strategy="bfd", use_cpu=True,
    assistant_only_loss=True, dataset_num_proc=int(processes) or None, report_to="none", bf16=False)
data = load_dataset("json", data_files=rows, split="train")
trainer = SFTTrainer(AutoModelForCausalLM.from_config(config), options, train_dataset=data, processing_class=tokenizer)
trainer.train_dataset.save_to_disk(output)
open(seconds, "w").write(str(time.perf_counter() - started))
"""


LIMIT = """
import json, sys, time
from transformers import AutoTokenizer

seconds, model, rows, batch = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
conversations = [json.loads(line)["messages"] for line in open(rows)]
started = time.perf_counter()
texts = [tokenizer.apply_chat_template(each, tokenize=False) for each in conversations]
rendered = time.perf_counter()
backend = tokenizer.backend_tokenizer
for first in range(0, len(texts), int(batch)):
    backend.encode_batch_fast(texts[first : first + int(batch)], add_special_tokens=False)
tokenised = time.perf_counter()
open(seconds, "w").write(json.dumps([rendered - started, tokenised - rendered]))
"""

FORMER = "aefd2af"
"""The last commit before load-dataset was made faster."""

FASTER = 1.5

RUNS = 3
"""Of our build and of FORMER, in turn; the best of each counts."""


@dataclass(frozen=True)
class Side:
    """Who prepares the data."""

    name: str
    processes: int | None
    """Of trl's datasets.map (0: its default, this process alone); None is load-dataset."""

    former: bool = False
    """Whether it is load-dataset as it was at FORMER."""


OPERATOR = Path(__file__).parents[2] / "operator"

BEFORE = Side(f"load-dataset at {FORMER}", None, former=True)
SIDES = (Side("load-dataset", None), Side("trl", 0), Side(f"trl, {os.cpu_count()} processes", os.cpu_count() or 1))


@dataclass
class Place:
    """Where a bench works."""

    folder: Path

    def prepare(self, sizes: list[int]) -> None:
        """The model's tokenizer, the rows, and our packages without torch."""
        model = self.folder / "work" / "model"
        model.mkdir(parents=True)
        for name in TOKENIZER:
            shutil.copyfile(smollm2() / name, model / name)
        (model / "chat_template.jinja").write_text(TEMPLATE)
        packages = self.folder / "packages"
        packages.mkdir()
        for path in Path(sysconfig.get_path("purelib")).iterdir():
            if not path.name.startswith(("torch", "functorch", "trl")):
                (packages / path.name).symlink_to(path)
        former = self.folder / "former"
        former.mkdir()
        archive = subprocess.run(
            ["git", "archive", FORMER, "operator"], cwd=OPERATOR.parent, check=True, capture_output=True
        )
        subprocess.run(["tar", "-x", "-C", str(former)], input=archive.stdout, check=True)
        (self.folder / "claims").mkdir()
        for size in sizes:
            claim = self.folder / "claims" / f"rows-{size}"
            claim.mkdir()
            with (claim / "rows.jsonl").open("w") as file:
                file.writelines(json.dumps({"messages": messages}) + "\n" for messages in chats(size))

    def run(self, side: Side, size: int) -> Measured:
        """Prepare the data of this size; the seconds are those after the imports."""
        seconds = self.folder / "seconds"
        command, environment = self._process(side, size, seconds)
        measured = measure(command, environment, self.folder / "claims" / f"rows-{size}")
        wall, *processors = map(float, seconds.read_text().split())
        return replace(measured, seconds=wall, processors=sum(processors))

    def limit(self, size: int) -> tuple[float, float]:
        """The seconds that rendering takes by itself, and tokenising by itself in batches of ours."""
        rows = self.folder / "claims" / f"rows-{size}" / "rows.jsonl"
        seconds = self.folder / "limit"
        arguments = [*map(str, (seconds, self.folder / "work" / "model", rows)), str(BATCH)]
        measure([sys.executable, "-c", LIMIT, *arguments], os.environ, rows.parent)
        rendering, tokenising = json.loads(seconds.read_text())
        return rendering, tokenising

    def _process(self, side: Side, size: int, seconds: Path) -> tuple[list[str], dict[str, str]]:
        rows = self.folder / "claims" / f"rows-{size}"
        for name in ("work/dataset", "peer", "hf"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.folder / "hf")}
        if side.processes is not None:
            places = [seconds, self.folder / "work" / "model", rows / "rows.jsonl", self.folder / "peer"]
            arguments = [*map(str, places), str(LENGTH), str(side.processes)]
            return [sys.executable, "-c", PEER, *arguments], environment
        spec = {
            "model": {"uri": "hf://bench/model"},
            "dataset": {
                "sources": [{"uri": f"pvc://{rows.name}/rows.jsonl"}],
                "packing": "Enabled",
                "maxLength": LENGTH,
            },
            "training": {"epochs": 1},
        }
        job = {"name": "bench", "namespace": "bench", "uid": "1", "created": datetime.now(UTC).isoformat()}
        (self.folder / "job.json").write_text(json.dumps(job | {"spec": spec}))
        operator = self.folder / "former" / "operator" if side.former else OPERATOR
        environment |= {
            "FINETUNE_JOB": str(self.folder / "job.json"),
            "FINETUNE_WORKSPACE": str(self.folder / "work"),
            "FINETUNE_CLAIMS": str(self.folder / "claims"),
            "FINETUNE_REPORT": str(self.folder / "report.json"),
            "PYTHONPATH": os.pathsep.join((str(self.folder / "packages"), str(operator))),
        }
        return [sys.executable, "-S", "-c", OURS, str(seconds)], environment

    def result(self, side: Side) -> Path:
        return self.folder / ("peer" if side.processes is not None else "work/dataset/train")


def chats(count: int) -> Iterator[list[dict[str, str]]]:
    """Conversations of one to three questions and answers, of the words of a small corpus."""
    random_ = random.Random(0)
    words = CORPUS.split()

    def said(least: int, most: int) -> str:
        return " ".join(random_.choices(words, k=random_.randint(least, most)))

    for _ in range(count):
        turns = [(("user", said(5, 40)), ("assistant", said(10, 120))) for _ in range(random_.choice((1, 1, 1, 2, 3)))]
        yield [{"role": role, "content": content} for pair in turns for role, content in pair]


def examples(folder: Path) -> tuple[Counter[bytes], int]:
    """A digest of ids and labels of every example of packed rows, and the number of rows."""
    import datasets

    found: Counter[bytes] = Counter()
    rows = datasets.load_from_disk(str(folder)).with_format("numpy")
    for row in rows:
        ends = np.cumsum(row["seq_lengths"])
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            labels = row["labels"][start:end].astype("<i4")
            labels[0] = -100  # trl's collator does that
            found[hashlib.sha256(row["input_ids"][start:end].astype("<i4").tobytes() + labels.tobytes()).digest()] += 1
    return found, len(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs=2, default=(20_000, 100_000), help="the two sizes")
    parser.add_argument("--without-trl", action="store_true", help="only our builds and the limit")
    arguments = parser.parse_args()
    small, large = arguments.rows
    sides = SIDES[:1] if arguments.without_trl else SIDES
    FOLDER.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="data-", dir=FOLDER))
    try:
        place = Place(folder)
        place.prepare([small, large])
        measured: dict[str, dict[int, Measured]] = {}
        results = {}
        for side in sides:
            measured[side.name] = {small: place.run(side, small)}
            results[side.name] = examples(place.result(side))
            if side.processes is None:
                status = json.loads((folder / "work" / "dataset" / MANIFEST).read_text())["result"]
        ours, former = [measured[SIDES[0].name][small]], [place.run(BEFORE, small)]
        results[BEFORE.name] = examples(place.result(BEFORE))
        for _ in range(1, RUNS):
            ours.append(place.run(SIDES[0], small))
            former.append(place.run(BEFORE, small))
        measured[SIDES[0].name][small], before = best(ours), best(former)
        limit = place.limit(small)
        measured[SIDES[0].name][large] = place.run(SIDES[0], large)
        rows = [
            *table(measured, results, small, large),
            *progress(measured[SIDES[0].name][small], before, limit, small),
            _same(results, BEFORE.name),
        ]
        notes = [
            f"chats of 1 to 3 questions and answers, {status['tokens'] / status['examples']:.0f} tokens on average, "
            f"packed into rows of {LENGTH}; {os.cpu_count()} processors",
            "imports are not part of the time; memory is that of the process alone, not of trl's further processes",
            "anonymous memory: what cannot be dropped; pages of mapped files, which resident memory counts too, can",
        ]
        return 0 if write("data", rows, "load-dataset beside trl's preparation", notes) else 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table(
    measured: dict[str, dict[int, Measured]], results: dict[str, tuple[Counter[bytes], int]], small: int, large: int
) -> Iterator[Row]:
    ours = SIDES[0].name
    for name, runs in measured.items():
        for size, run in runs.items():
            yield Row(f"{name}, {size:,} rows", "rate", size / run.seconds, "rows/s")
            yield Row(f"{name}, {size:,} rows", "peak memory, anonymous", run.anonymous / 2**20, "MiB")
            yield Row(f"{name}, {size:,} rows", "peak memory, resident", run.resident / 2**20, "MiB")
        yield Row(f"{name}, {small:,} rows", "packed rows", results[name][1], "")
    for side in (side for side in SIDES[1:] if side.name in measured):
        name, goal = side.name, 1 if side.processes else 2  # with further processes trl tokenises on all processors
        faster = measured[name][small].seconds / measured[ours][small].seconds
        yield Row(f"ratio to {name}", "times faster", faster, "x", f"at least {goal}", faster >= goal)
        yield _same(results, name)
    growth = (measured[ours][large].anonymous - measured[ours][small].anonymous) / 2**20
    yield Row(ours, f"memory from {small:,} to {large:,} rows", growth, "MiB more", "at most 50", growth <= 50)


def progress(now: Measured, before: Measured, limit: tuple[float, float], size: int) -> Iterator[Row]:
    """Against the former build and the limit, on the same rows."""
    ours, (rendering, tokenising) = SIDES[0].name, limit
    yield Row(BEFORE.name, "rate", size / before.seconds, "rows/s")
    yield Row(BEFORE.name, "peak memory, anonymous", before.anonymous / 2**20, "MiB")
    yield Row(BEFORE.name, "time on processors", before.processors, "s")
    yield Row(ours, "time on processors", now.processors, "s")
    ratio, faster, less = f"ratio to {BEFORE.name}", before.seconds / now.seconds, before.processors / now.processors
    yield Row(ratio, "times faster", faster, "x", f"at least {FASTER}", faster >= FASTER)
    yield Row(ratio, "times less time on processors", less, "x")
    more = now.anonymous / before.anonymous
    yield Row(ratio, "memory, anonymous", more, "x", "at most 1.05", more <= 1.05)
    yield Row("rendering alone (transformers)", "rate", size / rendering, "rows/s")
    yield Row("tokenizers alone (the limit)", "rate", size / tokenising, "rows/s")
    yield Row(ours, "share of the limit", 100 * tokenising / now.seconds, "%")


def _same(results: dict[str, tuple[Counter[bytes], int]], name: str) -> Row:
    ours = SIDES[0].name
    same = results[name][0] == results[ours][0]
    return Row(f"{ours} and {name}", "same ids and labels", float(same), "", "equal", same)


if __name__ == "__main__":
    sys.exit(main())
