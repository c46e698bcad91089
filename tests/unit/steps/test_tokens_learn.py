"""Vocabulary learning: what is learned, what stays as it was, for every kind of tokenizer."""

from __future__ import annotations

import json
import string
from collections import Counter
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from finetune.steps.tokens.learn.families import Continued, NotLearnable
from finetune.steps.tokens.learn.greedy import JoinedText, find_pieces, framed
from finetune.steps.tokens.learn.grown import Growth, grown
from finetune.steps.tokens.learn.learning import Learned, NothingHeldOut, learn
from finetune.steps.tokens.learn.protect import NOTHING
from finetune.steps.tokens.learn.symbols import GAP, Symbols
from finetune.steps.tokens.learn.words import WordCounter, Words
from tests.poems import made as poems
from tests.unit.steps.vocabularies import ENGLISH, KINDS, byte_fallback, byte_level, real, unigram

EXACT = [kind for kind in KINDS if kind != "Unigram"]


@cache
def tokenizer(kind: str) -> Tokenizer:
    return KINDS[kind]()


@cache
def learned(kind: str, size: int = 80) -> Learned:
    return learn(tokenizer(kind), poems(), None, size, 2)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def decoded(tokenizer: Tokenizer, text: str) -> str:
    return tokenizer.decode(ids(tokenizer, text), skip_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_text_takes_fewer_tokens_and_comes_back_whole(kind: str) -> None:
    found = learned(kind)
    assert found.held_out.after < 0.75 * found.held_out.before
    for text in poems(seed=1):
        former = decoded(tokenizer(kind), text)
        assert decoded(found.tokenizer, text) == (text if "<unk>" not in former else decoded(found.tokenizer, text))
        assert former in (text, decoded(found.tokenizer, text)) or "<unk>" in former


@pytest.mark.parametrize("kind", KINDS)
def test_new_ids_follow_the_whole_old_vocabulary_and_old_ids_stay(kind: str) -> None:
    before, after = tokenizer(kind), Tokenizer.from_str(learned(kind).tokenizer.to_str())
    old = before.get_vocab(with_added_tokens=True)
    new = after.get_vocab(with_added_tokens=True)
    length = max(old.values()) + 1
    assert {name: new[name] for name in old} == old
    assert sorted(set(new.values()) - set(old.values())) == list(range(length, length + len(learned(kind).pieces)))
    for id_, token in before.get_added_tokens_decoder().items():
        assert after.get_added_tokens_decoder()[id_].content == token.content
        assert ids(after, f"x{token.content}y").count(id_) == 1
    assert after.add_tokens(["<later>"]) == 1
    assert after.token_to_id("<later>") == length + len(learned(kind).pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_new_pieces_are_the_models_own_and_no_added_tokens(kind: str) -> None:
    found = learned(kind)
    assert len(found.tokenizer.get_added_tokens_decoder()) == len(tokenizer(kind).get_added_tokens_decoder())
    vocab = found.tokenizer.get_vocab(with_added_tokens=False)
    assert [vocab[piece.name] for piece in found.pieces] == list(
        range(found.first_id, found.first_id + len(found.pieces))
    )


@pytest.mark.parametrize("kind", EXACT)
def test_the_tokenizer_does_what_the_search_promised(kind: str) -> None:
    """The search joins ids, the tokenizer applies merges: they agree about every word of the corpus."""
    continued = Continued.of(tokenizer(kind))
    words = WordCounter(continued, continued.cut_pattern()).count(poems())
    symbols = Symbols(continued)
    written = symbols.write(words)
    text = JoinedText(framed([written.ids]), framed([written.weights]), len(symbols.names))
    found = find_pieces(text, symbols, NOTHING, 120, 2)
    after = Symbols(Continued.of(grown(continued, Growth([piece.name for piece in found.pieces], found.merges))))
    assert after.write(words).tokens == written.tokens - found.saved


def test_the_search_equals_a_plain_byte_pair_encoding() -> None:
    """Against the few lines that everybody writes first, on text with many ties, runs and overlaps."""
    draw = np.random.default_rng(0)
    words = Counter("".join(draw.choice(list("aab"), size=draw.integers(1, 12))) for _ in range(300))
    continued = Continued.of(byte_level(vocabulary=256))
    symbols = Symbols(continued)
    written = symbols.write(Words(sorted(words), [words[word] for word in sorted(words)]))
    found = find_pieces(
        JoinedText(framed([written.ids]), framed([written.weights]), symbols.length), symbols, NOTHING, 40, 2
    )
    assert found.merges == plain_merges({tuple(word): count for word, count in words.items()}, symbols, 40)


def plain_merges(words: dict[tuple[str, ...], int], symbols: Symbols, size: int) -> list[tuple[str, str]]:
    order = {name: id_ for id_, name in enumerate(symbols.names)}
    merges: list[tuple[str, str]] = []
    while len(order) < len(symbols.names) + size:
        counts: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            place = 0
            last_start: dict[tuple[str, str], int] = {}
            for place, pair in enumerate(pairwise(word)):
                if last_start.get(pair) == place - 1 and pair[0] == pair[1]:
                    last_start.pop(pair)
                    continue
                last_start[pair] = place
                counts[pair] += count
        fresh = [pair for pair in counts if "".join(pair) not in order]
        best = min(fresh, key=lambda pair: (-counts[pair], order[pair[0]], order[pair[1]]), default=None)
        if best is None or counts[best] < 2:
            break
        merges.append(best)
        order["".join(best)] = len(order)
        words = {joined(word, best): count for word, count in words.items()}
    return merges


def joined(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    result: list[str] = []
    place = 0
    while place < len(word):
        if word[place : place + 2] == pair:
            result.append("".join(pair))
            place += 2
        else:
            result.append(word[place])
            place += 1
    return tuple(result)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(
    text=st.text(
        st.one_of(
            st.sampled_from(string.printable + "é水火ーÅñ🙂"),
            st.sampled_from("明月春風不見"),
            st.characters(exclude_categories=["Cs"]),
        )
    )
)
def test_text_is_encoded_as_before_but_for_new_pieces_and_comes_back_whole(kind: str, text: str) -> None:
    before, after = tokenizer(kind), learned(kind).tokenizer
    old, new = ids(before, text), ids(after, text)
    if max(new, default=0) < learned(kind).first_id:
        assert new == old
    assert len(new) <= len(old) or kind == "Unigram"
    if kind in ("GPT-2 like", "Qwen like", "Llama 2 like", "SmolLM2"):
        parts = {learned(kind).first_id + index: piece.parts for index, piece in enumerate(learned(kind).pieces)}
        assert [part for id_ in new for part in parts.get(id_, (id_,))] == old
    former, back = before.decode(old, skip_special_tokens=False), after.decode(new, skip_special_tokens=False)
    assert back == former or "<unk>" in former


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_of_a_piece_are_what_stood_in_its_place(kind: str) -> None:
    found, names = learned(kind), {id_: name for name, id_ in tokenizer(kind).get_vocab().items()}
    for piece in found.pieces:
        assert all(part < found.first_id for part in piece.parts)
        if kind in ("GPT-2 like", "Llama 3 like", "Qwen like", "SmolLM2"):
            assert "".join(names[part] for part in piece.parts) == piece.name
    if kind == "Llama 2 like":
        by_name = {piece.name: piece for piece in found.pieces}
        moon = [names[part] for part in by_name["月"].parts]
        assert moon == ["<0xE6>", "<0x9C>", "<0x88>"]


@pytest.mark.parametrize("kind", KINDS)
def test_protected_text_keeps_its_ids_and_the_domain_still_gains(kind: str) -> None:
    english = [line.replace("the", "teh") for line in ENGLISH] + ENGLISH + ["落花 and 明月 in the night"]
    corpus = [*poems(), *ENGLISH * 20]
    free = learn(tokenizer(kind), corpus, None, 60, 2)
    kept = learn(tokenizer(kind), corpus, english, 60, 2)
    assert any(ids(free.tokenizer, text) != ids(tokenizer(kind), text) for text in english)
    assert all(ids(kept.tokenizer, text) == ids(tokenizer(kind), text) for text in english)
    assert kept.protected == sum(map(len, english))
    assert kept.held_out.after < kept.held_out.before


def test_a_whole_word_of_protected_text_is_no_piece_where_merges_are_ignored() -> None:
    """Llama 3 makes a word of the vocabulary one token at once: no pair of its old ids need be met for that."""
    before = byte_level(ignore_merges=True, vocabulary=256)
    corpus = [f"x{word}" for word in ("abab", "baba") for _ in range(40)]
    kept = learn(before, corpus, ["ab a b aba"], 30, 2)
    assert "ab" not in {piece.name for piece in kept.pieces}
    assert ids(kept.tokenizer, "ab a b aba") == ids(before, "ab a b aba")


def test_it_stops_when_a_piece_would_save_too_little() -> None:
    before = byte_level()
    all_pieces = learn(before, poems(), None, 10_000, 2)
    few = learn(before, poems(), None, 10_000, 25)
    assert 0 < len(few.pieces) < len(all_pieces.pieces) < 10_000
    assert min(piece.saving for piece in few.pieces) >= 25
    assert few.pieces == all_pieces.pieces[: len(few.pieces)]
    assert all_pieces.pieces[len(few.pieces)].saving < 25


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_input_gives_the_same_bytes(kind: str) -> None:
    file = tokenizer(kind).to_str()
    first, again = (learn(Tokenizer.from_str(file), poems(), None, 80, 2) for _ in range(2))
    assert first.tokenizer.to_str() == again.tokenizer.to_str()
    assert first.pieces == again.pieces


def test_pieces_of_bytes_never_appear_where_bytes_are_a_fallback() -> None:
    for piece in learned("Llama 2 like").pieces:
        assert "<0x" not in piece.name
    assert "明月" in {piece.name for piece in learned("Llama 2 like").pieces}


def test_no_piece_crosses_words_script_or_punctuation() -> None:
    corpus = ["明月abc,明月abc 42 明月abc\n"] * 30
    for before in (byte_fallback(), unigram()):
        for piece in learn(before, corpus, None, 100, 2).pieces:
            name = piece.name.removeprefix("▁")
            assert len(name) == 1 or not set(name) & set("▁,\n")
            assert name.isascii() or not any(character.isascii() for character in name)
            assert not (len(name) > 1 and any(character.isdigit() for character in name))


def test_added_tokens_are_cut_out_before_anything_is_learned() -> None:
    before = byte_level()
    before.add_tokens(["zqzqzq"])
    found = learn(before, ["zqzqzq wkwkwk zqzqzq"] * 40, None, 20, 2)
    names = {piece.name for piece in found.pieces}
    assert not any("q" in name for name in names) and any("wk" in name for name in names)


def test_a_unigrams_new_scores_leave_its_penalty_for_the_unknown_alone() -> None:
    before = json.loads(tokenizer("Unigram").to_str())["model"]["vocab"]
    after = json.loads(learned("Unigram").tokenizer.to_str())["model"]["vocab"]
    assert [name for name, _ in after[: len(before)]] == [name for name, _ in before]
    assert [score for _, score in after[: len(before)]] == pytest.approx([score for _, score in before], abs=1e-12)
    assert min(score for _, score in after) == min(score for _, score in before)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"), "its model is WordPiece"),
        (models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"), "its model is WordLevel"),
        (models.BPE({"a": 0}, [], unk_token="a"), "neither bytes nor a fallback"),
        (models.BPE({"a": 0}, [], dropout=0.1), "dropout 0.1"),
        (models.BPE({"a": 0}, [], end_of_word_suffix="</w>"), "end_of_word_suffix '</w>'"),
    ],
)
def test_other_tokenizers_are_refused(model: object, words: str) -> None:
    before = Tokenizer(model)
    before.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(NotLearnable, match="|".join([words])):
        learn(before, poems(), None, 10, 2)


def test_a_corpus_of_less_than_ten_texts_is_refused_and_lines_of_a_long_text_count() -> None:
    with pytest.raises(NothingHeldOut):
        learn(byte_level(), poems(9), None, 10, 2)
    assert learn(byte_level(), ["".join(f"{text}\n" for text in poems(3_000))], None, 10, 2).held_out.characters > 0


def test_gaps_never_join() -> None:
    ids, weights = (np.array(values, np.int32) for values in ([1, 2, GAP, 1, 2], [3, 3, 0, 4, 4]))
    text = JoinedText(framed([ids]), framed([weights]), 3)
    assert text.count(text.pairs(1, 2)) == 7
    assert text.pairs(2, 1).size == 0


def test_more_old_ids_than_a_plane_of_unicode_has_are_no_limit() -> None:
    """Ways that write an id as one character run out of them; SmolLM2's 49,152 ids come close, Gemma's do not fit."""
    before = real()
    before.add_tokens([f"<{number}>" for number in range(20_000)])
    found = learn(before, poems(), None, 50, 2)
    assert found.first_id == 69_152
    assert found.held_out.after < found.held_out.before


def test_a_vocabulary_with_holes_is_continued_behind_its_largest_id() -> None:
    document = json.loads(byte_level().to_str())
    document["added_tokens"] = []
    vocab = document["model"]["vocab"]
    document["model"]["vocab"] = {name: id_ + 10 * (id_ >= 300) for name, id_ in vocab.items()}
    before = Tokenizer.from_str(json.dumps(document))
    found = learn(before, poems(), None, 30, 2)
    new = found.tokenizer.get_vocab()
    assert found.first_id == max(before.get_vocab().values()) + 1
    assert [new[piece.name] for piece in found.pieces] == list(range(found.first_id, found.first_id + 30))
    assert ids(found.tokenizer, "The quick brown fox") == ids(before, "The quick brown fox")


def test_a_piece_longer_than_a_phrase_is_never_learned() -> None:
    """A licence at the head of each file is no word of the domain."""
    found = learn(byte_level(), ["x" * 400 + "明月" * 100] * 20, None, 500, 2)
    assert max(len(piece.name) for piece in found.pieces) <= 64
