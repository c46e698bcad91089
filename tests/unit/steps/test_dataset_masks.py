"""Which tokens are learned: golden cases, written out as the texts that must carry the loss."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from finetune.api.spec import Objective
from finetune.steps.dataset.chat import NotShown
from finetune.steps.dataset.encode import Encoded, Encoder
from finetune.steps.dataset.span import token_span
from finetune.steps.rows.formats import Completion, Conversation, Example, PlainText
from finetune.steps.rows.messages import Message
from finetune.steps.workspace.training_data import IGNORED
from tests.models import CORPUS, tiny

CREATED = datetime(2026, 2, 3, tzinfo=UTC)

MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
)
PLAIN_MARKERS = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' + message['content'] + '\n###\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
CLOSING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}<|endoftext|>{% endif %}"
)
TRIMMING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REWRITING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] if loop.last else '(earlier)' }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DATED = "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tokenizer(model: Path) -> Any:
    return AutoTokenizer.from_pretrained(model)


def encoder(tokenizer: Any, template: str | None = None, max_length: int = 1024, **options: Any) -> Encoder:
    if template is not None:
        tokenizer.chat_template = template
    return Encoder(tokenizer, CREATED, options.get("objective", Objective.SUPERVISED), max_length)


def turns(*pairs: tuple[str, str], learned_from: int = 0) -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in pairs), learned_from)


def encode(encoder: Encoder, *examples: Example) -> list[Encoded]:
    return [example for batch in encoder.encode([examples]) for example in batch]


def learned(tokenizer: Any, example: Encoded) -> list[str]:
    """The texts that carry the loss, run by run."""
    runs: list[list[int]] = [[]]
    for label in example.labels:
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs if run]


TWO_QUESTIONS = turns(("user", "Why?"), ("assistant", "Air."), ("user", "How?"), ("assistant", "Waves."))


def test_ids_are_those_of_the_chat_template_and_labels_repeat_the_learned_ones(tokenizer: Any) -> None:
    (example,) = encode(encoder(tokenizer), turns(("user", "Why?"), ("assistant", "Air.")))
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Air."}]
    assert example.ids == tokenizer.apply_chat_template(messages, return_dict=False)
    start = len(tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False))
    newline = 1
    assert example.labels == [IGNORED] * start + example.ids[start:-newline] + [IGNORED] * newline


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, ["Air.<|im_end|>", "Waves.<|im_end|>"]),
        (MARKED, ["Air.<|im_end|>", "Waves.<|im_end|>"]),
        (PLAIN_MARKERS, [" Air.\n###", "Waves.\n###"]),
        (CLOSING, ["Air.<|im_end|>", "Waves.<|im_end|>"]),
        (TRIMMING, ["Air.<|im_end|>", "Waves.<|im_end|>"]),
    ],
    ids=["chatml", "generation markers", "no special tokens", "text after the last turn", "trims"],
)
def test_the_answers_and_their_end_markers_are_learned_and_nothing_else(
    tokenizer: Any, template: str | None, expected: list[str]
) -> None:
    (example,) = encode(encoder(tokenizer, template), TWO_QUESTIONS)
    assert learned(tokenizer, example) == expected


def test_white_space_around_an_answer_does_not_confuse_a_template_that_trims(tokenizer: Any) -> None:
    (example,) = encode(encoder(tokenizer, TRIMMING), turns(("user", "Why?"), ("assistant", "  Air. \n")))
    assert learned(tokenizer, example) == ["Air.<|im_end|>"]


def test_an_end_marker_inside_an_answer_does_not_end_it(tokenizer: Any) -> None:
    answer = "Write <|im_end|> last."
    (example,) = encode(encoder(tokenizer), turns(("user", "How?"), ("assistant", answer)))
    assert learned(tokenizer, example) == [answer + "<|im_end|>"]


def test_only_the_completion_of_a_conversational_prompt_is_learned(tokenizer: Any) -> None:
    conversation = turns(*((message.role, message.content) for message in TWO_QUESTIONS.messages), learned_from=2)
    for template in (None, MARKED):
        (example,) = encode(encoder(tokenizer, template), conversation)
        assert learned(tokenizer, example) == ["Waves.<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused_instead_of_guessed_at(tokenizer: Any) -> None:
    with pytest.raises(NotShown, match="turn 2: the chat template leaves out what the assistant says"):
        encode(encoder(tokenizer, REWRITING), TWO_QUESTIONS)


def test_a_date_in_the_template_is_the_jobs_creation_date(tokenizer: Any) -> None:
    template = DATED + tokenizer.chat_template
    (example,) = encode(encoder(tokenizer, template), turns(("user", "Why?"), ("assistant", "Air.")))
    assert "Today is 03 Feb 2026" in tokenizer.decode(example.ids)
    assert learned(tokenizer, example) == ["Air.<|im_end|>"]


def test_a_completion_is_learned_with_the_end_of_text(tokenizer: Any) -> None:
    (example,) = encode(encoder(tokenizer), Completion("Two plus three is", " five."))
    assert tokenizer.decode(example.ids) == "Two plus three is five.<|im_end|>"
    assert learned(tokenizer, example) == [" five.<|im_end|>"]


def test_an_end_of_text_that_is_there_is_not_doubled(tokenizer: Any) -> None:
    (example,) = encode(encoder(tokenizer), PlainText("Air.<|im_end|>\n"))
    assert tokenizer.decode(example.ids) == "Air.<|im_end|>\n"


def test_a_tokenizer_that_begins_texts_does_so_once(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    for text in ("Air.", "<|im_start|>Air."):
        (example,) = encode(encoder(tokenizer), PlainText(text))
        assert tokenizer.decode(example.ids) == "<|im_start|>Air.<|im_end|>"
        assert example.labels == [IGNORED, *example.ids[1:]]


@pytest.mark.parametrize("example", [PlainText("The sky is blue."), TWO_QUESTIONS, Completion("Why?", "Air.")])
def test_pretraining_masks_nothing_but_the_first_token(tokenizer: Any, example: Example) -> None:
    (encoded,) = encode(encoder(tokenizer, objective=Objective.PRETRAINING), example)
    assert encoded.labels == [IGNORED, *encoded.ids[1:]]


def test_an_over_long_conversation_loses_whole_turns_from_its_end(tokenizer: Any) -> None:
    whole = encoder(tokenizer)
    (first,) = encode(whole, turns(("user", "Why?"), ("assistant", "Air.")))
    (both,) = encode(whole, TWO_QUESTIONS)
    for limit in range(len(first.ids), len(both.ids)):
        shortened = encoder(tokenizer, max_length=limit)
        assert encode(shortened, TWO_QUESTIONS) == [first]
        assert (shortened.counts.truncated, shortened.counts.dropped) == ({"LostTurns": 1}, {})


def test_a_conversation_whose_first_answer_does_not_fit_is_dropped(tokenizer: Any) -> None:
    short = encoder(tokenizer, max_length=8)
    assert encode(short, TWO_QUESTIONS) == []
    assert (short.counts.truncated, short.counts.dropped) == ({}, {"TooLong": 1})


def test_a_conversation_without_an_answer_is_dropped(tokenizer: Any) -> None:
    whole = encoder(tokenizer)
    assert encode(whole, turns(("user", "Why?"))) == []
    assert whole.counts.dropped == {"NothingToLearn": 1}


def test_over_long_text_is_cut_into_pieces_for_pretraining_and_nothing_is_lost(tokenizer: Any) -> None:
    text = PlainText("The quick brown fox jumps over the lazy dog. " * 21)
    (whole,) = encode(encoder(tokenizer, objective=Objective.PRETRAINING), text)
    cutting = encoder(tokenizer, max_length=16, objective=Objective.PRETRAINING)
    pieces = encode(cutting, text)
    assert [id for piece in pieces for id in piece.ids] == whole.ids
    assert max(len(piece.ids) for piece in pieces) == 16
    assert all(piece.labels[0] == IGNORED for piece in pieces)
    assert cutting.counts.truncated == {"CutIntoPieces": 1}


def test_over_long_text_is_not_cut_in_two_when_answers_are_learned(tokenizer: Any) -> None:
    cutting = encoder(tokenizer, max_length=16)
    assert encode(cutting, PlainText("The quick brown fox jumps over the lazy dog. " * 20)) == []
    assert cutting.counts.dropped == {"TooLong": 1}


def metaspace() -> Tokenizer:
    """A tokenizer in the manner of Llama 2: a mark for spaces, also before the text, and bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", *bytes_], show_progress=False)
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    return tokenizer


@pytest.fixture(scope="module")
def backends(model: Path) -> dict[str, Tokenizer]:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return {"bytes": Tokenizer.from_file(str(model / "tokenizer.json")), "metaspace": metaspace(), "words": words}


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "words"])
@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_span_of_characters_is_the_tokens_that_touch_it(backends: dict[str, Tokenizer], kind: str, data: Any) -> None:
    text = data.draw(st.text(st.sampled_from("aeiou thn.\n é漢😀<|im_end|>"), max_size=30)) + data.draw(
        st.sampled_from(["", "<|im_end|>", " the answer"])
    )
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    encoding = backends[kind].encode(text, add_special_tokens=False)
    touched = [at for at, (first, last) in enumerate(encoding.offsets) if first < end and last > start and start < end]
    found = range(*token_span(encoding, (start, end), len(text)))
    assert [at for at in found if encoding.offsets[at][0] < encoding.offsets[at][1]] == touched
