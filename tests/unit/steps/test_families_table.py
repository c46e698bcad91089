"""docs/families.md says what a run of each row says; a row of each kind is run here, all of them by `make families`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families import DOCUMENT, FAMILIES, Family, line, row_of

RUN = ("gpt_neox", "qwen3_moe", "gemma3", "glm4_moe", "gpt_oss (MXFP4)", "bart")


def test_the_table_has_every_family_and_no_cell_fails() -> None:
    text = DOCUMENT.read_text()
    assert len(FAMILIES) >= 24
    assert [family.name for family in FAMILIES if f"`{family.name}`" not in text] == []
    assert "FAILS" not in text


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family.name in RUN], ids=lambda each: each.name)
def test_a_row_is_what_a_run_says(family: Family, tmp_path: Path) -> None:
    assert line(family, row_of(family, tmp_path)) in DOCUMENT.read_text().splitlines()
