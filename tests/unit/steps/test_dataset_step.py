"""load-dataset as a whole: what it reads, what it writes, what it says when it cannot."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from finetune.api.contract import ExitCode, StepJob
from finetune.api.status import DatasetStatus
from finetune.steps.dataset.step import run
from finetune.steps.rows import file_checks
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.workspace.end_tokens import EndToken, read_end_tokens
from finetune.steps.workspace.token_record import TokenRecord, write_record
from tests.unit.steps.flow import CREATED, Workshop

QUESTION = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Air."}]
ROWS = [{"prompt": f"{number} plus one is", "completion": f" {number + 1}."} for number in range(40)]


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop.at(tmp_path)


def load(workshop: Workshop, job: StepJob) -> dict[str, Any]:
    result = run(job, workshop.layout).result
    assert result is not None
    DatasetStatus.model_validate({key: value for key, value in result.items() if key != "reused"})
    return result


def texts(workshop: Workshop, part: str = "train") -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(workshop.layout.model)
    return [tokenizer.decode(ids) for ids in datasets.load_from_disk(workshop.layout.dataset / part)["input_ids"]]


def refusal(workshop: Workshop, job: StepJob) -> StepFailure:
    with pytest.raises(StepFailure) as failure:
        run(job, workshop.layout)
    assert not workshop.layout.dataset.exists()
    return failure.value


CHAT = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nAir.<|im_end|>\n"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": QUESTION},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Air."}]},
        {"conversations": [{"from": "user", "content": "Why?"}, {"from": "assistant", "content": "Air."}]},
        {"prompt": QUESTION[:1], "completion": QUESTION[1:]},
        {"instruction": "Why?", "output": "Air."},
        {"instruction": "Why?", "input": "", "output": "Air.", "id": 7},
        {"messages": [message | {"weight": number} for number, message in enumerate(QUESTION)]},
    ],
    ids=[
        "messages",
        "from and value",
        "from and content",
        "conversational prompt",
        "instruction",
        "empty input",
        "more",
    ],
)
def test_a_question_is_the_same_in_every_format(workshop: Workshop, row: dict[str, Any]) -> None:
    workshop.write("rows.jsonl", [row])
    assert load(workshop, workshop.job())["examples"] == 1
    assert texts(workshop) == [CHAT]


def test_the_instructions_input_follows_the_question(workshop: Workshop) -> None:
    workshop.write("rows.jsonl", [{"instruction": "Add.", "input": "2, 3", "output": "5"}])
    load(workshop, workshop.job())
    assert "user\nAdd.\n\n2, 3<|im_end|>" in texts(workshop)[0]


def test_a_template_makes_a_conversation_of_any_columns(workshop: Workshop) -> None:
    workshop.write("rows.jsonl", [{"q": "Why?", "reasoning": "Light.", "a": "Air."}])
    template = {"user": "{{ q }}", "assistant": "<think>{{ reasoning }}</think>{{ a }}"}
    result = load(workshop, workshop.job({"template": template}))
    assert texts(workshop) == [CHAT.replace("Air.", "<think>Light.</think>Air.")]
    assert result["trainedTokens"] < result["tokens"]


def test_a_template_makes_text_all_of_which_is_learned(workshop: Workshop) -> None:
    workshop.write("rows.jsonl", [{"title": "Sky", "body": "It is blue."}])
    result = load(workshop, workshop.job({"template": {"text": "{{ title }}: {{ body }}"}}))
    assert texts(workshop) == ["Sky: It is blue.<|im_end|>"]
    assert result["trainedTokens"] == result["tokens"] - 1


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "folder", "csv.gz", "data"])
def test_every_file_format_gives_the_same_ids(workshop: Workshop, kind: str) -> None:
    claim = workshop.layout.claims / "data"
    rows = datasets.Dataset.from_list(ROWS)
    match kind:
        case "jsonl" | "folder":
            (claim / "folder").mkdir()
            workshop.write("folder/train.jsonl", ROWS)
        case "json":
            (claim / "rows.json").write_text(json.dumps(ROWS))
        case "csv":
            rows.to_csv(claim / "rows.csv")
        case "parquet":
            rows.to_parquet(claim / "rows.parquet")
        case "tsv":
            rows.to_csv(claim / "rows.tsv", sep="\t")
        case "csv.gz":
            rows.to_csv(claim / "plain.csv")
            (claim / "rows.csv.gz").write_bytes(gzip.compress((claim / "plain.csv").read_bytes()))
        case "data":
            workshop.write("rows.data", ROWS)
    place = {"jsonl": "folder/train.jsonl", "folder": "folder"}.get(kind, f"rows.{kind}")
    said = {"fileFormat": "JSONL"} if kind == "data" else {}
    load(workshop, workshop.job({"uri": f"pvc://data/{place}"} | said))
    assert texts(workshop) == [row["prompt"] + row["completion"] + "<|im_end|>" for row in ROWS]


def test_every_paragraph_of_a_plain_text_is_a_row(workshop: Workshop) -> None:
    poems = "The sky\nis blue.\n\nAir scatters\r\nshort waves.\n"
    (workshop.layout.claims / "data" / "poems.txt").write_bytes(poems.encode())
    result = load(workshop, workshop.job({"uri": "pvc://data/poems.txt"}))
    assert texts(workshop) == ["The sky\nis blue.<|im_end|>", "Air scatters\nshort waves.\n<|im_end|>"]
    assert result["sources"] == [{"format": "Text", "rows": 2, "examples": 2}]


def test_a_json_array_is_read_row_by_row(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_checks, "BLOCK", 7)
    rows = [{"text": f'Row {number}: "äé", [1, {{2}}] \\ end'} for number in range(20)]
    for indent in (None, 2):
        (workshop.layout.claims / "data" / "rows.json").write_text(json.dumps(rows, indent=indent))
        load(workshop, workshop.job({"uri": "pvc://data/rows.json"}))
        assert texts(workshop) == [f"{row['text']}<|im_end|>" for row in rows]


def test_the_format_that_is_said_wins_over_the_columns(workshop: Workshop) -> None:
    workshop.write("rows.jsonl", [{"messages": QUESTION, "text": "The sky is blue."}])
    result = load(workshop, workshop.job({"format": "Text"}))
    assert texts(workshop) == ["The sky is blue.<|im_end|>"]
    assert result["sources"][0]["format"] == "Text"


def write_two_sources(workshop: Workshop) -> list[dict[str, Any]]:
    workshop.write("own.jsonl", [{"text": f"own {number}"} for number in range(60)])
    workshop.write("general.jsonl", [{"prompt": f"general {number}", "completion": " yes"} for number in range(100)])
    return [{"uri": "pvc://data/own.jsonl"}, {"uri": "pvc://data/general.jsonl"}]


def test_sources_are_mixed_by_weight_whatever_their_formats(workshop: Workshop) -> None:
    own, general = write_two_sources(workshop)
    result = load(workshop, workshop.job(dataset={"sources": [own | {"weight": 3}, general | {"weight": 1}]}))
    assert result["sources"] == [
        {"format": "Text", "rows": 60, "examples": 60},
        {"format": "PromptCompletion", "rows": 100, "examples": 20},
    ]
    assert Counter(text.split()[0] for text in texts(workshop)) == {"own": 60, "general": 20}


def test_a_small_source_is_repeated_up_to_its_limit(workshop: Workshop) -> None:
    own, general = write_two_sources(workshop)
    sources = [own | {"weight": 1, "maxRepeats": 2}, general | {"weight": 1}]
    assert load(workshop, workshop.job(dataset={"sources": sources}))["examples"] == 200
    uses = Counter(text for text in texts(workshop) if text.startswith("own"))
    assert (len(uses), set(uses.values())) == (60, {1, 2})


def test_buckets_keep_each_sources_order_from_bin_to_bin(workshop: Workshop) -> None:
    sources = write_two_sources(workshop)
    load(workshop, workshop.job(dataset={"sources": sources, "buckets": 10}))
    words = [text.removesuffix("<|im_end|>").split() for text in texts(workshop)]
    for bucket in range(10):
        part = words[16 * bucket : 16 * bucket + 16]
        numbers = {
            kind: sorted(int(number) for name, number, *_ in part if name == kind) for kind in ("own", "general")
        }
        assert numbers == {
            "own": list(range(6 * bucket, 6 * bucket + 6)),
            "general": list(range(10 * bucket, 10 * bucket + 10)),
        }


def test_every_bucket_has_its_share_of_every_category(workshop: Workshop) -> None:
    rows = [{"source": "", "target": f"{kind} {n}", "category": kind} for kind in ("sky", "sea") for n in range(20)]
    workshop.write("rows.jsonl", rows)
    load(workshop, workshop.job(dataset={"buckets": 4}))
    kinds = [text.split()[0] for text in texts(workshop)]
    assert [Counter(kinds[start : start + 10]) for start in range(0, 40, 10)] == [{"sky": 5, "sea": 5}] * 4


def test_a_source_of_its_own_is_validated_on_and_never_trained_on(workshop: Workshop) -> None:
    own, general = write_two_sources(workshop)
    result = load(workshop, workshop.job(dataset={"sources": [own], "validation": {"source": general}}))
    assert (result["examples"], result["validationExamples"]) == (60, 100)
    assert {text.split()[0] for text in texts(workshop)} == {"own"}
    assert [text.split()[1] for text in texts(workshop, "validation")] == [str(number) for number in range(100)]


def test_a_fraction_is_held_out_of_every_source(workshop: Workshop) -> None:
    sources = write_two_sources(workshop)
    result = load(workshop, workshop.job(dataset={"sources": sources, "validation": {"fraction": 0.1}}))
    assert (result["examples"], result["validationExamples"]) == (144, 16)
    assert Counter(text.split()[0] for text in texts(workshop, "validation")) == {"own": 6, "general": 10}
    assert not set(texts(workshop)) & set(texts(workshop, "validation"))


def test_packed_rows_hold_the_same_examples_one_after_the_other(workshop: Workshop) -> None:
    workshop.write("rows.jsonl", ROWS)
    plain = load(workshop, workshop.job())
    alone = datasets.load_from_disk(workshop.layout.dataset / "train")
    expected = sorted((row["input_ids"], row["labels"]) for row in alone)
    result = load(workshop, workshop.job(dataset={"packing": "Enabled", "maxLength": 64}))
    found = []
    rows = datasets.load_from_disk(workshop.layout.dataset / "train")
    for row in rows:
        start = 0
        for length in row["seq_lengths"]:
            found.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
            start += length
        assert start == len(row["input_ids"]) == len(row["labels"]) <= 64
    assert sorted(found) == expected
    assert (result["examples"], result["packedRows"]) == (40, len(rows))
    assert len(rows) < 15
    assert (result["tokens"], result["trainedTokens"]) == (plain["tokens"], plain["trainedTokens"])


def test_the_first_label_of_every_packed_example_is_ignored(workshop: Workshop) -> None:
    workshop.write("rows.jsonl", [{"text": "The sky is blue."}] * 4)
    load(workshop, workshop.job(dataset={"packing": "Enabled", "mask": "Colossal", "maxLength": 256}))
    (row,) = datasets.load_from_disk(workshop.layout.dataset / "train")
    start = 0
    for length in row["seq_lengths"]:
        assert row["labels"][start : start + length] == [-100, *row["input_ids"][start + 1 : start + length]]
        start += length


def test_packing_a_model_that_cannot_isolate_is_refused_before_a_row_is_read(workshop: Workshop) -> None:
    (workshop.layout.model / "config.json").write_text('{"model_type": "mamba"}')
    failure = refusal(workshop, workshop.job(dataset={"packing": "Enabled"}))
    assert (failure.error.reason, failure.error.hint) == ("PackingNotPossible", "Use packing: Disabled.")


def test_ids_and_labels_are_32_bit(workshop: Workshop) -> None:
    workshop.write("rows.jsonl", ROWS)
    load(workshop, workshop.job())
    features = datasets.load_from_disk(workshop.layout.dataset / "train").features
    assert {name: feature.feature.dtype for name, feature in features.items()} == {
        "input_ids": "int32",
        "labels": "int32",
    }


def test_the_split_is_sliced_as_datasets_does(workshop: Workshop) -> None:
    workshop.write("rows.jsonl", ROWS)
    load(workshop, workshop.job({"split": "train[10%:20%]"}))
    assert [text.split()[0] for text in texts(workshop)] == ["4", "5", "6", "7"]


def test_the_held_out_rows_are_those_of_train_test_split(workshop: Workshop) -> None:
    workshop.write("rows.jsonl", ROWS)
    job = workshop.job(dataset={"validation": {"fraction": 0.1}}, training={"maxSteps": 1, "seed": 7})
    result = load(workshop, job)
    expected = datasets.Dataset.from_list(ROWS).train_test_split(test_size=0.1, seed=7)
    assert (result["examples"], result["validationExamples"]) == (36, 4)
    for part, name in (("train", "train"), ("validation", "test")):
        assert [text.split(" plus")[0] for text in texts(workshop, part)] == [
            row["prompt"].split(" plus")[0] for row in expected[name]
        ]


def test_the_digest_depends_on_ids_and_labels_alone(workshop: Workshop, tmp_path: Path) -> None:
    workshop.write("rows.jsonl", ROWS)
    first = load(workshop, workshop.job())["digest"]
    other = Workshop.at(tmp_path / "other")
    other.write("rows.jsonl", ROWS)
    assert load(other, other.job())["digest"] == first
    changed = Workshop.at(tmp_path / "changed")
    changed.write("rows.jsonl", [*ROWS[:-1], {"prompt": "39 plus", "completion": " one is 40."}])
    assert load(changed, changed.job())["digest"] != first


def test_a_second_run_does_nothing_and_says_so(workshop: Workshop) -> None:
    workshop.write("rows.jsonl", ROWS)
    first = load(workshop, workshop.job())
    written = (workshop.layout.dataset / "train" / "state.json").stat().st_mtime_ns
    assert load(workshop, workshop.job()) == first | {"reused": True}
    assert (workshop.layout.dataset / "train" / "state.json").stat().st_mtime_ns == written


def test_a_changed_file_is_read_again(workshop: Workshop) -> None:
    workshop.write("rows.jsonl", ROWS)
    load(workshop, workshop.job())
    workshop.write("rows.jsonl", ROWS[:5])
    assert load(workshop, workshop.job())["examples"] == 5


def test_the_jobs_date_matters_only_to_templates_that_print_it(workshop: Workshop) -> None:
    workshop.write("rows.jsonl", [{"messages": QUESTION}])
    later = workshop.job().model_copy(update={"created": CREATED + timedelta(days=1)})
    load(workshop, workshop.job())
    assert load(workshop, later)["reused"] is True
    template = workshop.layout.model / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + template.read_text())
    first = load(workshop, workshop.job())["digest"]
    assert load(workshop, later)["digest"] != first


def test_nothing_but_the_dataset_stays(workshop: Workshop) -> None:
    workshop.write("rows.jsonl", ROWS)
    load(workshop, workshop.job(dataset={"validation": {"fraction": 0.1}}))
    assert {path.name for path in workshop.layout.dataset.iterdir()} == {
        "train",
        "validation",
        "end_tokens.json",
        "parts.json",
        "finetune-manifest.json",
    }


def test_new_tokens_that_never_occur_are_named(workshop: Workshop) -> None:
    tokenizer = AutoTokenizer.from_pretrained(workshop.layout.model)
    tokenizer.add_tokens(["<think>", "<never>"])
    tokenizer.save_pretrained(workshop.layout.model)
    workshop.write("rows.jsonl", [{"prompt": "Why?", "completion": "<think>Air."}])
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<think>", "<never>")}
    write_record(workshop.layout.model, [TokenRecord(token, ids[token], False, False, {}) for token in ids])
    assert load(workshop, workshop.job())["unusedTokens"] == ["<never>"]


def test_rows_without_an_answer_and_over_long_ones_are_counted(workshop: Workshop) -> None:
    long = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Air. " * 50}]
    workshop.write("rows.jsonl", [{"messages": QUESTION}, {"messages": QUESTION[:1]}, {"messages": QUESTION + long}])
    result = load(workshop, workshop.job(dataset={"maxLength": 64}))
    assert (result["examples"], result["dropped"], result["truncated"]) == (2, 1, 1)
    assert (result["droppedBy"], result["truncatedBy"]) == ({"NothingToLearn": 1}, {"LostTurns": 1})
    assert texts(workshop) == [CHAT, CHAT]


def test_a_template_that_names_a_missing_column_says_which_columns_there_are(workshop: Workshop) -> None:
    workshop.write("rows.jsonl", [{"question": "Why?", "answer": "Air."}])
    job = workshop.job({"template": {"user": "{{ question }}", "assistant": "{{ anwser }}"}})
    failure = refusal(workshop, job)
    assert failure.code == ExitCode.BAD_CONFIGURATION
    assert failure.error.reason == "MissingColumn"
    assert "spec.dataset.sources[0].template.assistant" in failure.error.message
    assert "anwser" in failure.error.message
    assert failure.error.hint == "The columns are: question, answer."


@pytest.mark.parametrize(
    "template",
    [
        "{{ question.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ question | attr('__class__') }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ '%s' | format(question.__class__) }}",
        "{{ '{0.__class__}'.format(question) }}",
        "{% for _ in range(10000000) %}x{% endfor %}",
        "{{ lipsum() }}",
        "{% include 'secret' %}",
    ],
)
def test_a_hostile_template_is_refused(workshop: Workshop, template: str) -> None:
    workshop.write("rows.jsonl", [{"question": "Why?"}])
    failure = refusal(workshop, workshop.job({"template": {"user": "{{ question }}", "assistant": template}}))
    assert failure.code in (ExitCode.BAD_CONFIGURATION, ExitCode.BAD_DATA)
    assert "spec.dataset.sources[0].template.assistant" in failure.error.message


def test_a_null_column_is_not_learned_as_the_word_none(workshop: Workshop) -> None:
    workshop.write("rows.jsonl", [{"q": "Why?", "a": "Air."}, {"q": "How?", "a": None}])
    failure = refusal(workshop, workshop.job({"template": {"user": "{{ q }}", "assistant": "{{ a }}"}}))
    assert failure.error.reason == "MalformedRow"
    assert "row 2" in failure.error.message


MIXED = [{"messages": QUESTION}, {"prompt": "Why?", "completion": " Air."}]


def refused(rows: list[Any], source: dict[str, Any] | None = None, **dataset: Any) -> Any:
    return (rows, source, dataset)


@pytest.mark.parametrize(
    ("case", "code", "reason", "words"),
    [
        (refused([{"text": "a"}, '{"text": "b']), ExitCode.BAD_DATA, "MalformedRow", "line 2 of rows.jsonl"),
        (refused([{"text": "a"}, "[1, 2]"]), ExitCode.BAD_DATA, "MalformedRow", "line 2 of rows.jsonl"),
        (refused([{"text": "a"}, {"text": 5}]), ExitCode.BAD_DATA, "MalformedRow", "row 2 of train: column text"),
        (
            refused([{"messages": QUESTION}, {"messages": [{"role": "user"}]}]),
            ExitCode.BAD_DATA,
            "MalformedRow",
            "row 2 of train: messages[0] has nothing as content",
        ),
        (
            refused([{"messages": [{"role": "judge", "content": "No."}]}]),
            ExitCode.BAD_DATA,
            "MalformedRow",
            "row 1 of train: messages[0] has the role 'judge'",
        ),
        (
            refused([{"messages": QUESTION, "weight": 1}, {"messages": QUESTION, "weight": 0.5}]),
            ExitCode.BAD_DATA,
            "MalformedRow",
            "row 2 of train: column weight holds 0.5, and rows are learned whole",
        ),
        (refused([{"text": "a", "train": False}]), ExitCode.BAD_DATA, "MalformedRow", "column train holds False"),
        (refused([]), ExitCode.BAD_DATA, "EmptyDataset", "pvc://data/rows.jsonl has no rows"),
        (refused(ROWS, {"split": "train[5:5]"}), ExitCode.BAD_DATA, "EmptyDataset", "has no rows in train[5:5]"),
        (refused([{"words": "a"}]), ExitCode.BAD_CONFIGURATION, "UnknownFormat", "the columns words"),
        (refused(ROWS, {"split": "dev"}), ExitCode.BAD_CONFIGURATION, "UnknownSplit", "['train']"),
        (refused(ROWS, {"uri": "pvc://data/none.jsonl"}), ExitCode.NO_INPUT, "DatasetNotFound", "none.jsonl"),
        (refused(ROWS, {"uri": "pvc://data/rows.bin"}), ExitCode.NO_INPUT, "DatasetNotFound", "rows.bin"),
        (
            refused([{"text": "The quick brown fox jumps over the lazy dog."}] * 3, maxLength=8),
            ExitCode.BAD_DATA,
            "NothingToTrainOn",
            "none of its 3 rows gives an example with a learned token within maxLength 8 (dropped: 3 TooLong; "
            "the shortest that is too long has",
        ),
        (refused(MIXED), ExitCode.BAD_DATA, "MixedFormats", "row 2 of train is PromptCompletion (prompt, completion)"),
        (
            refused([{"text": "a"}], {"format": "Messages"}),
            ExitCode.BAD_CONFIGURATION,
            "MissingColumn",
            "needs the columns messages; conversations; conversation; the rows have text",
        ),
        (
            refused([{"text": "a"}], validation={"source": {"uri": "pvc://data/none.jsonl"}}),
            ExitCode.NO_INPUT,
            "DatasetNotFound",
            "spec.dataset.validation.source.uri: pvc://data/none.jsonl",
        ),
        (
            refused([{"text": "a b"}], validation={"fraction": 0.5}),
            ExitCode.BAD_CONFIGURATION,
            "TooFewRows",
            "spec.dataset.validation.fraction",
        ),
        (
            refused([{"a": 1}], {"template": {"text": "{{ a"}}),
            ExitCode.BAD_CONFIGURATION,
            "InvalidTemplate",
            "spec.dataset.sources[0].template.text, line 1",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_with_place_and_remedy(
    workshop: Workshop, case: Any, code: ExitCode, reason: str, words: str
) -> None:
    rows, source, dataset = case
    workshop.write("rows.jsonl", rows)
    failure = refusal(workshop, workshop.job(source, dataset))
    assert (failure.code, failure.error.reason) == (code, reason), failure.error
    assert words in failure.error.message
    assert failure.error.hint


def test_a_column_that_only_shares_its_name_with_a_mark_is_named_as_unused(workshop: Workshop) -> None:
    rows = [{"text": text, "loss": 0.25, "train": "yes", "weight": 1} for text in ("a b", "c d")]
    workshop.write("rows.jsonl", rows)
    (unused,) = load(workshop, workshop.job())["unusedFields"]
    assert all(name in unused for name in ("loss", "train", "weight")), unused


LATIN = "café".encode("latin-1")


@pytest.mark.parametrize(
    ("files", "reason", "words"),
    [
        (
            {"rows.jsonl": b'{"text": "a"}\n{"text": "' + LATIN + b'"}\n'},
            "NotUtf8",
            "line 2 of rows.jsonl",
        ),
        ({"rows.json": b'[{"text": "a"},\n{"text": "' + LATIN + b'"}]'}, "NotUtf8", "line 2 of rows.json is not UTF-8"),
        ({"rows.csv": b"text\na\n" + LATIN + b"\n"}, "NotUtf8", "line 3 of rows.csv is not UTF-8"),
        ({"rows.txt": b"a\n\n" + LATIN + b"\n"}, "NotUtf8", "line 3 of rows.txt is not UTF-8"),
        ({"rows.json": b'[{"text": "a"},\n{"text": }]'}, "MalformedRow", "row 2, from line 2 of rows.json on"),
        (
            {"rows.json": b'[{"text": "a"},\n{"text": "b"}\n'},
            "MalformedRow",
            "line 3 of rows.json, after row 2",
        ),
        ({"rows.json": b'[{"text": "a"}, 7]'}, "MalformedRow", "row 2, on line 1 of rows.json, is no JSON object"),
        ({"rows.json": b"[ ]"}, "EmptyDataset", "has no rows"),
        ({"rows.csv": b"text\n"}, "EmptyDataset", "has no rows"),
        ({"rows.csv": b""}, "MalformedRow", "rows.csv has no header"),
        (
            {"rows.csv": b"prompt,completion\na,b\na\n"},
            "MalformedRow",
            "line 3 of rows.csv has 1 cells",
        ),
        ({"rows.csv": b"text\na\nb,c\n"}, "MalformedRow", "line 3 of rows.csv has 2 cells, and the header has 1"),
        ({"rows.parquet": b"PAR1 and no end"}, "DamagedFile", "rows.parquet: Parquet"),
        ({"rows.csv.gz": gzip.compress(b"text\na\n")[:-9]}, "DamagedFile", "rows.csv.gz: Compressed file ended"),
        ({"rows.jsonl.gz": b'{"text": "a"}'}, "DamagedFile", "rows.jsonl.gz: Not a gzipped file"),
        ({"rows/a.jsonl": b'{"text": "a"}', "rows/b.csv": b"text\na\n"}, "MixedFormats", "a.jsonl, b.csv"),
        ({"rows/a.csv": b"text\na\n", "rows/b.csv": b"word\na\n"}, "MixedFormats", "b.csv has the columns word"),
        ({"rows/a.jsonl": b'{"text": "a"}', "rows/b.jsonl": b'{"word": "a"}'}, "MixedFormats", "different columns"),
        ({"rows.xyz": b"a"}, "UnknownFormat", "does not end in one of .jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_its_line(
    workshop: Workshop, files: dict[str, bytes], reason: str, words: str
) -> None:
    for name, content in files.items():
        path = workshop.layout.claims / "data" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    place = next(iter(files)).partition("/")[0]
    failure = refusal(workshop, workshop.job({"uri": f"pvc://data/{place}"}))
    assert failure.error.reason == reason, failure.error
    assert re.match(rf"spec\.dataset\.sources\[0\](\.uri)?: pvc://data/{place}[ :]", failure.error.message)
    assert words in failure.error.message
    assert failure.error.hint


def test_bytes_in_a_parquet_file_that_are_no_text_have_their_row(workshop: Workshop) -> None:
    path = workshop.layout.claims / "data" / "rows.parquet"
    pq.write_table(pa.table({"text": pa.array([b"a", b"b", LATIN]).view(pa.string())}), path)
    failure = refusal(workshop, workshop.job({"uri": "pvc://data/rows.parquet"}))
    assert failure.error.reason == "NotUtf8"
    assert "row 3 of train" in failure.error.message


def test_a_parquet_file_that_is_cut_off_is_refused(workshop: Workshop) -> None:
    path = workshop.layout.claims / "data" / "rows.parquet"
    datasets.Dataset.from_list(ROWS * 100).to_parquet(path)
    path.write_bytes(path.read_bytes()[:-100])
    failure = refusal(workshop, workshop.job({"uri": "pvc://data/rows.parquet"}))
    assert (failure.code, failure.error.reason) == (ExitCode.BAD_DATA, "DamagedFile")


@pytest.mark.parametrize("seed", range(4))
def test_a_rows_number_is_that_of_the_file_also_where_rows_are_held_out(workshop: Workshop, seed: int) -> None:
    workshop.write("rows.jsonl", [{"text": "Air."}] * 6 + [{"text": 7}] + [{"text": "Air."}] * 3)
    job = workshop.job(dataset={"validation": {"fraction": 0.3}}, training={"maxSteps": 1, "seed": seed})
    assert "row 7 of train" in refusal(workshop, job).error.message


def test_a_missing_file_comes_with_the_names_of_those_that_are_there(workshop: Workshop) -> None:
    workshop.write("raws.jsonl", ROWS)
    failure = refusal(workshop, workshop.job())
    assert failure.error.hint == "The claim holds: raws.jsonl."


def test_torch_is_not_needed(workshop: Workshop) -> None:
    workshop.write("rows.jsonl", ROWS)
    done = workshop.run_without_torch("load-dataset", workshop.job())
    assert done.returncode == 0, done.stderr
    report = json.loads(workshop.layout.report_file.read_text())
    assert report["result"]["examples"] == len(ROWS)
    assert "finetune-progress" in done.stdout


def test_half_a_surrogate_pair_matters_only_where_it_is_used(workshop: Workshop) -> None:
    workshop.write("rows.jsonl", ['{"text": "a \\ud83d\\ude00"}', '{"text": "b", "unused": "\\ud83d"}'])
    load(workshop, workshop.job())
    assert texts(workshop) == ["a 😀<|im_end|>", "b<|im_end|>"]
    workshop.write("rows.jsonl", [{"text": "a"}, "", '{"text": "b \\ud83d"}'])
    error = refusal_again(workshop)
    assert "row 2 of train: column text holds \\ud83d" in error.message
    assert error.message.endswith(" (line 3 of rows.jsonl)")


def refusal_again(workshop: Workshop) -> Any:
    with pytest.raises(StepFailure) as failure:
        run(workshop.job(), workshop.layout)
    return failure.value.error


def test_the_tokens_that_end_what_is_learned_are_named_and_handed_over(workshop: Workshop) -> None:
    config = workshop.layout.model / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token": "<|endoftext|>"}))
    workshop.write("rows.jsonl", [{"messages": QUESTION}, {"messages": QUESTION + QUESTION}])
    workshop.write("more.jsonl", [{"text": "Air."}])
    sources = [{"uri": "pvc://data/rows.jsonl"}, {"uri": "pvc://data/more.jsonl"}]
    assert load(workshop, workshop.job(dataset={"sources": sources}))["endTokens"] == ["<|im_end|>", "<|endoftext|>"]
    assert read_end_tokens(workshop.layout.dataset) == [
        EndToken(2, "<|im_end|>", 3),
        EndToken(0, "<|endoftext|>", 1),
    ]


def test_under_pretraining_only_the_end_of_a_text_counts(workshop: Workshop) -> None:
    workshop.write("rows.jsonl", [{"text": "Air scatters. <|im_start|>" * 20 + " Air."}])
    job = workshop.job(dataset={"maxLength": 8}, training={"maxSteps": 1, "objective": "Pretraining"})
    assert load(workshop, job)["endTokens"] == ["<|im_end|>"]


def test_what_has_no_end_token_says_so(workshop: Workshop) -> None:
    (workshop.layout.model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    workshop.write("rows.jsonl", [{"messages": QUESTION}])
    assert load(workshop, workshop.job())["endTokens"] == []


def test_answers_that_say_nothing_are_counted(workshop: Workshop) -> None:
    empty = [QUESTION[0], {"role": "assistant", "content": ""}]
    workshop.write("rows.jsonl", [{"messages": QUESTION}, {"messages": empty}, {"messages": QUESTION + empty}])
    assert load(workshop, workshop.job())["emptyAnswers"] == 2


REPEATED = [{"text": f"row {number % 20}"} for number in range(60)]


@pytest.mark.parametrize("seed", range(3))
def test_equal_rows_are_held_out_together(workshop: Workshop, seed: int) -> None:
    workshop.write("rows.jsonl", REPEATED)
    training = {"maxSteps": 1, "seed": seed}
    kept = {"validation": {"fraction": 0.2, "duplicates": "Kept"}}
    result = load(workshop, workshop.job(dataset=kept, training=training))
    train, held = texts(workshop), texts(workshop, "validation")
    common = [text for text in train if text in held]
    assert result["validationDuplicates"] == len(common) > 0
    assert len(held) == 12
    result = load(workshop, workshop.job(dataset={"validation": {"fraction": 0.2}}, training=training))
    train, held = texts(workshop), texts(workshop, "validation")
    assert result["validationDuplicates"] == len(common)
    assert not set(train) & set(held)
    assert Counter(train + held) == Counter(f"{row['text']}<|im_end|>" for row in REPEATED)
    assert 0 < len(held) < 30


def test_what_occurs_in_the_source_to_validate_on_is_not_trained_on(workshop: Workshop) -> None:
    workshop.write("rows.jsonl", REPEATED)
    workshop.write("held.jsonl", [{"text": "row 7"}, {"text": "other"}])
    validation = {"source": {"uri": "pvc://data/held.jsonl"}}
    result = load(workshop, workshop.job(dataset={"validation": validation}))
    assert (result["examples"], result["validationExamples"], result["validationDuplicates"]) == (57, 2, 3)
    assert "row 7<|im_end|>" not in texts(workshop)
    result = load(workshop, workshop.job(dataset={"validation": validation | {"duplicates": "Kept"}}))
    assert (result["examples"], result["validationDuplicates"]) == (60, 3)
    workshop.write("held.jsonl", REPEATED)
    with pytest.raises(StepFailure) as failure:
        run(workshop.job(dataset={"validation": validation}), workshop.layout)
    assert failure.value.error.reason == "TooFewRows"
    assert "duplicates: Kept" in (failure.value.error.hint or "")


def test_long_texts_that_are_cut_are_compared_whole(workshop: Workshop) -> None:
    long = "The sky is blue because air scatters short waves. "
    workshop.write("rows.jsonl", [{"text": long + "a"}, {"text": long + "b"}, {"text": long + "a"}] * 4)
    dataset = {"maxLength": 8, "validation": {"fraction": 0.3}}
    training = {"maxSteps": 1, "objective": "Pretraining", "seed": 1}
    load(workshop, workshop.job(dataset=dataset, training=training))
    assert {text[-11:] for text in texts(workshop)}.isdisjoint(
        {text[-11:] for text in texts(workshop, "validation") if text.endswith("<|im_end|>")}
    )
