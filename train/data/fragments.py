"""Pieces of source files that are read independently, and always add up to the whole file."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from train.data.ingest_report import IngestError

CSV_FRAGMENT_BYTES = 32 << 20
_ORDINAL_BITS = 32


@dataclass(frozen=True)
class Fragment:
    """Bytes ``start`` to ``end`` of a CSV file (whole lines), or row group ``start`` of Parquet."""

    path: str
    start: int
    end: int
    index: int  # place of the fragment in the source
    num_bytes: int  # about what its rows take

    @property
    def first_ordinal(self) -> int:
        """Number of the fragment's first row; rows of later fragments have larger numbers."""
        return self.index << _ORDINAL_BITS


@dataclass(frozen=True)
class CsvLayout:
    """How lines become columns: the names in file order, of which ``wanted`` are read.

    A ``"::"`` delimiter, as MovieLens uses, is read as ``":"`` with empty columns between.
    """

    delimiter: str
    names: tuple[str, ...]
    wanted: tuple[str, ...]


@dataclass(frozen=True)
class RawRows:
    """A fragment's rows as read. ``num_malformed`` lines did not have the columns."""

    table: pa.Table
    num_malformed: int


def csv_header(path: Path, delimiter: str = ",") -> list[str]:
    """Column names in the first line of a CSV file."""
    with open_source(path) as file:
        line = file.readline(1 << 20)
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise IngestError(f"{path} is not a CSV file: its first line is not text") from error
    if not text.strip():
        raise IngestError(f"{path} is empty; expected a CSV file with a header line")
    return [name.strip().strip('"') for name in text.rstrip("\r\n").split(delimiter)]


def csv_fragments(
    paths: list[Path], has_header: bool, fragment_bytes: int = CSV_FRAGMENT_BYTES
) -> list[Fragment]:
    """Cut CSV files at line ends, about every ``fragment_bytes``."""
    fragments: list[Fragment] = []
    for path in paths:
        with open_source(path) as file:
            start = len(file.readline()) if has_header else 0
            size = path.stat().st_size
            while start < size:
                file.seek(min(start + fragment_bytes, size) - 1)
                file.readline()
                end = file.tell()
                fragments.append(Fragment(str(path), start, end, len(fragments), end - start))
                start = end
    return fragments


def parquet_fragments(paths: list[Path]) -> list[Fragment]:
    """The row groups of Parquet files."""
    fragments: list[Fragment] = []
    for path in paths:
        with parquet_file(path) as file:
            sizes = [
                file.metadata.row_group(group).total_byte_size
                for group in range(file.metadata.num_row_groups)
            ]
        for group, size in enumerate(sizes):
            fragments.append(Fragment(str(path), group, group + 1, len(fragments), size))
    return fragments


def parquet_file(path: Path) -> pq.ParquetFile:
    """Open a Parquet file, or say why it can't be."""
    with open_source(path):
        pass
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise IngestError(f"{path} is not a readable Parquet file: {error}") from error


def open_source(path: Path) -> io.BufferedReader:
    """Open a file for reading, or say why it can't be."""
    try:
        return path.open("rb")
    except OSError as error:
        raise IngestError(f"can't read {path}: {error.strerror}; check the path") from error


def read_csv(fragment: Fragment, layout: CsvLayout) -> RawRows:
    """Rows of a CSV fragment. Columns that hold anything but numbers come back as text."""
    with open_source(Path(fragment.path)) as file:
        file.seek(fragment.start)
        data = file.read(fragment.end - fragment.start)
    try:
        return _parse_csv(data, layout, as_text=False)
    except pa.ArrowInvalid:  # a value that does not fit its column: let rows be judged one by one
        try:
            return _parse_csv(data, layout, as_text=True)
        except pa.ArrowInvalid as error:
            raise IngestError(f"{fragment.path} is not readable as CSV: {error}") from error


def read_parquet(fragment: Fragment, columns: list[str]) -> RawRows:
    """Rows of a Parquet fragment."""
    with parquet_file(Path(fragment.path)) as file:
        _require_plain(fragment.path, file.schema_arrow, columns)
        try:
            return RawRows(file.read_row_group(fragment.start, columns), 0)
        except (pa.ArrowException, OSError) as error:
            raise IngestError(f"{fragment.path} is damaged: {error}") from error


def _require_plain(path: str, schema: pa.Schema, columns: list[str]) -> None:
    """Refuse columns of extension types: Ray Data registers one whose values are pickles, and
    looking at a value would run whatever the file's author put there."""
    for name in columns:
        kind = schema.field(name).type if name in schema.names else None
        while kind is not None and pa.types.is_dictionary(kind):
            kind = kind.value_type
        if isinstance(kind, pa.BaseExtensionType):
            raise IngestError(
                f"{path}: column {name!r} has the extension type {kind}; expected plain numbers, "
                "text or times: write it without the extension"
            )


def _parse_csv(data: bytes, layout: CsvLayout, as_text: bool) -> RawRows:
    num_malformed = 0

    def skip(row: csv.InvalidRow) -> str:
        nonlocal num_malformed
        num_malformed += 1
        return "skip"

    names = list(layout.names)
    if layout.delimiter == "::":
        names = [part for name in names for part in (name, f"{name} end")][:-1]
    types = dict.fromkeys(layout.wanted, pa.string()) if as_text else {}
    table = csv.read_csv(
        pa.BufferReader(data),
        read_options=csv.ReadOptions(column_names=names, use_threads=False),
        parse_options=csv.ParseOptions(
            delimiter=layout.delimiter[0], invalid_row_handler=skip, newlines_in_values=False
        ),
        convert_options=csv.ConvertOptions(
            include_columns=list(layout.wanted), column_types=types, strings_can_be_null=True
        ),
    )
    return RawRows(table, num_malformed)
