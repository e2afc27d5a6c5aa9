"""Parquet copies of MovieLens and KuaiRand, one row per exposure, as events.

Both have ``user_id``, ``item_id``, ``timestamp`` (s), ``label`` (a long view) and optionally
``seq``, the place of a row within its user's stream, which orders rows of one second.
MovieLens: ``genre``. KuaiRand: ``part`` (``history`` or ``log``), ``is_click``, ``like``,
``play_time_ms``, ``duration_ms``, ``tab``, ``author_id``, ``tag``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from marm.addressing import mix64
from marm.events import EventBatch
from train.data.fragments import parquet_file, parquet_fragments, read_parquet
from train.data.parse_columns import integers, is_text
from train.data.source import require_columns
from train.data.staged_order import in_order
from train.data.staged_rows import clean

LOG_PART = "log"
_PART = "part"
_ORDER = "seq"
_REQUIRED = {
    "user_id": "user_id",
    "item_id": "item_id",
    "timestamp": "timestamp",
    "long_view": "label",
}
_KUAIRAND = {
    **_REQUIRED,
    "click": "is_click",
    "like": "like",
    "watch_time_ms": "play_time_ms",
    "duration_ms": "duration_ms",
}
_NUMBERED_FROM_ZERO = {"author_id": "author_id", "tag_id": "tag", "context_id": "tab"}


def is_kuairand_copy(path: Path) -> bool:
    """Whether the file says which rows are history and which are log, as copies of KuaiRand do."""
    return _PART in _columns_of(path)


def read_movielens_copy(path: Path) -> EventBatch:
    """Events of a copy of MovieLens; the genre, where there is one, is the tag."""
    fields = _REQUIRED | ({"tag_id": "genre"} if "genre" in _columns_of(path) else {})
    table = _read(path, fields, ())
    return in_order(clean(_renamed(table, fields), "s", 0))


def read_kuairand_copy(path: Path) -> tuple[EventBatch, NDArray[np.bool_]]:
    """Events of a copy of KuaiRand, and which of them are of the part ``log``.

    The page is the tab. The clocks of the parts overlap, so a time can't tell them apart.
    """
    table = _read(path, _KUAIRAND, (_PART, *_NUMBERED_FROM_ZERO.values()))
    columns = _renamed(table, _KUAIRAND)
    for name, column in _NUMBERED_FROM_ZERO.items():
        columns = columns.append_column(name, pa.array(_one_based(table.column(column))))
    place = np.arange(table.num_rows)
    # An id of its own follows every row to where it ends up.
    columns = columns.append_column("event_id", pa.array(place))
    events = in_order(clean(columns, "s", 0))
    keys = mix64(place)
    by_key = np.argsort(keys)
    origin = by_key[np.searchsorted(keys[by_key], events.event_key)]
    is_log = pc.equal(table.column(_PART), LOG_PART).to_numpy()
    return events, np.asarray(is_log, np.bool_)[origin]


def _columns_of(path: Path) -> list[str]:
    with parquet_file(path) as file:
        return list(file.schema_arrow.names)


def _read(path: Path, fields: Mapping[str, str], others: tuple[str, ...]) -> pa.Table:
    """The columns, with rows in the order that the copy gives them within a user."""
    have = _columns_of(path)
    need = {**fields, **{name: name for name in others}}
    advice = "Expected a Parquet copy of MovieLens or KuaiRand; ingest other logs with a map."
    require_columns(path, have, need, advice)
    wanted = sorted({*need.values(), *([_ORDER] if _ORDER in have else [])})
    parts = [read_parquet(fragment, wanted).table for fragment in parquet_fragments([path])]
    table = pa.concat_tables(parts)
    return table.sort_by(_ORDER) if _ORDER in have else table


def _renamed(table: pa.Table, fields: Mapping[str, str]) -> pa.Table:
    return pa.table({name: table.column(column) for name, column in fields.items()})


def _one_based(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Numbers from 0 as numbers from 1, as 0 means unknown here; of ``"39,68"`` the first."""
    if is_text(column):
        column = pc.replace_substring_regex(column, r"[,;|].*$", "")
    parsed = integers(column)
    known = ~parsed.is_null & ~parsed.is_malformed & (parsed.values >= 0)
    return np.where(known, parsed.values + 1, 0)
