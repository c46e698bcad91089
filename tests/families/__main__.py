"""Write docs/families.md. With names of rows, only these are run, and the others stay as they are recorded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context

from tests.families import document, llama_cpp
from tests.families.cells import cells_of
from tests.families.document import Cells, Notes, recorded, table
from tests.families.rows import ELSE, FAMILIES
from tests.families.templates import COLUMNS as TEMPLATE_COLUMNS
from tests.families.templates import template_cells
from tests.families.training import COLUMNS
from tests.families.vendors import tokenizer_of
from tests.unit.steps.vendor_templates import TEMPLATES

INTRODUCTION = f"""# Families of models

Made by `make families`: each cell was run, on tiny random weights with the tensor names of published checkpoints, and
none is from memory. {document.YES} it works, {document.NO} it is refused or fails, the note says how, {document.NOTHING} there is nothing to run.

| column | what was run |
|---|---|
| tokens | two tokens are added |
| reload | the extended model is proven to load, and to keep every old byte (where tokens are refused: the model as it is) |
| Full, merge | the published folder has every tensor of the base under its name and loads strictly; merged, it answers as base and adapter do |
| GGUF | with four tokens added, and again after training and save, llama.cpp's converter takes the folder, its binding loads the file, the ids of texts with the tokens are those of tokenizer.json, and probabilities of the next token those of transformers |
| one turn, turns, tools, thoughts | the vendor's chat template, through load-dataset: all that the assistant says, calls and thinks is learned, and nothing of others; {document.NOTHING} the template does not read it (then a row that has it is refused), or no package has the family's template |

A refusal comes before training, with its remedy. What is published quantised is written out in bf16 first: its base is
that.
"""  # noqa: E501


def page(rows: Mapping[str, Cells], templates: Mapping[str, Cells]) -> str:
    """The whole document."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "peft", "trl"))
    lines, notes = [INTRODUCTION, f"With {versions}, and llama.cpp {llama_cpp.version()}.", ""], Notes()
    for kind in dict.fromkeys(family.kind for family in FAMILIES):
        lines += [f"## {kind.capitalize()}", ""]
        some = {family.name: rows[family.name] for family in FAMILIES if family.kind == kind}
        shown = [*COLUMNS, *(("GGUF", *TEMPLATE_COLUMNS) if kind not in ("quantised", "no decoder") else ())]
        lines += table("model_type", shown, some, notes)
    lines += ["## Chat templates of further families", ""]
    lines += table("template", [*TEMPLATE_COLUMNS], templates, notes)
    lines += ["## Notes", "", f"Tokenizers in the column GGUF: {_tokenizers()}.", "", *notes.lines()]
    return "\n".join(lines).rstrip() + "\n"


def _tokenizers() -> str:
    vendors: dict[str, list[str]] = {}
    for family in FAMILIES:
        if family.gguf:
            vendors.setdefault(family.gguf, []).append(f"`{family.name}`")
    small = ", ".join(vendors.pop("Gemma"))
    stand_in = ", ".join([*vendors.pop(ELSE), *vendors.pop("GLM")])
    said = [f"{vendor}'s for {', '.join(names)}" for vendor, names in vendors.items()]
    others = f"for {stand_in} {ELSE}'s stands in for their own, for GLM with its special tokens"
    return "; ".join([*said, f"a small sentencepiece model of Gemma's kind, trained on the spot, for {small}", others])


def main(names: list[str]) -> None:
    """Run rows, all of them without names, and write the document."""
    names = names or [family.name for family in FAMILIES]
    rows: dict[str, Cells] = dict(recorded(document.PATH.read_text()) if document.PATH.is_file() else {})
    llama_cpp.sources()
    for family in FAMILIES:  # before several processes ask for the same
        for vendor in {family.tokenizer, family.gguf} - {None}:
            tokenizer_of(str(vendor))
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for name, cells in zip(names, pool.map(cells_of, names), strict=True):
            rows[name] = cells
            print(name, cells, file=sys.stderr, flush=True)
    used = {family.template for family in FAMILIES}
    others = [name for name in TEMPLATES if name not in used and not name.endswith("_training")]
    document.PATH.write_text(page(rows, {name: template_cells(name) for name in others}))


if __name__ == "__main__":
    main(sys.argv[1:])
