"""Events as Arrow columns: the schema that every file of events shares."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from marm.addressing import user_bucket
from marm.events import EVENT_DTYPES, TASKS, EventBatch

EVENT_SCHEMA = pa.schema(
    [
        pa.field("bucket", pa.int16(), nullable=False),
        *(
            pa.field(name, pa.from_numpy_dtype(dtype), nullable=False)
            for name, dtype in EVENT_DTYPES.items()
        ),
        *(pa.field(task, pa.float32()) for task in TASKS),
    ]
)
"""Columns of a segment: an event's bucket, its fields, and one nullable label per task."""


def events_to_table(events: EventBatch) -> pa.Table:
    """Events as an Arrow table in `EVENT_SCHEMA`; labels that were not observed become null."""
    columns = {"bucket": pa.array(user_bucket(events.user_id).astype(np.int16))}
    for name, dtype in EVENT_DTYPES.items():
        columns[name] = pa.array(np.ascontiguousarray(getattr(events, name), dtype))
    for index, task in enumerate(TASKS):
        label = np.ascontiguousarray(events.labels[:, index], np.float32)
        columns[task] = pa.array(label, mask=np.isnan(label))
    return pa.table(columns, schema=EVENT_SCHEMA)


def events_from_table(table: pa.Table) -> EventBatch:
    """The inverse of `events_to_table`; a ``bucket`` column is not needed."""
    labels = np.empty((table.num_rows, len(TASKS)), np.float32)
    for index, task in enumerate(TASKS):
        labels[:, index] = table.column(task).to_numpy()
    return EventBatch(
        **{name: table.column(name).to_numpy() for name in EVENT_DTYPES}, labels=labels
    )


def check_events(events: EventBatch) -> None:
    """Refuse a batch whose columns don't fit together or don't fit their types."""
    for name, dtype in EVENT_DTYPES.items():
        column = np.asarray(getattr(events, name))
        if column.shape != (len(events),):
            raise ValueError(
                f"event column {name!r} must have shape ({len(events)},) like user_id, "
                f"got {column.shape}"
            )
        if column.dtype != dtype and not np.can_cast(column.dtype, dtype, "safe"):
            raise ValueError(
                f"event column {name!r} must be {np.dtype(dtype).name}, got {column.dtype}; "
                "convert it first"
            )
    if np.shape(events.labels) != (len(events), len(TASKS)):
        raise ValueError(
            f"labels must have shape ({len(events)}, {len(TASKS)}), one column per task of "
            f"{TASKS}, got {np.shape(events.labels)}"
        )
    if np.isinf(events.labels).any():
        raise ValueError("labels must be finite, or NaN where not observed; got an infinite one")
