"""The report page says what the record says, loads nothing, and shows texts as they are."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from finetune.steps.save.charts import Series, chart
from finetune.steps.save.model_card import card
from finetune.steps.save.report import page

HISTORY: list[dict[str, float]] = [
    {"step": step, "loss": 4 / step, "learningRate": 1e-5 / step, "gradientNorm": 1.0}
    | ({"validationLoss": 5 / step} if step % 10 == 0 else {})
    for step in range(1, 41)
]
EVIL = "</script><script>alert(1)</script>"


def document(**training: Any) -> dict[str, Any]:
    """A record as `provenance` makes it."""
    return {
        "job": {"namespace": "team", "name": "answers", "uid": "1", "created": "2026-02-03T04:05:06+00:00"},
        "operator": "0.1.0",
        "base": {"uri": "hf://org/base", "revision": "main", "commit": "abc123"},
        "format": "Merged",
        "tokens": [{"content": "<think>", "id": 384, "init": "mean of its pieces"}],
        "vocabulary": {"added": 1, "vocabularySizeBefore": 384, "vocabularySize": 385,
                       "embeddingRowsBefore": 384, "embeddingRows": 448},
        "reload": {"message": "Why?", "probabilities": [
            {"token": "<think>", "withPrompt": 2.4e-8, "withPromptBefore": 3e-9, "withoutPrompt": 0.2}]},
        "dataset": {"sources": [{"uri": "pvc://data/rows.jsonl", "split": "train"}], "maxLength": 64, "examples": 90,
                    "validationExamples": 10, "tokens": 2000, "trainedTokens": 500, "truncated": 3, "dropped": 2},
        "training": {
            "hyperparameters": {"learningRate": 1e-5, "maxSteps": 40},
            "steps": 40, "examples": 90, "history": HISTORY, "seconds": 200.0, "tokens": 4000, "tokensPerSecond": 20.0,
            "peakMemoryBytes": 3 << 30, "resumptions": [], "exact": True, "changes": [],
            "environment": {"device": "cpu"},
            "checkpoints": {"written": 4, "stalledSeconds": 0.5, "bytes": 1 << 20},
        } | training,
        "weights": {"sha256": "ab" * 32},
    }  # fmt: skip


class Reader(HTMLParser):
    """Elements that are balanced, their attributes, and the text that is seen."""

    VOID = frozenset({"meta", "line", "path", "circle", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text.append(data)

    def seen(self) -> str:
        return " ".join(" ".join(self.text).split())


def test_the_page_loads_nothing() -> None:
    html = page(document())
    names = {(tag, name) for tag, name, _ in Reader(html).attributes}
    assert not names & {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src")}
    assert not re.search(r"url\(|@import|fetch\(|https?://", html)


def test_the_numbers_of_the_record_are_on_it() -> None:
    seen = Reader(page(document())).seen()
    for words in (
        "3 min 20 s", "40 90 examples", "384 → 448", "held-out loss 0.1250 from 0.5000", "2,000, of which 500 (25 %)",
        "4 written, 1.0 MiB each; training stood still for 0.5 s", "3.0e-09 2.4e-08", "3 shortened to 64 tokens, 2 not",
    ):  # fmt: skip
        assert words in seen, words


def test_after_training_a_tokens_chance_stands_beside_the_earlier_ones() -> None:
    trained = [{"token": "<think>", "withPrompt": 0.97, "withoutPrompt": None}]
    assert "<think> – 0.200 – 3.0e-09 2.4e-08 0.970" in Reader(page(document(probabilities=trained))).seen()


def test_each_attempt_says_how_it_ended_and_what_it_had_to_pass_over() -> None:
    entries = [
        {"start": "2026-01-01T00:00:00+00:00", "end": "2026-01-01T00:01:30+00:00", "resumedFromStep": 0,
         "passedOver": [], "reason": "Preempted", "message": "stopped on request after step 10"},
        {"start": "2026-01-01T00:02:00+00:00", "end": None, "resumedFromStep": 10, "passedOver": [],
         "reason": "Killed", "message": "ended without a word"},
        {"start": "2026-01-01T00:04:00+00:00", "resumedFromStep": 10, "passedOver": ["step-20 lacks the weights"]},
    ]  # fmt: skip
    seen = Reader(page(document(attempts=entries, resumptions=[10, 10]))).seen()
    assert "1 2026-01-01 00:00:00 UTC 1 min 30 s 0 Preempted stopped on request after step 10" in seen
    assert "2 2026-01-01 00:02:00 UTC – 10 Killed ended without a word" in seen
    assert "10 Succeeded step-20 lacks the weights" in seen
    assert "resumed 2×, bit-exact" in seen


def test_what_users_and_models_write_is_text_and_never_markup() -> None:
    samples = [{"prompt": EVIL, "before": EVIL, "after": "<think>5</think>"}]
    changed = document(samples=samples) | {"tokens": [{"content": EVIL, "id": 1, "init": ""}]}
    html = page(changed)
    assert EVIL not in html
    assert Reader(html).seen().count(EVIL) == 3
    assert "<think>5</think>" in Reader(html).seen()


def test_the_card_links_the_page_and_quotes_samples_whatever_they_hold() -> None:
    text = card(document(samples=[{"prompt": "Why?", "before": "", "after": "```\n# no heading\n```"}]))
    assert "[report page](report.html)" in text
    assert "````text\n```\n# no heading\n```\n````" in text
    assert "(nothing)" in text


def test_a_run_without_losses_has_a_page_without_curves() -> None:
    html = page(document(history=[]))
    assert "<figure" not in html.partition("<body>")[2].partition("<script>")[0]


def test_values_under_the_pointer_are_those_of_the_record() -> None:
    charts = [json.loads(value or "") for _, name, value in Reader(page(document())).attributes if name == "data-chart"]
    loss = {each["name"]: each["points"] for each in charts[0]["series"]}
    assert loss["each step"][:2] == [[1, 4.0], [2, 2.0]]
    assert loss["held-out rows"] == [[10, 0.5], [20, 0.25], [30, 0.16667], [40, 0.125]]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([3.0, 1.0], ["0", "1", "2", "3"]),
        ([1e-5, 0.0], ["0", "2.5e-6", "5e-6", "7.5e-6", "1e-5"]),
        ([0.0, 0.0], ["0", "1"]),
        ([12345.0, 1.0], ["0", "5,000", "1e+04", "1.5e+04"]),
    ],
)
def test_axes_have_round_numbers(values: list[float], labels: list[str]) -> None:
    drawn = chart([Series("x", "rate", list(enumerate(values, 1)))], 100)
    assert [label for _, label in drawn["ticks_y"]] == labels


def test_a_long_run_is_thinned_and_keeps_its_last_step() -> None:
    points = [(float(step), 1.0) for step in range(1, 100_001)]
    series = chart([Series("loss", "raw", points)], 100)["series"][0]
    assert len(series["points"]) <= 1_201
    assert series["points"][-1][0] == 100_000


def test_a_single_step_is_drawn() -> None:
    assert chart([Series("loss", "raw", [(1.0, 2.0)])], 100)["ticks_x"] == [(64.0, "1")]
