"""Which rows of the user's files a broken batch comes from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from finetune.steps.dataset.step import run as load_dataset
from finetune.steps.train.data.culprits import Culprits
from finetune.steps.train.data.examples import Collator, Examples
from finetune.steps.train.plan import Plan
from tests.unit.steps.flow import Workshop

NUMBERS = [{"prompt": f"{number} plus one is", "completion": f" {number + 1}."} for number in range(6)]
TOO_LONG = {"prompt": "on and on", "completion": " and on" * 200}
WORDS = [{"text": f"The word number {number} is long."} for number in range(4)]


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    made = Workshop.at(tmp_path)
    made.write("numbers.jsonl", [NUMBERS[0], TOO_LONG, *NUMBERS[1:]])
    made.write("words.jsonl", WORDS)
    return made


def loaded(workshop: Workshop, **dataset: Any) -> tuple[Examples, Culprits]:
    sources = [{"uri": f"pvc://data/{name}.jsonl"} for name in ("numbers", "words")]
    job = workshop.job(dataset={"sources": sources, "maxLength": 64} | dataset)
    load_dataset(job, workshop.layout)
    examples = Examples(workshop.layout.dataset / "train")
    plan = Plan.of(job, workshop.layout)
    return examples, Culprits(examples, plan.model, plan.sources)


def row_of(text: str, examples: Examples, culprits: Culprits) -> int:
    """The row of the training data that begins with a text, by what is said of every row."""
    (row,) = (row for row in range(len(examples)) if f"({text!r}"[:-1] in culprits.named([row]))
    return row


def test_rows_have_the_numbers_that_they_have_in_the_users_files(workshop: Workshop) -> None:
    """Of two sources, mixed; one has a row that gave no example."""
    examples, culprits = loaded(workshop)
    wanted = ("3 plus one is 4.", "The word number 2")
    batch = [examples[row_of(text, examples, culprits)] for text in wanted]
    said = culprits.sentence([Collator(0)(batch)])
    assert "row 5 of train in pvc://data/numbers.jsonl; row 3 of train in pvc://data/words.jsonl" in said


def test_of_a_packed_row_all_examples_are_named(workshop: Workshop) -> None:
    examples, culprits = loaded(workshop, packing="Enabled")
    assert len(examples) < len(NUMBERS)
    named = {"numbers": [], "words": []}
    for row in range(len(examples)):
        for numbers, source in re.findall(r"rows? ([\d, ]+) of train in pvc://data/(\w+)", culprits.named([row])):
            named[source] += map(int, numbers.split(", "))
    assert sorted(named["numbers"]) == [1, 3, 4, 5, 6, 7]
    assert sorted(named["words"]) == [1, 2, 3, 4]


def test_pairs_are_named_once(workshop: Workshop) -> None:
    pairs = [
        {"prompt": f"{number} plus one is", "chosen": f" {number + 1}.", "rejected": " no."} for number in range(4)
    ]
    workshop.write("rows.jsonl", pairs)
    job = workshop.job(training={"objective": "Preference", "maxSteps": 2})
    load_dataset(job, workshop.layout)
    examples = Examples(workshop.layout.dataset / "train")
    plan = Plan.of(job, workshop.layout)
    said = Culprits(examples, plan.model, plan.sources).named([1, 3])
    assert said.startswith("; in question: rows 2, 4 of train in pvc://data/rows.jsonl ('1 plus one is 2.")


def test_many_rows_are_counted(workshop: Workshop) -> None:
    workshop.write("numbers.jsonl", NUMBERS * 4)
    examples, culprits = loaded(workshop)
    said = culprits.named(range(len(examples)))
    assert said.startswith(
        "; in question: rows 1, 2, 3, 4, 5, 6, 7, 8 of train in pvc://data/numbers.jsonl and 20 more ("
    )
