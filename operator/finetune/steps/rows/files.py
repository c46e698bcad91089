"""Files of rows, in a claim or fetched from a bucket: how they are written, and what `datasets` has to be asked for."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.api.contract import ExitCode
from finetune.api.spec import DatasetSource, FileFormat
from finetune.steps.rows import compressed, file_checks, json_documents
from finetune.steps.rows.formats import is_row
from finetune.steps.runtime.failure import StepFailure

SUFFIXES = {
    ".jsonl": FileFormat.JSONL,
    ".ndjson": FileFormat.JSONL,
    ".json": FileFormat.JSON,
    ".csv": FileFormat.CSV,
    ".tsv": FileFormat.TSV,
    ".parquet": FileFormat.PARQUET,
    ".txt": FileFormat.PLAIN_TEXT,
}
"""How a file is written, by the end of its name."""

BUILDERS = {
    FileFormat.JSONL: "json",
    FileFormat.JSON: "json",
    FileFormat.CSV: "csv",
    FileFormat.TSV: "csv",
    FileFormat.PARQUET: "parquet",
    FileFormat.PLAIN_TEXT: "text",
}
"""The builder of `datasets` for a way of writing."""

LINES = (FileFormat.JSONL, FileFormat.JSON)
"""What `json_rows` reads."""

WHAT_IS_WRONG: dict[type[file_checks.BadFile], tuple[str, str]] = {
    file_checks.NotUtf8: ("NotUtf8", "Convert the file to UTF-8, for example with iconv."),
    file_checks.DifferentColumns: ("MixedFormats", "Put files with different columns into sources of their own."),
    file_checks.Damaged: ("DamagedFile", "Copy the file again; it may be cut off."),
    compressed.Archive: ("UnknownFormat", "Unpack it, and put its files into a folder that the source names."),
    file_checks.BadFile: ("MalformedRow", "Mend the file."),
}


def failure(error: file_checks.BadFile, source: DatasetSource, field: str) -> StepFailure:
    """What is wrong with a file, as the user gets to read it."""
    reason, hint = WHAT_IS_WRONG[type(error)]
    return StepFailure(ExitCode.BAD_DATA, reason, f"{field}.uri: {source.uri}: {error}", hint)


def location(place: Path, source: DatasetSource, cache: Path, field: str) -> dict[str, Any]:
    """The arguments of `datasets.load_dataset_builder` for a file or folder that exists."""
    kind = source.file_format or _kind(place, source, field)
    paths = [place]
    if place.is_dir():
        paths = [path for path in sorted(place.rglob("*")) if path.is_file()]
        if source.file_format is None:
            paths = [path for path in paths if _by_name(path) == kind]
    try:
        place, paths = _unpacked(place, paths, kind, cache / re.sub(r"\W+", "-", field))
        options = _options(kind, paths)
    except file_checks.BadFile as error:
        raise failure(error, source, field) from error
    if place.is_dir() and source.file_format is None:
        return {"path": str(place), **options}  # the names of its files tell train from test
    return {"path": BUILDERS[kind], "data_files": [glob.escape(str(path)) for path in paths], **options}


def line(paths: Sequence[Any], index: int, cache: Path) -> str | None:
    """Where the row of this number stands in these files, if they are the user's own files of lines and not made of
    such below `cache`."""
    for path in map(Path, map(str, paths)):
        ours = path.is_relative_to(cache) and not path.is_symlink()
        if (
            ours
            or not path.is_file()
            or (kind := _by_name(path)) not in (FileFormat.JSONL, FileFormat.CSV, FileFormat.TSV)
        ):
            return None
        for number in file_checks.lines_of_rows(path, {FileFormat.CSV: ",", FileFormat.TSV: "\t"}.get(kind)):
            if not index:
                return f"line {number} of {path.name}"
            index -= 1
    return None


def _by_name(path: Path) -> FileFormat | None:
    suffix = next((suffix for suffix in reversed(path.suffixes) if suffix.lower() not in compressed.OPENERS), "")
    return SUFFIXES.get(suffix.lower())


def _kind(place: Path, source: DatasetSource, field: str) -> FileFormat:
    """The one way in which a file or the files of a folder are written; plain text counts only where there is nothing
    else, since licences and notes are written so."""
    paths = sorted(place.rglob("*"), reverse=True) if place.is_dir() else [place]
    found = {kind: path.name for path in paths if (kind := _by_name(path))}
    if len(found) > 1:
        found.pop(FileFormat.PLAIN_TEXT, None)
    if not found:
        what = "holds no file that ends" if place.is_dir() else "does not end"
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "UnknownFormat",
            f"{field}.uri: {source.uri} {what} in one of {', '.join(SUFFIXES)}, "
            f"be it compressed ({', '.join(compressed.OPENERS)}) or not",
            f"Say in {field}.fileFormat how it is written, or rename it.",
        )
    if len(found) > 1:
        raise StepFailure(
            ExitCode.BAD_DATA,
            "MixedFormats",
            f"{field}.uri: {source.uri} holds files of several formats: {', '.join(sorted(found.values()))}",
            "Make each format a source of its own.",
        )
    return next(iter(found))


def _options(kind: FileFormat, paths: list[Path]) -> dict[str, Any]:
    """What the builder has to know about these files, which are looked through first."""
    if kind == FileFormat.PARQUET:
        file_checks.require_parquet(paths)
    elif kind not in LINES:
        file_checks.require_text(paths)
    if kind == FileFormat.PLAIN_TEXT:
        return {"sample_by": "paragraph"}
    if kind not in (FileFormat.CSV, FileFormat.TSV):
        return {}
    import datasets

    # Without guessing at types: "007", "1.50" and "NA" stay what they are.
    separator = "\t" if kind == FileFormat.TSV else ","
    columns = file_checks.csv_columns(paths, separator)
    features = datasets.Features({column: datasets.Value("string") for column in columns})
    return {"sep": separator, "features": features, "keep_default_na": False}


def _unpacked(place: Path, paths: list[Path], kind: FileFormat, folder: Path) -> tuple[Path, list[Path]]:
    """The same files with none of them compressed and all JSON as lines: below `folder`, with the same names, if any
    has to be written anew."""
    root = place if place.is_dir() else place.parent
    packed = {path for path in paths if compressed.compression(path)}
    documents = {
        path for path in paths if kind in LINES and path not in packed and json_documents.is_document(path, is_row)
    }
    if not packed and not documents:
        return place, paths
    written = []
    for path in paths:
        target = folder / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        source = path
        if path in packed:
            target = source = target.with_name(_plain_name(path))
            compressed.unpack(path, target)
        if path in documents or (path in packed and kind in LINES and json_documents.is_document(source, is_row)):
            target = target.with_name(f"{Path(_plain_name(path)).stem}.jsonl")
            if target == source:
                source = source.rename(source.with_name(f".{source.name}"))
            json_documents.write_as_lines(source, target, is_row)
            if path in packed:
                source.unlink()
        elif path not in packed:
            target.unlink(missing_ok=True)
            target.symlink_to(path)
        written.append(target)
    return (folder if place.is_dir() else written[0]), written


def _plain_name(path: Path) -> str:
    return path.stem if path.suffix.lower() in compressed.OPENERS else path.name
