"""Rows between a source and the log: cleaned, but not yet in order.

The columns of `STAGED_SCHEMA` travel through Ray Data. A tally is a row with a ``tally`` name and
an ``amount``; it sorts before every event, so counts and problems of all blocks come first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from marm.addressing import mix64
from marm.events import BINARY_TASKS, EVENT_DTYPES, TASKS, WATCH_TIME
from train.data.parse_columns import Integers, integers, is_text, numbers, stable_ids, timestamps_ms

SORT_KEY = ["timestamp_ms", "user_id", "ordinal"]
"""Time order; within a user and a millisecond, the order of the source."""

FEATURE_FIELDS = ("author_id", "tag_id", "duration_ms", "context_id")
REQUIRED_FIELDS = ("user_id", "item_id", "timestamp")
FIELDS = (*REQUIRED_FIELDS, *FEATURE_FIELDS, "event_id", *TASKS, "watch_time_ms")
"""Columns that `clean` understands in its input."""

LABEL_FIELDS = (*TASKS, "watch_time_ms")

STAGED_SCHEMA = pa.schema(
    [
        ("ordinal", pa.int64()),
        *((name, pa.from_numpy_dtype(dtype)) for name, dtype in EVENT_DTYPES.items()),
        *((task, pa.float32()) for task in TASKS),
        ("tally", pa.string()),
        ("amount", pa.int64()),
    ]
)

PROBLEM = "problem:"
"""Start of the name of a tally that says why a fragment could not be read."""

_CONTEXT_BITS = 31
_TALLY_TIME_MS = -1


@dataclass
class _Judgement:
    """Which rows stay, and the counts so far. The first reason to drop a row is the one counted."""

    keep: NDArray[np.bool_]
    tallies: dict[str, int]

    def drop(self, rows: NDArray[np.bool_], reason: str) -> None:
        self._count(f"dropped:{reason}", self.keep & rows)
        self.keep &= ~rows

    def repair(self, rows: NDArray[np.bool_], what: str) -> None:
        self._count(f"repaired:{what}", self.keep & rows)

    def _count(self, name: str, rows: NDArray[np.bool_]) -> None:
        if amount := int(np.count_nonzero(rows)):
            self.tallies[name] = self.tallies.get(name, 0) + amount


def clean(table: pa.Table, unit: str, first_ordinal: int, malformed_rows: int = 0) -> pa.Table:
    """Rows of a table with columns of `FIELDS` in `STAGED_SCHEMA`, and a tally of the others."""
    tallies = {"rows": table.num_rows + malformed_rows}
    if malformed_rows:
        tallies["dropped:malformed_row"] = malformed_rows
    judged = _Judgement(np.ones(table.num_rows, np.bool_), tallies)
    ids = {name: integers(table.column(name)) for name in ("user_id", "item_id")}
    for name, parsed in ids.items():
        _judge_integers(judged, parsed, name)
        judged.drop(parsed.values < 0, f"negative_{name}")
    times = timestamps_ms(table.column("timestamp"), unit)
    _judge_integers(judged, times, "timestamp")
    labels = _labels(table, judged)
    judged.drop(np.asarray(np.isnan(labels).all(axis=1)), "no_label")
    columns = {
        "ordinal": first_ordinal + np.arange(table.num_rows),
        "user_id": ids["user_id"].values,
        "item_id": ids["item_id"].values,
        "timestamp_ms": times.values,
        "event_key": _event_keys(table),
        **{name: _feature(table, name, judged) for name in FEATURE_FIELDS},
        **{task: labels[:, index] for index, task in enumerate(TASKS)},
    }
    kept = np.flatnonzero(judged.keep)
    rows = pa.table(
        {
            **{name: column[kept] for name, column in columns.items()},
            "tally": pa.nulls(len(kept), pa.string()).fill_null(""),
            "amount": np.zeros(len(kept), np.int64),
        },
    ).cast(STAGED_SCHEMA)
    return pa.concat_tables([tally_rows(judged.tallies), rows])


def tally_rows(tallies: dict[str, int]) -> pa.Table:
    """Tallies as rows that sort before every event."""
    empty = {field.name: np.zeros(len(tallies)) for field in STAGED_SCHEMA}
    return (
        pa.table(
            {
                **empty,
                "timestamp_ms": np.full(len(tallies), _TALLY_TIME_MS),
                "tally": list(tallies),
                "amount": list(tallies.values()),
            }
        )
        .select(STAGED_SCHEMA.names)
        .cast(STAGED_SCHEMA)
    )


def split_tallies(table: pa.Table) -> tuple[pa.Table, dict[str, int]]:
    """The events of a staged table, and its tallies added up by name."""
    is_tally = table.column("timestamp_ms").to_numpy() == _TALLY_TIME_MS
    if not is_tally.any():
        return table, {}
    tallies: dict[str, int] = {}
    counted = table.filter(pa.array(is_tally)).select(["tally", "amount"])
    for row in counted.to_pylist():
        tallies[row["tally"]] = tallies.get(row["tally"], 0) + row["amount"]
    return table.filter(pa.array(~is_tally)), tallies


def _judge_integers(judged: _Judgement, parsed: Integers, name: str) -> None:
    judged.drop(parsed.is_null, f"null_{name}")
    judged.drop(parsed.is_malformed, f"malformed_{name}")


def _labels(table: pa.Table, judged: _Judgement) -> NDArray[np.float32]:
    labels = np.full((table.num_rows, len(TASKS)), np.nan, np.float32)
    for index, task in enumerate(BINARY_TASKS):
        if task in table.column_names:
            values = numbers(table.column(task))
            odd = ~np.isnan(values) & (values != 0) & (values != 1)
            judged.repair(odd, f"{task}_neither_0_nor_1_made_unknown")
            labels[:, index] = np.where(odd, np.nan, values)
    for name, scale in ((WATCH_TIME, 1.0), ("watch_time_ms", 1e-3)):
        if name in table.column_names:
            seconds = numbers(table.column(name)) * scale
            odd = ~np.isnan(seconds) & ~((seconds >= 0) & (seconds < 1e9))
            judged.repair(odd, "watch_time_out_of_range_made_unknown")
            labels[:, TASKS.index(WATCH_TIME)] = np.where(odd, np.nan, seconds)
    return labels


def _feature(table: pa.Table, name: str, judged: _Judgement) -> NDArray[np.int64]:
    """A column of an item or of the exposure; 0 where it is not known."""
    if name not in table.column_names:
        return np.zeros(table.num_rows, np.int64)
    column = table.column(name)
    if name == "duration_ms":
        milliseconds = numbers(column)
        values = np.rint(np.nan_to_num(milliseconds, nan=0.0, posinf=-1.0, neginf=-1.0))
        limit = float(1 << 53)
    elif is_text(column):
        return stable_ids(column, _CONTEXT_BITS if name == "context_id" else 52)
    else:
        values = integers(column).values
        limit = float(1 << (_CONTEXT_BITS if name == "context_id" else 62))
    odd = (values < 0) | (values >= limit)
    judged.repair(odd, f"{name}_out_of_range_made_unknown")
    return np.where(odd, 0, values).astype(np.int64)


def _event_keys(table: pa.Table) -> NDArray[np.uint64]:
    """Keys of events that bring an id of their own; 0 where the key is to be derived."""
    if "event_id" not in table.column_names:
        return np.zeros(table.num_rows, np.uint64)
    column = table.column("event_id")
    if is_text(column):
        return mix64(stable_ids(column, 63)) * (stable_ids(column, 63) != 0)
    parsed = integers(column)
    unknown = parsed.is_null | parsed.is_malformed
    return np.where(unknown, np.uint64(0), mix64(parsed.values))
