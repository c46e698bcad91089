"""Parquet files whose columns have other types in other files: `datasets` takes those of the first file for all.

What fits together (nothing and something, short and long integers) becomes one Arrow column; any other column becomes
JSON, each value as its own file has it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.packaged_modules.parquet.parquet import Parquet

from finetune.steps.rows.file_checks import require_common
from finetune.steps.rows.json_rows import AS_WRITTEN


class ParquetRows(Parquet):  # type: ignore[misc]
    """The builder of `datasets` with features that fit all files."""

    def _split_generators(self, dl_manager: Any) -> Any:
        if self.info.features is None:
            files = dl_manager.download(self.config.data_files)
            schemas: list[pa.Schema] = []
            for path in (path for paths in files.values() for path in paths):
                schema = pq.read_schema(path)
                require_common(schema.names, (name for known in schemas for name in known.names), Path(path).name)
                schemas.append(schema)
            if any(not schema.equals(schemas[0]) for schema in schemas):
                self.info.features = _features(schemas)
        return super()._split_generators(dl_manager)

    def _cast_table(self, pa_table: pa.Table) -> pa.Table:
        for index, name in enumerate(pa_table.column_names):
            if self.info.features.get(name) == AS_WRITTEN:
                values = [
                    None if value is None else json.dumps(value, default=str) for value in pa_table[name].to_pylist()
                ]
                pa_table = pa_table.set_column(index, name, pa.array(values, pa.string()))
        return super()._cast_table(pa_table)


def _features(schemas: list[pa.Schema]) -> datasets.Features:
    first = datasets.Features.from_arrow_schema(schemas[0])  # knows what `datasets` itself wrote, such as class labels
    features = {}
    for name in dict.fromkeys(name for schema in schemas for name in schema.names):
        fields = [schema.field(name) for schema in schemas if name in schema.names]
        kind = _common(fields)
        if name in first and kind == fields[0].type:
            features[name] = first[name]
        else:
            features[name] = AS_WRITTEN if kind is None else datasets.features.features.generate_from_arrow_type(kind)
    return datasets.Features(features)


def _common(fields: list[pa.Field]) -> pa.DataType | None:
    """The type that holds the values of all files as they are."""
    kinds = [field.type for field in fields if not pa.types.is_null(field.type)]
    if any(map(pa.types.is_nested, kinds)):
        return kinds[0] if all(kind == kinds[0] for kind in kinds) else None  # nothing is filled up with null
    alike = any(all(map(test, kinds)) for test in (pa.types.is_integer, pa.types.is_floating, _is_text))
    try:
        merged = pa.unify_schemas(
            [pa.schema([pa.field(field.name, field.type)]) for field in fields],
            promote_options="permissive" if alike else "default",
        )
    except pa.ArrowException:
        return None
    return merged.field(0).type


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
