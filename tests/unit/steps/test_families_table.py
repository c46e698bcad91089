"""docs/families.md says what a run of each row says; a row of each kind is run here, all of them by `make families`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families.document import PATH, Notes, recorded, table
from tests.families.rows import FAMILIES, Family
from tests.families.templates import template_cells
from tests.families.training import training_cells

RUN = ("gpt_neox", "qwen3_moe", "gemma3", "glm4_moe", "gpt_oss (MXFP4)", "bart")
TEXT = PATH.read_text()


def test_the_table_has_every_family_and_no_cell_fails() -> None:
    assert len(FAMILIES) >= 24
    assert [family.name for family in FAMILIES if family.name not in recorded(TEXT)] == []
    assert "FAILS" not in TEXT


def test_a_page_is_read_as_it_was_written() -> None:
    cells = {"one": "yes", "two": "yes; <x> | y", "three": "refused: Why", "four": "-"}
    rows, notes = {"a": cells, "b (B)": cells | {"one": "refused: Why"}}, Notes()
    text = "\n".join([*table("name", [*cells], rows, notes), *notes.lines()])
    assert recorded(text) == rows


@pytest.mark.parametrize("family", [each for each in FAMILIES if each.template], ids=lambda each: each.name)
def test_the_cells_of_a_chat_template_are_what_a_run_says(family: Family) -> None:
    found = template_cells(family.template or "")
    assert recorded(TEXT)[family.name] | found == recorded(TEXT)[family.name]


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family.name in RUN], ids=lambda each: each.name)
def test_a_row_is_what_a_run_says(family: Family, tmp_path: Path) -> None:
    found = training_cells(lambda folder: family.make(folder, None), tmp_path)
    assert recorded(TEXT)[family.name] | found == recorded(TEXT)[family.name]
