"""Rows of users as Parquet, which other tools read too.

One column per field of a row, and the user it belongs to. ``memory`` is the bytes of ``[L, D]``
little-endian numbers, as they are in a row: they hardly compress, so they are copied, never
converted. Users are never cut in two: a row group holds all rows of its users.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from marm.memory import Namespace, UserRows

METADATA_KEY = b"marm.rows"
USER_COLUMN = "user_id"
MEMORY_COLUMN = "memory"

_REPETITIVE_COLUMNS = [USER_COLUMN, "author_id", "tag_id", "context_id", "feedback"]


class RowTableError(ValueError):
    """A file is not what `RowWriter` writes; the message says what was expected."""


class RowWriter:
    """Writes rows of one namespace into a Parquet file in memory."""

    def __init__(self, namespace: Namespace) -> None:
        self._schema = _schema_of(namespace)
        self._sink = pa.BufferOutputStream()
        plain = [name for name in self._schema.names if name != MEMORY_COLUMN]
        compression = dict.fromkeys(plain, "zstd")
        if MEMORY_COLUMN in self._schema.names:
            compression[MEMORY_COLUMN] = "none"
        self._writer = pq.ParquetWriter(
            self._sink,
            self._schema,
            compression=compression,
            use_dictionary=_REPETITIVE_COLUMNS,
            write_statistics=[USER_COLUMN, "timestamp_ms"],
        )
        self.users = 0
        self.rows = 0

    @property
    def num_bytes(self) -> int:
        """Bytes written so far."""
        return int(self._sink.tell())

    def write(self, found: UserRows) -> None:
        """Add users as one row group."""
        if not len(found.rows):
            return
        self._writer.write_table(to_table(found, self._schema), row_group_size=len(found.rows))
        self.users += int((found.counts > 0).sum())
        self.rows += len(found.rows)

    def close(self) -> memoryview:
        """The content of the file."""
        self._writer.close()
        return memoryview(self._sink.getvalue())


def read_row_file(content: bytes, namespace: Namespace) -> Iterator[UserRows]:
    """The users of a file that `RowWriter` wrote, a row group at a time."""
    schema = _schema_of(namespace)
    try:
        with pq.ParquetFile(pa.BufferReader(content)) as file:
            if not file.schema_arrow.equals(schema, check_metadata=False):
                raise RowTableError(
                    f"expected rows of {namespace.name} with columns {_described(schema)}, got "
                    f"{_described(file.schema_arrow)}"
                )
            for group in range(file.num_row_groups):
                yield _from_table(file.read_row_group(group), namespace)
    except pa.ArrowException as error:
        raise RowTableError(f"torn or not Parquet ({error})") from error


def to_table(found: UserRows, schema: pa.Schema) -> pa.Table:
    """Rows as a table in ``schema``."""
    columns = []
    for name in schema.names:
        if name == USER_COLUMN:
            columns.append(pa.array(np.repeat(found.user_ids, found.counts)))
        elif name == MEMORY_COLUMN:
            columns.append(_memory_column(found.rows, schema.field(name).type))
        else:
            columns.append(pa.array(np.ascontiguousarray(found.rows[name])))
    return pa.table(columns, schema=schema)


def _memory_column(rows: NDArray[np.void], kind: pa.DataType) -> pa.Array:
    content = np.ascontiguousarray(rows["memory"])
    buffers = [None, pa.py_buffer(content.view(np.uint8).reshape(-1))]
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(rows), buffers)


def _from_table(table: pa.Table, namespace: Namespace) -> UserRows:
    rows = np.zeros(table.num_rows, namespace.row_dtype)
    for name in table.column_names:
        if name == MEMORY_COLUMN:
            for start, chunk in _chunks(table.column(name)):
                width = chunk.type.byte_width
                content = np.frombuffer(chunk.buffers()[1], np.uint8)
                content = content[chunk.offset * width : (chunk.offset + len(chunk)) * width]
                shape = (len(chunk), *rows["memory"].shape[1:])
                decoded = content.view(namespace.memory_dtype).reshape(shape)
                rows["memory"][start : start + len(chunk)] = decoded
        elif name != USER_COLUMN:
            rows[name] = table.column(name).to_numpy()
    owner = table.column(USER_COLUMN).to_numpy()
    starts = np.flatnonzero(np.diff(owner, prepend=owner[:1] - 1)) if len(owner) else owner
    users = owner[starts].astype(np.int64)
    if len(np.unique(users)) != len(users):
        raise RowTableError("rows of a user must stand together, but some are apart")
    return UserRows(users, np.append(starts, len(owner)).astype(np.int64), rows)


def _described(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def _chunks(column: pa.ChunkedArray) -> Iterator[tuple[int, pa.Array]]:
    start = 0
    for chunk in column.chunks:
        yield start, chunk
        start += len(chunk)


def _schema_of(namespace: Namespace) -> pa.Schema:
    fields = [pa.field(USER_COLUMN, pa.int64(), nullable=False)]
    dtype = namespace.row_dtype
    for name in dtype.names or ():
        if name != MEMORY_COLUMN:
            fields.append(pa.field(name, pa.from_numpy_dtype(dtype[name]), nullable=False))
        elif dtype[name].itemsize:  # a memory of depth 0 has no bytes
            fields.append(pa.field(name, pa.binary(dtype[name].itemsize), nullable=False))
    described = {
        "namespace": asdict(namespace),
        "memory": f"{namespace.memory_dtype.str} [{namespace.depth}, {namespace.dim}]",
    }
    return pa.schema(fields, metadata={METADATA_KEY: json.dumps(described)})
