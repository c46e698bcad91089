"""Golden rows: ids and labels written out by hand, and ColossalAI's own code beside ours on random conversations."""

from __future__ import annotations

import bisect
import json
import random
from collections.abc import Callable
from copy import deepcopy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from finetune.api.spec import Mask, Objective
from finetune.steps.dataset.encode import Encoded, Encoder
from finetune.steps.rows.formats import recognised
from tests.models import CHAT_TEMPLATE

GOLDEN = json.loads((Path(__file__).parent / "golden" / "dataset.json").read_text())
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)


def tokenizer(*, adds_bos: bool = False, chat_template: str = CHAT_TEMPLATE) -> Any:
    """One id for each word or run of punctuation, in the order of the golden file's list; white space has none."""
    backend = Tokenizer(models.WordLevel({word: id for id, word in enumerate(GOLDEN["vocabulary"])}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in GOLDEN["special"]])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=chat_template,
    )


def encode(encoder: Encoder, row: dict[str, Any]) -> list[Encoded]:
    example = recognised(list(row), "spec.dataset.sources[0]").read(row)
    return [each for batch in encoder.encode([[example]]) for each in batch]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=[case["name"] for case in GOLDEN["cases"]])
def test_a_row_gives_the_ids_and_labels_that_were_worked_out_by_hand(case: dict[str, Any]) -> None:
    template = MARKED if case.get("chat_template") == "marked" else CHAT_TEMPLATE
    encoder = Encoder(
        tokenizer(adds_bos=case.get("adds_bos", False), chat_template=template),
        datetime(2026, 2, 3, tzinfo=UTC),
        Objective(case.get("objective", "Supervised")),
        case.get("max_length", 1024),
        Mask(case["mask"]),
    )
    encoded = encode(encoder, case["row"])
    if case["ids"] is None:
        assert (encoded, encoder.counts.dropped) == ([], case["dropped"])
    else:
        assert [(each.ids, each.labels) for each in encoded] == [(case["ids"], case["labels"])]


class Conversation:
    """The template of ColossalAI's code, style ADD_BOS_EOS_TOKEN."""

    def __init__(self, system: str, roles: tuple[str, str], seps: list[str]) -> None:
        self.system, self.roles, self.seps = system, roles, seps
        self.messages: list[tuple[str, str]] = []

    def get_prompt(self, length: int) -> str:
        turns = (f"{role}: {self.seps[0]}{message}{self.seps[1]}" for role, message in self.messages[:length])
        return self.system + "".join(turns)


def by_colossal(messages: list[dict[str, str]], tokenizer: Any, max_length: int) -> tuple[list[int], list[int]]:
    """ids and labels of a conversation, step by step as in the article's code."""
    template = Conversation(
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions.\n\n",
        ("Human", "Assistant"),
        ["<s>", "</s>"],
    )
    for message in messages:
        template.messages.append((template.roles[message["from"] == "assistant"], message["content"]))

    def tokenized_length(turn: int) -> int:
        return len(tokenizer([template.get_prompt(2 * turn)], add_special_tokens=False)["input_ids"][0])

    turns = list(range(1, len(messages) // 2 + 1))
    target_turn = turns[bisect.bisect_right(turns, max_length - 1, key=tokenized_length) - 1]
    tokenized = tokenizer([template.get_prompt(2 * target_turn)], add_special_tokens=False)["input_ids"][0]
    template.messages = template.messages[: 2 * target_turn]
    starts, ends = [], []
    gpt_bos = gpt_eos = template.messages[0][0] != template.roles[0]
    for index, token_id in enumerate(tokenized):
        if token_id == tokenizer.bos_token_id:
            if gpt_bos:
                starts.append(index)
            gpt_bos = not gpt_bos
        elif token_id == tokenizer.eos_token_id:
            if gpt_eos:
                ends.append(index)
            gpt_eos = not gpt_eos
    tokenized = [tokenizer.bos_token_id, *tokenized]
    labels = [-100] * len(tokenized)
    for start, end in zip(starts, ends, strict=False):
        labels[start + 1 : end + 2] = tokenized[start + 1 : end + 2]
    return tokenized, labels


def by_colossal_pretraining(source: str, target: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """ids and labels of a source and its target, step by step as in the article's code."""
    masked = len(source) > 0
    source = tokenizer.bos_token + source
    tokenized = tokenizer([source, source + target + tokenizer.eos_token])["input_ids"]
    labels = deepcopy(tokenized[1])
    if masked:
        labels[: len(tokenized[0])] = [-100] * len(tokenized[0])
    return tokenized[1], labels


def texts(random_: random.Random) -> Callable[[], str]:
    words = [word for word in GOLDEN["vocabulary"] if word.isalpha()]
    return lambda: " ".join(random_.choices(words, k=random_.randint(1, 9))) + random_.choice(".?,")


def colossal(max_length: int) -> Encoder:
    return Encoder(tokenizer(), datetime(2026, 2, 3, tzinfo=UTC), Objective.SUPERVISED, max_length, Mask.COLOSSAL)


@pytest.mark.parametrize("seed", range(40))
def test_mask_colossal_is_colossals_own_code_on_conversations(seed: int) -> None:
    random_ = random.Random(seed)
    text = texts(random_)
    speakers = random_.choice((("human", "assistant"), ("human", "assistant"), ("assistant", "human")))
    messages = [{"from": speakers[turn % 2], "content": text()} for turn in range(random_.randint(2, 9))]
    max_length = random_.randint(60, 130)
    expected = by_colossal(messages, tokenizer(), max_length)
    encoder = colossal(max_length)
    encoded = encode(encoder, {"messages": messages})
    if len(expected[0]) > max_length:  # the fault that is mended: a first pair that is too long is kept there
        assert (encoded, encoder.counts.dropped) == ([], {"TooLong": 1})
    else:
        assert [(each.ids, each.labels) for each in encoded] == [expected]


@pytest.mark.parametrize("seed", range(20))
def test_mask_colossal_is_colossals_own_code_on_sources_and_targets(seed: int) -> None:
    text = texts(random.Random(seed))
    source, target = text() if seed % 3 else "", text()
    ids, labels = by_colossal_pretraining(source, target, tokenizer())
    (encoded,) = encode(colossal(1024), {"source": source, "target": target})
    assert (encoded.ids, encoded.labels) == (ids, [-100, *labels[1:]])
