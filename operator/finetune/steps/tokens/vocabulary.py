"""The tokenizer's side of new tokens: which are new, what they were made of, which ids they get.

Everything is read from and written to tokenizer.json through the `tokenizers` library, so that what is written is what
transformers and inference servers load.
"""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from finetune.api.spec import NewToken
from finetune.steps.tokenizer_files.agreement import TOKENIZER, without_limits
from finetune.steps.tokenizer_files.conversion import NotConvertible, converted
from finetune.steps.tokens.byte_level import bytes_shown

FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
"""How an added token is found in text, and whether decoding hides it."""

CONTROL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)
"""Texts that llama.cpp's converter takes for control tokens (`does_token_look_special`)."""

BESIDE = "so"
"""Text beside a token when it is tested."""

UNSPACED_SCRIPTS = ("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
"""Scripts, by the beginning of their characters' Unicode names, that put no space before a word."""


class InvalidVocabulary(ValueError):
    """The tokenizer cannot be extended; the message says why."""


@dataclass(frozen=True)
class Added:
    """A token that was added: its id, and the ids of the pieces that running text had in its place before.

    `piece` is the name in the model's vocabulary of one that was learned; None for an added token.
    """

    token: NewToken
    id: int
    pieces: tuple[int, ...]
    leading_space: bool
    piece: str | None = None


class Vocabulary:
    """A tokenizer that grows.

    `length` is one more than the largest id: embedding rows up to it are in use.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.replace(tokenizer)

    def replace(self, tokenizer: Tokenizer) -> None:
        """Go on with this tokenizer, which knows further tokens."""
        self.tokenizer = tokenizer
        ids = tokenizer.get_vocab(with_added_tokens=True)
        self._names = {id_: name for name, id_ in ids.items()}
        if len(self._names) != len(ids):
            raise InvalidVocabulary("tokenizer.json gives one id to several tokens")
        self.length = max(self._names, default=-1) + 1
        self.size = len(ids)

    @classmethod
    def read(cls, folder: Path) -> Vocabulary:
        """The tokenizer of a checkpoint; raises InvalidVocabulary when there is none that is known to be right.

        Tokens that only tokenizer_config.json or added_tokens.json knows are put in, as transformers does.
        """
        path = folder / TOKENIZER
        try:
            tokenizer = Tokenizer.from_file(str(path)) if path.is_file() else converted(folder)
        except NotConvertible as error:
            raise InvalidVocabulary(str(error)) from error
        except Exception as error:
            raise InvalidVocabulary(f"tokenizer.json cannot be read: {error}") from error
        vocabulary = cls(without_limits(tokenizer))
        vocabulary._complete(_declared(folder, tokenizer))
        return vocabulary

    def id_of(self, content: str) -> int | None:
        """The id of the one token that this very text is, or None when it is several (or not encodable)."""
        return self.ids_of([content]).get(content)

    def ids_of(self, contents: Iterable[str]) -> dict[str, int]:
        """`id_of` for many texts; those that are not one token are left out."""
        added = {token.content: int(id_) for id_, token in self.tokenizer.get_added_tokens_decoder().items()}
        found: dict[str, int] = {}
        for content in contents:
            if content in added:
                found[content] = added[content]
                continue
            ids = self.encode(content)
            if len(ids) == 1 and self.tokenizer.decode(ids, skip_special_tokens=False) == content:
                found[content] = ids[0]
        return found

    def of_another_kind(self, tokens: Iterable[NewToken]) -> Iterator[str]:
        """Sentences about tokens that are there already, special where an ordinary one is asked for or the reverse.

        They are left as they are: other things than this job may rely on it.
        """
        present = {token.content: token for token in self.tokenizer.get_added_tokens_decoder().values()}
        for token in tokens:
            former = present.get(token.content)
            if former is not None and former.special and not token.special:
                yield (
                    f"{token.content!r} is there already as a special token: decoding with skip_special_tokens hides it"
                )
            elif former is not None and token.special and not former.special:
                yield (
                    f"{token.content!r} is there already as an ordinary token: "
                    "decoding with skip_special_tokens shows it"
                )

    def encode(self, text: str) -> list[int]:
        """Ids without the tokens that a template adds."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def similar(self, content: str) -> list[str]:
        """Existing tokens whose names resemble this text, most similar first."""
        names = [token.content for token in self.tokenizer.get_added_tokens_decoder().values()]
        near = difflib.get_close_matches(content, names, n=3, cutoff=0.5)
        wanted = content.casefold()
        near += [name for name in self._names.values() if name.casefold().lstrip("Ġ▁") == wanted and name not in near]
        return near[:3]

    def text_of(self, id_: int) -> str:
        """A token's text for people: spaces as they are, bytes that are no whole character as <0xE6>."""
        name = self._names.get(id_, "")
        text = self.tokenizer.decode([id_], skip_special_tokens=False)
        if "▁" in name:
            return name.replace("▁", " ")
        return bytes_shown(name) if "\ufffd" in text else text

    def pieces(self, content: str) -> tuple[tuple[int, ...], bool]:
        """The ids that running text has in the place of `content`, and whether that is with a leading space.

        A word in a sentence follows a space, which tokenizers make part of its first piece; the pieces without the
        space are those of another, rarer thing. A marker (`<think>`) or a word of a script without spaces follows
        none. Tokenizers that put the space there themselves need no help.
        """
        bare = tuple(self.encode(content))
        if not _follows_space(content):
            return bare, False
        first = self._names.get(bare[0], "") if bare else ""
        if first.startswith(("▁", "Ġ")):
            return bare, True
        spaced = tuple(self.encode(f" {content}"))
        return (spaced, True) if self.tokenizer.decode(list(spaced)).strip() else (bare, False)

    def collisions(self, tokens: Iterable[NewToken]) -> set[str]:
        """The texts that are the internal name of another token."""
        return {token.content for token in tokens} & set(self._names.values())

    def add(self, tokens: Sequence[NewToken]) -> list[Added]:
        """Add tokens that are not there yet. Their pieces are computed before, or a token's pieces were itself.

        None may be one of the `collisions`. Raises InvalidVocabulary when the tokenizer hands out ids that are in use.
        """
        pieces = [self.pieces(token.content) for token in tokens]
        self.tokenizer.add_tokens([_added_token(token) for token in tokens])
        added: list[Added] = []
        for token, (ids, leading_space) in zip(tokens, pieces, strict=True):
            id_ = self.tokenizer.token_to_id(token.content)
            if id_ is None or id_ in self._names:
                former = self._names.get(-1 if id_ is None else id_)
                raise InvalidVocabulary(
                    f"the tokenizer would give {token.content!r} the id {id_}, which is {former!r} already"
                )
            self._names[id_] = token.content
            added.append(Added(token, id_, ids, leading_space))
        self.length = max(self._names, default=-1) + 1
        self.size = len(self._names)
        return added

    def needless(self, added: Iterable[Added]) -> Iterator[str]:
        """Sentences about new tokens that running text writes as one token already, with the space before it."""
        for item in added:
            if item.leading_space and len(item.pieces) == 1:
                yield (
                    f"{item.token.content!r} after a space is one token already (id {item.pieces[0]}); "
                    "as a token of its own it leaves the space to another one"
                )

    def unfaithful(self, added: Iterable[Added]) -> Iterator[tuple[Added, str]]:
        """Tokens that are not one id, or whose id does not come back as their text, with what comes back.

        Some decoders take a space off the front of a text, so a token is decoded after itself; others change what
        stands beside a token, so it is read and decoded with text before and behind it.
        """
        beside = self._comes_back(BESIDE)
        for item in added:
            content = item.token.content
            twice = self.tokenizer.decode([item.id, item.id], skip_special_tokens=False)
            if twice not in (content * 2, (content * 2).removeprefix(" ")):
                yield item, self.tokenizer.decode([item.id], skip_special_tokens=False)
            elif self.encode(content) != [item.id]:
                yield item, " + ".join(map(repr, self.tokenizer.encode(content, add_special_tokens=False).tokens))
            elif beside:
                text = f"{BESIDE} {content} {BESIDE}"
                ids = self.encode(text)
                back = self.tokenizer.decode(ids, skip_special_tokens=False)
                # not found there at all: a longer token takes its place
                if item.id in ids and not _alike_but_for_spaces(back, text):
                    yield item, back

    def spaced_apart(self, added: Iterable[Added]) -> Iterator[str]:
        """A sentence if this tokenizer puts spaces beside new tokens where the text has none."""
        plain = [item for item in added if not (item.token.lstrip or item.token.rstrip or item.token.single_word)]
        if not plain:
            return
        text = f"{BESIDE}{plain[0].token.content}{BESIDE}"
        back = self.tokenizer.decode(self.encode(text), skip_special_tokens=False)
        if back != text and _alike_but_for_spaces(back, text):
            yield (
                f"this tokenizer begins anew behind a token, as behind the base model's own special ones: {text!r} "
                f"comes back as {back!r}"
            )

    def stripped_by_servers(self, added: Iterable[Added]) -> Iterator[str]:
        """A sentence about new tokens without rstrip in a model whose own tokens have it, as Phi-3's do.

        llama.cpp then strips the white space behind every added token of a model that is called so.
        """
        new = [item for item in added if not item.token.rstrip]
        ids = {item.id for item in added}
        own = [token for id_, token in self.tokenizer.get_added_tokens_decoder().items() if id_ not in ids]
        if new and sum(token.rstrip for token in own) * 2 > len(own):
            yield (
                f"the base model's own tokens swallow the white space behind them, {new[0].token.content!r} does not: "
                "llama.cpp makes no difference between them in models called Phi-3; set rstrip for the same ids there"
            )

    def _comes_back(self, text: str) -> bool:
        return _alike_but_for_spaces(self.tokenizer.decode(self.encode(text)), text)

    def _complete(self, declared: dict[int, AddedToken]) -> None:
        known = self.tokenizer.get_added_tokens_decoder()
        for id_, token in sorted(declared.items()):
            if self.tokenizer.token_to_id(token.content) == id_ and _alike(known.get(id_), token):
                continue
            self.tokenizer.add_tokens([token])  # of one that is there, the flags: transformers lets the settings win
            if self.tokenizer.token_to_id(token.content) != id_:
                raise InvalidVocabulary(
                    f"the tokenizer's files contradict each other about {token.content!r}: its id is {id_} in "
                    f"tokenizer_config.json, tokenizer.json says {self.tokenizer.token_to_id(token.content)}"
                )
            self._names[id_] = token.content
        self.length = max(self._names, default=-1) + 1
        self.size = len(self._names)


def _alike_but_for_spaces(one: str, other: str) -> bool:
    return "".join(one.split()) == "".join(other.split())


def hidden_by_servers(added: Iterable[Added]) -> Iterator[str]:
    """A sentence about ordinary tokens that llama.cpp's converter takes for control tokens, by their shape."""
    hidden = [item.token.content for item in added if not item.token.special and CONTROL.fullmatch(item.token.content)]
    if hidden:
        some = ", ".join(hidden[:4]) + (", ..." if len(hidden) > 4 else "")
        yield (
            f"{some}: llama.cpp's converter takes tokens of this shape for control tokens, which servers leave out of "
            "what they show; write <x> where they are to be seen, or set special"
        )


def _follows_space(content: str) -> bool:
    first = content[0]
    return first.isalnum() and not unicodedata.name(first, "").startswith(UNSPACED_SCRIPTS)


def _added_token(token: NewToken) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )


def _alike(known: AddedToken | None, declared: AddedToken) -> bool:
    return known is not None and all(getattr(known, flag) == getattr(declared, flag) for flag in FLAGS)


def _declared(folder: Path, tokenizer: Tokenizer) -> dict[int, AddedToken]:
    """Tokens that files beside tokenizer.json declare, by id."""
    declared: dict[int, AddedToken] = {}
    for content, id_ in _read(folder / "added_tokens.json").items():
        if tokenizer.token_to_id(content) != int(id_):
            declared[int(id_)] = AddedToken(content, normalized=False)
    for id_, token in (_read(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}).items():
        options = {key: value for key, value in token.items() if key not in ("content", "__type")}
        declared[int(id_)] = AddedToken(token["content"], **options)
    return declared


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InvalidVocabulary(f"{path.name} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise InvalidVocabulary(f"{path.name} is not a JSON object")
    return content
