"""Any Parquet log, with a map from fields to the columns that hold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from marm.events import BINARY_TASKS
from train.data.fragments import Fragment, RawRows, parquet_file, parquet_fragments, read_parquet
from train.data.ingest_report import IngestError
from train.data.parse_columns import UNIT_MS, guess_unit, numbers
from train.data.source import Source, require_columns, resolve
from train.data.staged_rows import FIELDS, LABEL_FIELDS, REQUIRED_FIELDS

_SAMPLE_ROWS = 10_000


@dataclass(frozen=True)
class MappedLayout:
    """Reads the columns of a map."""

    columns: tuple[tuple[str, str], ...]  # (field, column)

    def read(self, fragment: Fragment) -> RawRows:
        """See `Layout.read`."""
        raw = read_parquet(fragment, sorted({column for _, column in self.columns}))
        table = pa.table({name: raw.table.column(column) for name, column in self.columns})
        return RawRows(table, raw.num_malformed)


def parse_column_map(pairs: Iterable[str]) -> dict[str, str]:
    """``["item_id=movie", "long_view=label"]`` as a dictionary."""
    column_map: dict[str, str] = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not equals or not name or not column:
            raise IngestError(f"expected --map FIELD=COLUMN, got {pair!r}")
        if name in column_map:
            raise IngestError(f"--map names the field {name!r} twice")
        column_map[name] = column
    return column_map


def open_parquet(path: str, column_map: Mapping[str, str], timestamp_unit: str = "auto") -> Source:
    """Plan the ingest of Parquet files. Fields that are not mapped are taken from a column of their
    own name, where there is one."""
    unknown = sorted(set(column_map) - set(FIELDS))
    if unknown:
        raise IngestError(f"unknown field {', '.join(unknown)}; fields are {', '.join(FIELDS)}")
    if timestamp_unit not in ("auto", *UNIT_MS):
        raise IngestError(f"timestamp unit must be auto or {', '.join(UNIT_MS)}: {timestamp_unit}")
    files = resolve(path, "*.parquet")
    for file in files:
        with parquet_file(file) as opened:
            columns = _match_columns(file, opened.schema_arrow.names, column_map)
    fragments = parquet_fragments(files)
    with parquet_file(files[0]) as opened:
        unit = _check_sample(files[0], opened, columns, timestamp_unit)
    return Source(
        format="parquet",
        files=files,
        fragments=fragments,
        layout=MappedLayout(tuple(columns.items())),
        timestamp_unit=unit,
        notes=[f"{name} from column {column}" for name, column in columns.items()]
        + [f"numeric timestamps are in {unit}"],
    )


def _match_columns(file: Path, have: list[str], column_map: Mapping[str, str]) -> dict[str, str]:
    by_name = {name: name for name in FIELDS if name in have}
    columns = {**by_name, **column_map}
    need = {name: columns.get(name, name) for name in REQUIRED_FIELDS} | dict(column_map)
    missing = [name for name, column in need.items() if column not in have]
    advice = "Pass " + " ".join(f"--map {name}=COLUMN" for name in missing) + "."
    require_columns(file, have, need, advice)
    if not any(name in columns for name in LABEL_FIELDS):
        raise IngestError(
            f"{file} has no label: none of {', '.join(LABEL_FIELDS)} is among its columns, which "
            f"are {', '.join(have)}. Pass for example --map long_view=COLUMN."
        )
    return columns


def _check_sample(
    file: Path, opened: pq.ParquetFile, columns: dict[str, str], timestamp_unit: str
) -> str:
    """Look at the first rows for a column that can't be what it is mapped to; the time unit."""
    names = sorted(set(columns.values()))
    sample = next(opened.iter_batches(_SAMPLE_ROWS, columns=names), None)
    if sample is None or not sample.num_rows:
        return "ms" if timestamp_unit == "auto" else timestamp_unit
    for name in ("user_id", "item_id"):
        kind = sample.column(columns[name]).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (_is_number(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise IngestError(f"{file}: {columns[name]!r} is {kind}, but {name} must be integers")
    for task in BINARY_TASKS:
        if task in columns:
            values = numbers(sample.column(columns[task]))
            given = values[~np.isnan(values)]
            if len(given) < np.count_nonzero(sample.column(columns[task]).is_valid()):
                raise IngestError(
                    f"{file}: {columns[task]!r} is {sample.column(columns[task]).type} with values "
                    f"that are not numbers, but {task} must be 0 or 1"
                )
            if np.count_nonzero((given != 0) & (given != 1)) > len(given) / 2:
                raise IngestError(
                    f"{file}: {columns[task]!r} holds values like {given[:3].tolist()}, but {task} "
                    "must be 0 or 1; add a column of 0 and 1 and map that"
                )
    if timestamp_unit != "auto":
        return timestamp_unit
    return guess_unit(sample.column(columns["timestamp"]))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))
