"""A vocabulary is learned on the cluster: from the poems that a hub serves to a trained model, measured in status."""

from __future__ import annotations

import json

from tokenizers import Tokenizer

from tests.e2e.jobs import holds, tiny_job, training
from tests.e2e.namespace import Namespace
from tests.hub.content import SENTENCES
from tests.poems import at_hand

SIZE = 200


def test_a_vocabulary_is_learned_from_poems_and_the_model_reads_them(namespace: Namespace) -> None:
    poems = {"uri": "hf://datasets/tests/poems"}
    lesson = {"source": poems, "protect": {"uri": "hf://datasets/tests/english"}, "size": SIZE}
    job = tiny_job(
        "poems",
        tokens={"add": [{"content": "<poem>"}], "learn": lesson},
        dataset={"sources": [poems], "validation": {"fraction": 0.1}, "maxLength": 256},
        training=training(objective="Pretraining", maxSteps=10, checkpoint={"everySteps": 10}),
        output={"uri": "pvc://models/poems"},
    )
    namespace.apply(namespace.claim("models"), job)
    status = namespace.until_phase("poems", "Complete")["status"]
    tokens = status["tokens"]
    assert (tokens["learned"], tokens["added"]) == (SIZE, SIZE + 1)
    assert tokens["vocabularySize"] == tokens["vocabularySizeBefore"] + SIZE + 1
    assert tokens["charactersPerToken"]["after"] > 1.3 * tokens["charactersPerToken"]["before"]
    assert tokens["protectedCharacters"] == sum(map(len, SENTENCES))
    assert status["training"]["steps"] == 10
    assert holds(namespace.job("poems"), "Trained")
    output = namespace.volume("models") / "poems"
    tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
    assert all(tokenizer.decode(tokenizer.encode(poem).ids) == poem for poem in at_hand()[:20])
    records = json.loads((output / "finetune-tokens.json").read_text())
    assert [record["piece"] is None for record in records] == [True] + [False] * SIZE


def test_a_corpus_that_is_too_small_is_named(namespace: Namespace) -> None:
    lesson = {"source": {"uri": "hf://datasets/tests/english", "split": "train[:5]"}, "size": 10}
    namespace.apply(tiny_job("small", tokens={"learn": lesson}))
    status = namespace.until_phase("small", "Failed")["status"]
    failed = next(item for item in status["conditions"] if item["type"] == "Failed")
    assert failed["reason"] == "CorpusTooSmall"
    assert "spec.tokens.learn.source" in failed["message"]
