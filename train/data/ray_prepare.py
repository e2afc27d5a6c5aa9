"""The Ray Data pipeline of an ingest: read and clean in parallel, sort by time, stream the result.

Ray Data gives no promise about the order of blocks and rows, so nothing here relies on one: every
row carries its ordinal in the source, and the sort key ends with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import pyarrow as pa
import ray.data

from train.data.fragments import Fragment
from train.data.source import Layout, Source, stage
from train.data.staged_rows import SORT_KEY, STAGED_SCHEMA

TASK_BYTES = 16 << 20
"""Least input of one task: below this, starting another worker costs more than it saves."""


def staged_in_order(source: Source, task_bytes: int = TASK_BYTES) -> Iterator[pa.Table]:
    """All staged rows of a source, sorted by ``SORT_KEY``, tallies first, in pieces.

    Needs an initialised Ray. The rows of the source pass through the object store, which spills to
    disk; one piece at a time is on the heap here.
    """
    rows = [asdict(fragment) for fragment in source.fragments]
    if not rows:
        return
    num_bytes = sum(fragment.num_bytes for fragment in source.fragments)
    num_tasks = max(1, min(len(rows), num_bytes // task_bytes))
    fragments = ray.data.from_items(rows, override_num_blocks=num_tasks)
    fragments.context.enable_progress_bars = False
    fragments.context.execution_options.preserve_order = True
    staged = fragments.map_batches(
        _stage_batch,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"layout": source.layout, "unit": source.timestamp_unit},
    )
    for piece in staged.sort(SORT_KEY).iter_batches(batch_size=None, batch_format="pyarrow"):
        yield piece.select(STAGED_SCHEMA.names)


def _stage_batch(batch: pa.Table, layout: Layout, unit: str) -> pa.Table:
    staged = [stage(Fragment(**row), layout, unit) for row in batch.to_pylist()]
    return pa.concat_tables([STAGED_SCHEMA.empty_table(), *staged])
