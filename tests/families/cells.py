"""All cells of a row, in a process that may be one of several."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from finetune.steps.runtime.failure import StepFailure
from tests.families.document import Cells
from tests.families.gguf import gguf_of
from tests.families.loading import downloaded
from tests.families.rows import FAMILIES, Family
from tests.families.templates import template_cells
from tests.families.training import said, training_cells
from tests.families.vendors import tokenizer_of


def cells_of(name: str) -> Cells:
    """A row's cells."""
    logging.disable()
    (family,) = (each for each in FAMILIES if each.name == name)
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        tokenizer = tokenizer_of(family.tokenizer) if family.tokenizer else None
        cells = training_cells(lambda target: family.make(target, tokenizer), folder)
        if family.template:
            cells |= template_cells(family.template)
        if family.gguf:
            cells["GGUF"] = _gguf(family, family.gguf, folder / "gguf")
    return cells


def _gguf(family: Family, vendor: str, folder: Path) -> str:
    tokenizer = tokenizer_of(vendor)
    try:
        return gguf_of(vendor, downloaded(folder, lambda target: family.make(target, tokenizer)), folder)
    except StepFailure as failure:
        return said(failure)
    except Exception as error:
        return f"FAILS: {type(error).__name__}: {str(error).partition(chr(10))[0][:80]}"
