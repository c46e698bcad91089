"""Whether all who read the tokenizer's files give the texts of the job's own rows the same ids.

The model learns transformers' ids. Servers read tokenizer.json: rows on which the two differ are refused. Engines that
read tokenizer.model (llama.cpp's converter) get sentencepiece's: no setting makes these alike, so that is told.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from finetune.api.contract import ExitCode
from finetune.steps.rows.formats import Format
from finetune.steps.rows.messages import MalformedRow
from finetune.steps.rows.sources import Rows
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.tokenizer_files.agreement import TOKENIZER, difference, without_limits
from finetune.steps.tokenizer_files.as_it_is import GENERIC, honours_settings
from finetune.steps.tokenizer_files.conversion import SENTENCEPIECE

COMPARED = 1000
"""Rows of each source whose texts are compared."""

LONG = 10_000
"""Characters of such a text."""

SHOWN = 32
"""Characters of a text that a warning shows, from where the ids become others."""

NAME_IT = (
    f'Write "tokenizer_class": "{GENERIC}" into the tokenizer_config.json of a copy of the base model, and use that as '
    "spec.model."
)

OTHER_BASE = (
    "transformers may build this tokenizer by rules of its own for the model_type in config.json, whatever class is "
    f"named: where {GENERIC} in tokenizer_config.json changes nothing, use a base of another model_type."
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Rows, and what to call them: their field in the spec and their URI."""

    name: str
    rows: Rows
    format: Format

    def texts(self) -> list[list[str]]:
        """Every text of each of the first rows; none of rows that cannot be read: whoever encodes them says which."""
        try:
            some = self.rows.columns(self.format.wanted)[:COMPARED]
            columns = some if isinstance(some, Mapping) else some.to_pydict()
        except (UnicodeDecodeError, MalformedRow):
            return []
        return [list(_texts(row)) for row in zip(*columns.values(), strict=True)]


def compared(model: Path, tokenizer: Any, sources: Sequence[Source]) -> list[str]:
    """Sentences about sources whose rows engines with sentencepiece would read otherwise.

    Raises StepFailure when rows would be learned with other ids than tokenizer.json gives them.
    """
    file = model / TOKENIZER
    if not file.is_file():
        return []
    reference = without_limits(Tokenizer.from_file(str(file)))
    pieces, same = _sentencepiece(model), _is(tokenizer, file, reference)
    if same and pieces is None:
        return []
    warnings = []
    for source in sources:
        rows = source.texts()
        texts = [text for row in rows for text in row]
        if not same and (left := difference(reference, tokenizer, texts)) is not None:
            raise StepFailure(
                ExitCode.BAD_CONFIGURATION,
                "TokenizersDisagree",
                f"{source.name}: the model would be trained with other ids than it is served with: {left}",
                NAME_IT if honours_settings(model) else OTHER_BASE,
            )
        if pieces is not None and (warning := _otherwise(source.name, rows, reference, *pieces)) is not None:
            log.warning("%s", warning)
            warnings.append(warning)
    return warnings


def _is(tokenizer: Any, file: Path, reference: Tokenizer) -> bool:
    """Whether the tokenizer is, to the letter, the one that the file holds: then there is nothing to compare."""
    backend = without_limits(tokenizer.backend_tokenizer)
    if backend.encode_special_tokens:  # the one setting that is not part of the file
        return False
    return backend.to_str(pretty=True) == file.read_text(encoding="utf-8") or backend.to_str() == reference.to_str()


def _sentencepiece(model: Path) -> tuple[str, Any] | None:
    """The name of the model's sentencepiece file, and its reader."""
    path = next((model / name for name in SENTENCEPIECE if (model / name).is_file()), None)
    if path is None:
        return None
    from sentencepiece import SentencePieceProcessor

    try:
        return path.name, SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError:  # a tiktoken vocabulary of that name
        return None


def _otherwise(name: str, rows: Sequence[Sequence[str]], reference: Tokenizer, file: str, pieces: Any) -> str | None:
    """How many rows sentencepiece reads otherwise. Texts with added tokens are left out: it finds these by other rules,
    as add-tokens and the proof of reload say."""
    added = [token.content for token in reference.get_added_tokens_decoder().values()]
    differing, example = 0, ""
    for row in rows:
        plain = [text for text in row if not any(content in text for content in added)]
        expected = [encoding.ids for encoding in reference.encode_batch(plain, add_special_tokens=False)]
        found = pieces.encode(plain)
        pair = next((pair for pair in zip(plain, expected, found, strict=True) if pair[1] != pair[2]), None)
        if pair is not None:
            differing += 1
            example = example or _where(*pair, reference)
    if not differing:
        return None
    return (
        f"{name}: {differing:,} of the first {len(rows):,} rows are learned with other ids than engines get that read "
        f"{file} (llama.cpp's converter does): {example}; serve the model with an engine that reads {TOKENIZER}, or "
        "leave such characters out of the rows"
    )


def _where(text: str, expected: Sequence[int], found: Sequence[int], reference: Tokenizer) -> str:
    same = next((i for i, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), 0)
    offsets = reference.encode(text, add_special_tokens=False).offsets
    start = offsets[min(same, len(offsets) - 1)][0] if offsets else 0
    return (
        f"{text[start : start + SHOWN]!r} begins with {list(expected[same : same + 4])} by tokenizer.json, "
        f"{list(found[same : same + 4])} by sentencepiece"
    )


def _texts(values: Any) -> Iterator[str]:
    """Every text in the columns, lists and objects of some rows."""
    if isinstance(values, str):
        yield values[:LONG].encode("utf-8", "ignore").decode()
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _texts(value)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _texts(value)
