"""Where rows come from: files in a claim or a bucket, or a dataset on a hub, opened by `datasets` itself.

Splits, slices, configurations and file layouts therefore mean what they mean there. What this module adds is the
translation of everything that can go wrong into an error that names the field and the remedy.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from finetune.api.contract import ExitCode, Layout
from finetune.api.spec import DatasetSource
from finetune.steps.rows import bucket, file_checks, files
from finetune.steps.runtime.failure import StepFailure

HUB, BUCKET = "hf://datasets/", "s3://"


def prepare_environment(cache: Path) -> None:
    """Let the hub's libraries keep their files in `cache`: a pod's root is read-only, and its home may be nowhere.
    To be called before they are imported."""
    os.environ.setdefault("HF_HOME", str(cache))
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def identity(source: DatasetSource, layout: Layout, field: str = "spec.dataset") -> dict[str, Any]:
    """What the rows depend on. Files in a claim or a bucket may change under the same name: sizes and times belong to
    it. `field` is the source's place in the spec."""
    description = source.wire()
    if source.uri.startswith("pvc://"):
        place = layout.claim_path(source.uri)
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        description["files"] = [
            [str(path.relative_to(place)), path.stat().st_size, path.stat().st_mtime_ns]
            for path in files
            if path.is_file()
        ]
    elif source.uri.startswith(BUCKET):
        description["files"] = bucket.listing(source.uri, field)
    return description


class Rows:
    """The rows of a source's split, memory-mapped."""

    def __init__(self, dataset: Any, builder: Any, split: str, cache: Path) -> None:
        """`dataset` is what `builder` gives for `split`; files in `cache` are none of the user's own."""
        self._dataset, self._builder, self._split, self._cache = dataset, builder, split, cache

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, place: int) -> dict[str, Any]:
        row: dict[str, Any] = self._dataset[place]
        return row

    @property
    def column_names(self) -> list[str]:
        return list(self._dataset.column_names)

    def columns(self, names: Iterable[str]) -> Columns:
        """Those of these columns that there are."""
        return Columns(self._dataset.select_columns([name for name in names if name in self.column_names]))

    def line(self, index: int) -> str | None:
        """The line and the file that a row stands in, where it is a file of lines."""
        from datasets import ReadInstruction

        splits = self._builder.info.splits
        parts = ReadInstruction.from_spec(self._split).to_absolute({name: splits[name].num_examples for name in splits})
        for part in parts:
            first, last = part.from_ or 0, part.to if part.to is not None else splits[part.splitname].num_examples
            if index < last - first:
                return files.line(self._builder.config.data_files[part.splitname], first + index, self._cache)
            index -= last - first
        return None


def opened(source: DatasetSource, layout: Layout, cache: Path, field: str) -> Rows:
    """The rows of the source's split. `field` is its place in the spec."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError

    builder = None
    try:
        builder = datasets.load_dataset_builder(
            **_location(source, layout, cache, field), name=source.subset, cache_dir=str(cache)
        )
        builder = _exact(builder)
        builder.download_and_prepare()
        rows = Rows(builder.as_dataset(split=source.split), builder, source.split, cache)
    except DatasetNotFoundError as error:
        gated = "gated" in str(error).lower()
        raise StepFailure(
            ExitCode.NO_INPUT,
            "DatasetGated" if gated else "DatasetNotFound",
            f"{field}.uri: {source.uri} at revision {source.revision}: {_first_line(error)}",
            "Accept its conditions and put a Secret with HF_TOKEN into spec.credentials."
            if gated
            else "Check the name and the revision; a private dataset needs a Secret with HF_TOKEN in spec.credentials.",
        ) from error
    except StepFailure:
        raise
    except HfHubHTTPError as error:
        raise _unreachable(source, field, error) from error
    except Exception as error:
        raise _failure(error, builder, source, field) from error
    if len(rows) == 0:
        raise _empty(source, field)
    return rows


class Columns:
    """Some columns of rows, by slices: an Arrow table where the values are stored as they are, and lists by column
    where they have to be decoded (JSON of varying shape)."""

    def __init__(self, rows: Any) -> None:
        from datasets.features.features import require_decoding

        self._decoded = any(require_decoding(feature) for feature in rows.features.values())
        self._rows = rows if self._decoded else rows.with_format("arrow")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: slice) -> Any:
        from finetune.steps.rows.json_rows import is_json, values_of

        some = self._rows[place]
        if self._decoded or not any(is_json(field.type) for field in some.schema):
            return some
        return {name: values_of(name, some[name]) for name in some.column_names}


def _exact(builder: Any) -> Any:
    """The builder itself, or ours where that of `datasets` would guess at types by the first rows."""
    from finetune.steps.rows.json_rows import JsonRows
    from finetune.steps.rows.parquet_rows import ParquetRows

    ours = {"json": JsonRows, "parquet": ParquetRows}.get(type(builder).__module__.rpartition(".")[2])
    if ours is None or builder.info.features or getattr(builder.config, "field", None):
        return builder
    return ours(
        cache_dir=builder._cache_dir_root,
        data_files=builder.config.data_files,
        base_path=builder.base_path,
        repo_id=builder.repo_id,
        token=builder.token,
    )


def _location(source: DatasetSource, layout: Layout, cache: Path, field: str) -> dict[str, Any]:
    """What `datasets` has to be asked for."""
    if source.uri.startswith(HUB):
        return {"path": source.uri.removeprefix(HUB), "revision": source.revision}
    if source.uri.startswith(BUCKET):
        place = bucket.fetched(source.uri, cache / "bucket", field)
    else:
        place = layout.claim_path(source.uri)
    if not place.exists():
        raise StepFailure(
            ExitCode.NO_INPUT,
            "DatasetNotFound",
            f"{field}.uri: {source.uri} does not exist",
            f"The claim holds: {', '.join(_neighbours(place)) or 'nothing'}.",
        )
    return files.location(place, source, cache, field)


def _neighbours(place: Path) -> list[str]:
    """What lies in the nearest folder that exists, to help against a typing error."""
    folder = next((parent for parent in place.parents if parent.is_dir()), None)
    return sorted(path.name for path in folder.iterdir())[:20] if folder else []


def _failure(error: Exception, builder: Any, source: DatasetSource, field: str) -> Exception:
    """The failure that something which `datasets` raised amounts to; by its words where it has no class for it."""
    from datasets.table import CastError

    causes = list(_causes(error))
    if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
        return _empty(source, field)
    text = " | ".join(str(cause) for cause in causes)
    if any(isinstance(cause, OSError) and cause.errno is not None for cause in causes):
        return next(cause for cause in causes if isinstance(cause, OSError) and cause.errno is not None)
    if isinstance(error, ConnectionError) or any("httpx" in type(cause).__module__ for cause in causes):
        return _unreachable(source, field, error)
    if "nknown split" in text or "nrecognized instruction format" in text:
        return StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "UnknownSplit",
            f"{field}.split: {source.split}: {_first_line(error)}",
            "Name a split that the dataset has.",
        )
    if "BuilderConfig" in text or "Config name is missing" in text:
        return StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "UnknownSubset",
            f"{field}.subset: {source.subset}: {_first_line(error)}",
            "Name one of the dataset's configurations.",
        )
    bad = next((cause for cause in causes if isinstance(cause, file_checks.BadFile)), None)
    if isinstance(bad, file_checks.Empty):
        return _empty(source, field)
    if bad:
        return files.failure(bad, source, field)
    if different := next((cause for cause in causes if isinstance(cause, CastError)), None):
        columns = ", ".join(different.requested_column_names)
        found = f"its files have different columns: beside those of the first ({columns}) {different.details()}"
        return files.failure(file_checks.DifferentColumns(found), source, field)
    undecodable = next((cause for cause in causes if isinstance(cause, UnicodeDecodeError)), None)
    if undecodable:
        return files.failure(file_checks.NotUtf8(str(undecodable)), source, field)
    if "Parquet" in text:
        return files.failure(file_checks.Damaged(_first_line(causes[-1])), source, field)
    if builder is None:
        return StepFailure(
            ExitCode.NO_INPUT,
            "DatasetNotFound",
            f"{field}.uri: {source.uri}: {_first_line(error)}",
            "The place must hold JSONL, JSON, CSV, Parquet or plain text files.",
        )
    cause = file_checks.BadFile(_first_line(causes[1] if len(causes) > 1 else error))
    return files.failure(cause, source, field)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _empty(source: DatasetSource, field: str) -> StepFailure:
    return StepFailure(
        ExitCode.BAD_DATA,
        "EmptyDataset",
        f"{field}: {source.uri} has no rows in {source.split}",
        "Check the file and the split.",
    )


def _unreachable(source: DatasetSource, field: str, error: Exception) -> StepFailure:
    return StepFailure(
        ExitCode.UNAVAILABLE,
        "HubUnavailable",
        f"{field}.uri: {source.uri}: {_first_line(error)}",
        "The operator tries again.",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
