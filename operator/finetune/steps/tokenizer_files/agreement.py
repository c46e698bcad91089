"""Whether those who read a tokenizer's files get the same ids for a text.

tokenizer.json says everything about a tokenizer, and servers take it as it is. transformers 5 does not always: classes
such as LlamaTokenizer and GPT2Tokenizer take vocabulary and merges from the file and build normaliser, pre-tokenizer
and decoder by rules of their own; and `added_tokens_decoder` of tokenizer_config.json outranks tokenizer.json's own
list. A model would then be trained on other ids than it is served with.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from finetune.steps.tokenizer_files.as_it_is import GENERIC, SETTINGS, proven

TOKENIZER = "tokenizer.json"

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
"""Special tokens for which classes have names of their own where the settings have none."""

SPACE = "▁"
"""How sentencepiece writes a space in a piece."""

PROBES = (
    "Why is the sky blue? It scatters short waves.",
    "two  spaces between, three   more, and one after ",
    "a line\nand\n\n\tanother\r\n",
    "1,234.5 × 67 = ½ of ﬁve; Å and Å",
    "Über naïve façade, żółć, Ελλάδα, Россия",
    "水と火、방법 ไทย עברית العربية हिन्दी",
    "🙂 👩‍👩‍👧 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \u200b\u00a0…",
    "def f(x):\n    return x**2  # {'a': [1, 2]}\n",
)
"""Texts on which tokenizers have differed: spaces, line ends, normal forms, scripts, bytes. None begins with a space,
which sentencepiece doubles and some conversions do not."""

FURTHER = (" a space before", "HELLO'S World, I'Ve 1234567 euros", "e\u0301 and \u2126", "你好，世界 2024年")
"""Texts on which classes of transformers differ from tokenizer.json: a space at the beginning, capitals behind an
apostrophe, long numbers, normal forms."""

SEVERAL = 32
"""Of a tokenizer's own added tokens, how many get texts around them."""

BATCH = 4096
"""Texts that are encoded together."""


class Disagreement(ValueError):
    """transformers gives other ids than tokenizer.json, and nothing in the files can change that."""


@dataclass(frozen=True)
class Difference:
    """A text that tokenizer.json and another reader do not read alike: other ids, or other text from the same ids."""

    text: str
    expected: Any
    found: Any
    reader: str

    def __str__(self) -> str:
        return (
            f"{_short(self.text)} is {_some(self.expected)} by tokenizer.json and {_some(self.found)} by {self.reader}"
        )


def around(contents: Iterable[str]) -> list[str]:
    """Texts that have each token between, before, behind and beside other text."""
    return [text for content in contents for text in (f"so{content}so", f"so {content} so", f"{content} {content}So")]


def probes(tokenizer: Tokenizer) -> list[str]:
    """Texts that show how a tokenizer cuts, its own added tokens among them."""
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    some = added[:: max(1, len(added) // SEVERAL)]
    return [*PROBES, *FURTHER, *around(some)]


def by_transformers(folder: Path) -> Any:
    """The tokenizer as everybody loads it who trains with transformers."""
    from transformers import AutoTokenizer  # slow to import

    return AutoTokenizer.from_pretrained(folder)


def difference(tokenizer: Tokenizer, other: Any, texts: Sequence[str], *, decoded: bool = False) -> Difference | None:
    """The first text that transformers' tokenizer `other` gives other ids than `tokenizer`; None when there is none.

    With `decoded` also the first whose ids become another text again.
    """
    reader = f"transformers' {type(other).__name__}"
    for first in range(0, len(texts), BATCH):
        batch = list(texts[first : first + BATCH])
        encodings = tokenizer.encode_batch(batch, add_special_tokens=False)
        found = other(batch, add_special_tokens=False)["input_ids"]
        for text, encoding, ids in zip(batch, encodings, found, strict=True):
            if encoding.ids != ids:
                return Difference(text, encoding.ids, ids, reader)
            if not decoded:
                continue
            back = tokenizer.decode(ids, skip_special_tokens=False)
            other_back = other.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if back != other_back:
                return Difference(text, back, other_back, reader)
    return None


def without_limits(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without the padding and truncation that a file may hold."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def take_as_it_is(folder: Path, loaded: Any | None) -> None:
    """Rewrite the settings so that transformers takes tokenizer.json as it is. What the class of `loaded` brought in
    besides (names of special tokens, the side of padding) is written down."""
    brought: dict[str, Any] = {}
    if loaded is not None:
        named = {name: getattr(loaded, name, None) for name in NAMED}
        brought = {name: str(token) for name, token in named.items() if token is not None}
        brought |= {"model_input_names": list(loaded.model_input_names), "padding_side": loaded.padding_side}
    write_settings(folder, brought)


def write_settings(folder: Path, further: Mapping[str, Any]) -> None:
    """Settings that name GENERIC, and say what `further` says where they said nothing."""
    path = folder / SETTINGS
    settings = json.loads(path.read_bytes()) if path.is_file() else {}
    path.unlink(missing_ok=True)  # it may be a link to somebody's own file
    whole = {**further, **settings, "tokenizer_class": GENERIC}
    path.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def settle(folder: Path, texts: Sequence[str] = ()) -> str | None:
    """Make transformers read the tokenizer in `folder` as tokenizer.json says, on PROBES and these texts.

    Returns what was different, None when nothing was. Raises Disagreement where no setting helps (for some model_types
    transformers takes a class of its own whatever the settings name); tokenizer_config.json then stays as it was.
    """
    path = folder / SETTINGS
    settings = path.read_bytes() if path.is_file() else None
    tokenizer = without_limits(Tokenizer.from_file(str(folder / TOKENIZER)))
    if proven(folder, tokenizer):
        return None
    texts = [*probes(tokenizer), *texts]
    loaded: Any | None = None
    former: Difference | str | None
    try:
        loaded = by_transformers(folder)
        former = difference(tokenizer, loaded, texts, decoded=True)
    except Exception as error:  # a class that does not take this kind of model raises what it likes
        former = f"transformers' class cannot load tokenizer.json ({str(error).partition(chr(10))[0][:80]})"
    if former is None:
        return None
    take_as_it_is(folder, loaded)
    mended = by_transformers(folder)
    same_ends = loaded is None or _ends(mended) == _ends(loaded)
    if same_ends and difference(tokenizer, mended, texts, decoded=True) is None:
        return f"{former}; tokenizer_config.json now names {GENERIC}, which takes tokenizer.json as it is"
    path.unlink()
    if settings is not None:
        path.write_bytes(settings)
    if loaded is None or (left := difference(tokenizer, loaded, texts)) is not None:
        raise Disagreement(str(former if loaded is None else left))
    return None  # only what ids become again is different: reload looks at the new tokens' own texts


def _ends(tokenizer: Any) -> tuple[int, int]:
    """How many special tokens it puts before and behind a text."""
    ids, inner = tokenizer("so")["input_ids"], tokenizer("so", add_special_tokens=False)["input_ids"]
    before = next((at for at in range(len(ids)) if ids[at : at + len(inner)] == inner), len(ids))
    return before, len(ids) - before - len(inner)


def disagreement(folder: Path, texts: Sequence[str] = ()) -> Difference | None:
    """The first of PROBES and these texts whose ids transformers and tokenizer.json do not agree on."""
    tokenizer = without_limits(Tokenizer.from_file(str(folder / TOKENIZER)))
    return difference(tokenizer, by_transformers(folder), [*probes(tokenizer), *texts])


def _short(text: str) -> str:
    return repr(text) if len(text) <= 48 else f"{text[:48]!r}..."


def _some(what: Any) -> str:
    if isinstance(what, str):
        return _short(what)
    return str(list(what[:10])) if len(what) <= 10 else f"{str(list(what[:10]))[:-1]}, ...]"
