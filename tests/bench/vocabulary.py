"""`make bench-vocabulary`: what learning a vocabulary brings, what protecting English costs, and how fast it is.

SmolLM2's tokenizer is continued on Tang and Song poems (all but a held-out tenth), which it falls to bytes on; beside
it the naive way, the same pieces as added tokens. Then on a mix of poems and English, with and without protecting
another English text. At last on 100 MB, read from a file as the step does. Every learning is a process of its own,
whose peak of resident memory is all that it ever needed.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from rich.console import Console
from tokenizers import AddedToken, Tokenizer

from finetune.api.contract import Layout
from finetune.api.spec import TokenSource
from finetune.steps.tokens.learn.corpus import Corpus
from finetune.steps.tokens.learn.families import Continued
from finetune.steps.tokens.learn.held_out import changed, encoded, measured
from finetune.steps.tokens.learn.learning import Learned, learn
from finetune.steps.tokens.learn.parts import held_out_parts, training_parts
from tests import poems
from tests.bench.table import FOLDER, Row, write
from tests.models import smollm2

SIZES = (500, 1000, 2000, 4000)
MIXED_SIZE = 2000
LARGE = 100_000_000
MEBIBYTE = 1 << 20
console = Console()


@dataclass(frozen=True)
class Result:
    """What one learning came to, in characters per token of held-out poems; `after_on_all` is about a tenth of all text
    that it was given."""

    pieces: int
    seconds: float
    processor: float
    peak: int
    before: float
    after: float
    after_on_all: float
    as_added: float
    changed_texts: int
    protected: int | None
    whole: bool


def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(smollm2() / "tokenizer.json"))


def english() -> list[str]:
    """What the installed packages say about themselves, and their licences, in the order of their names."""
    found: list[str] = []
    for item in sorted(importlib.metadata.distributions(), key=lambda item: str(item.metadata["Name"]).lower()):
        found.append(str(item.metadata.get_payload() or item.metadata.get("Description") or ""))
        licences = [file for file in item.files or () if file.name.upper().startswith(("LICEN", "COPYING", "NOTICE"))]
        found += [Path(str(file.locate())).read_text("utf-8", "replace") for file in sorted(licences)]
    return list(dict.fromkeys(text for text in found if len(text) > 500))


def learned_english() -> list[str]:
    """A part that is learned from: about as much as the poems have characters."""
    return english()[:40]


def protected_english() -> list[str]:
    """Another part, of 1 MB at least, with Python's language reference."""
    return [text for _, text in sorted(topics.items())] + english()[40:]


def in_own_process(task: Any, *arguments: Any) -> Result:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        result: Result = pool.submit(task, *arguments).result()
        return result


def on_poems(size: int, with_english: bool, protect: bool) -> Result:
    """Learn from poems (and English), measure on the tenth of the poems that was held out."""
    corpus = poems.written()
    texts = [*training_parts(corpus), *(learned_english() if with_english else [])]
    protected = protected_english()
    started = time.perf_counter()
    found = learn(tokenizer(), texts, protected if protect else None, size, 2)
    return _judged(found, started, list(held_out_parts(corpus)), protected)


def on_file(folder: str) -> Result:
    """Learn from 100 MB in a file, read in the step's way."""
    layout = Layout(claims=Path(folder))
    started = time.perf_counter()
    corpus = Corpus(TokenSource(uri="pvc://corpus/large.jsonl"), layout, Path(folder) / "cache", "source")
    found = learn(tokenizer(), corpus, None, 4_000, 2)
    return _judged(found, started, [], [])


def _judged(found: Learned, started: float, held_out: list[str], protected: list[str]) -> Result:
    seconds = time.perf_counter() - started
    usage = resource.getrusage(resource.RUSAGE_SELF)
    before = tokenizer()
    continued = Continued.of(before)
    poem = measured(held_out, continued, found.tokenizer) if held_out else found.held_out
    back = [
        found.tokenizer.decode(ids, skip_special_tokens=False) == text
        for text, ids in zip(held_out, encoded(found.tokenizer, held_out), strict=True)
    ]
    return Result(
        pieces=len(found.pieces),
        seconds=seconds,
        processor=usage.ru_utime + usage.ru_stime,
        peak=usage.ru_maxrss * 1024,
        before=poem.characters / poem.before,
        after=poem.characters / poem.after,
        after_on_all=found.held_out.characters / found.held_out.after,
        as_added=poem.characters / measured(held_out, continued, as_added_tokens(found)).after if held_out else 0.0,
        changed_texts=sum(1 for _ in changed(protected, before, found.tokenizer)),
        protected=found.protected,
        whole=all(back),
    )


def as_added_tokens(found: Learned) -> Tokenizer:
    """The naive way: the same pieces, each an added token that is cut out wherever its text occurs. Parts of
    characters cannot be had that way."""
    naive = tokenizer()
    contents = [found.content(piece) for piece in found.pieces]
    whole = [text for text, piece in zip(contents, found.pieces, strict=True) if text != piece.name or text.isascii()]
    naive.add_tokens([AddedToken(text, normalized=False) for text in whole])
    return naive


def generate(path: Path, size: int) -> None:
    """Text of about so many bytes, half of it Chinese (a chain over the poems' characters: hardly a word comes twice,
    which is the hardest case), half English (a chain over words), the same on every machine with the same packages."""
    draw = random.Random(0)
    chains = [chain("".join(poems.at_hand()), ""), chain(" ".join(learned_english()).split(" "), " ")]
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            for walk, length in zip(chains, (650, 320), strict=True):
                line = json.dumps({"text": walk(draw, length)}, ensure_ascii=False) + "\n"
                file.write(line)
                written += len(line.encode())


def chain(units: Iterable[str], joint: str) -> Any:
    """A walk over units, each followed by what followed it somewhere in the text."""
    followers: dict[str, list[str]] = {}
    for unit, following in pairwise(units):
        followers.setdefault(unit, []).append(following)
    beginnings = list(followers)

    def walk(draw: random.Random, length: int) -> str:
        unit, walked = draw.choice(beginnings), []
        for _ in range(length):
            walked.append(unit)
            unit = draw.choice(followers.get(unit) or beginnings)
        return joint.join(walked)

    return walk


def size_rows(size: int, result: Result) -> Iterator[Row]:
    case = partial(Row, f"poems, {size:,} new ids")
    yield case("characters per token before", result.before, "")
    yield case("after", result.after, "", "more than as added tokens", result.after > result.as_added)
    yield case("the same pieces as added tokens", result.as_added, "")
    yield case("learned", result.pieces, "ids")
    yield case("held-out text comes back", float(result.whole), "", "whole", result.whole)
    yield case("time", result.seconds, "s")
    yield case("peak memory", result.peak / MEBIBYTE, "MiB")


def mixed_rows(free: Result, kept: Result, characters: int) -> Iterator[Row]:
    for name, result in (("unprotected", free), ("protected", kept)):
        case = partial(Row, f"poems and English, {MIXED_SIZE:,} ids, {name}")
        same = result.changed_texts == 0
        yield case("characters per token on held-out poems", result.after, "")
        yield case("on a held-out tenth of both", result.after_on_all, "")
        yield case(
            "English texts encoded differently", result.changed_texts, "", *(("none", same) if result is kept else ())
        )
        yield case("learned", result.pieces, "ids")
        yield case("time", result.seconds, "s")
        yield case("peak memory", result.peak / MEBIBYTE, "MiB")
    case = partial(Row, "protection")
    yield case("protected text", characters / 1e6, "MB", "at least 1", characters >= 1e6)
    yield case("cost on held-out poems", 100 * (1 - kept.after / free.after), "%")
    yield case("cost on the held-out tenth of both", 100 * (1 - kept.after_on_all / free.after_on_all), "%")


def large_rows(result: Result, size: int) -> Iterator[Row]:
    case = partial(Row, f"{size / 1e6:.0f} MB, 4,000 new ids")
    yield case("time", result.seconds, "s", "under 120", result.seconds < 120)
    yield case("processor time, all threads", result.processor, "s")
    yield case("peak memory", result.peak / MEBIBYTE, "MiB", "under 2,048", result.peak < 2048 * MEBIBYTE)
    yield case("characters per token before", result.before, "")
    yield case("after", result.after, "")


def main() -> int:
    try:
        poems.download()
        corpus = poems.written()
    except poems.NoPackage as error:
        console.print(f"[bold red]error:[/] the poems cannot be had: {error}", highlight=False)
        console.print("Install the package, or run where its archive can be reached.")
        return 1
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    rows: list[Row] = []
    for size in SIZES:
        rows += size_rows(size, in_own_process(on_poems, size, False, False))
    characters = sum(map(len, protected_english()))
    free, kept = (in_own_process(on_poems, MIXED_SIZE, True, protect) for protect in (False, True))
    rows += mixed_rows(free, kept, characters)
    FOLDER.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="vocabulary-", dir=FOLDER))
    try:
        large = folder / "corpus/large.jsonl"
        large.parent.mkdir()
        generate(large, LARGE)
        rows += large_rows(in_own_process(on_file, str(folder)), large.stat().st_size)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    notes = [
        f"SmolLM2's tokenizer (49,152 ids); {len(corpus)} poems of {poems.PACKAGE}, {sum(map(len, corpus)):,} "
        f"characters, a tenth of them held out; {os.cpu_count()} processors",
        "time and memory of a process: the tokenizer read, the corpus encoded, pieces found, the result measured",
        "protected: Python's language reference and the packages' descriptions, without those that are learned from",
        "100 MB: generated, half Chinese and half English, read by the library that reads datasets",
    ]
    return 0 if write("vocabulary", rows, "Vocabulary learning", notes) else 1


if __name__ == "__main__":
    sys.exit(main())
