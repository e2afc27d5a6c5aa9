"""The item catalog of a home: append-only Parquet parts beside the event segments."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache_actors.atomic_files import claim_file, pending_path
from marm.items import ItemCatalog, ItemFeatures

logger = logging.getLogger(__name__)

ITEM_SCHEMA = pa.schema(
    [
        pa.field(name, pa.int64(), nullable=False)
        for name in ("item_id", "author_id", "tag_id", "duration_ms")
    ]
)

_PART_NAME = re.compile(r"(\d{12})\.parquet")


def append_items(path: Path, items: ItemFeatures) -> int:
    """Add or replace ``items`` in the catalog under ``path`` (a home's ``log`` directory).

    Atomic and durable when it returns, and safe from several processes at once; where two parts
    know an item, the later one wins. Returns the catalog's new version.
    """
    _check_items(items)
    directory = _directory(path)
    if not len(items):
        return catalog_version(path)
    directory.mkdir(parents=True, exist_ok=True)
    pending = pending_path(directory)
    table = pa.table(
        {name: np.ascontiguousarray(getattr(items, name), np.int64) for name in ITEM_SCHEMA.names},
        schema=ITEM_SCHEMA,
    )
    try:
        with pending.open("xb") as file:
            pq.write_table(table, file, compression="lz4", write_page_checksum=True)
            file.flush()
            os.fsync(file.fileno())
        number = catalog_version(path) + 1
        while not claim_file(pending, directory / f"{number:012d}.parquet"):
            number += 1
        return number
    finally:
        pending.unlink(missing_ok=True)


def catalog_version(path: Path) -> int:
    """A number that grows with every change of the catalog; 0 when there is none. Cheap."""
    return max(_part_numbers(_directory(path)), default=0)


def read_catalog(path: Path) -> ItemCatalog:
    """The catalog under ``path`` as of now; damaged parts are named in the log and skipped."""
    parts = []
    directory = _directory(path)
    for number in _part_numbers(directory):
        part = directory / f"{number:012d}.parquet"
        try:
            parts.append(_read_part(part))
        except (pa.ArrowException, OSError, ValueError) as error:
            logger.warning("item catalog %s: %s: %s; skipped", directory, part.name, error)
    columns = {
        name: np.concatenate([getattr(part, name) for part in parts] or [np.empty(0, np.int64)])
        for name in ITEM_SCHEMA.names
    }
    return ItemCatalog(ItemFeatures(**columns))


def _directory(path: Path) -> Path:
    return Path(path) / "items"


def _part_numbers(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    matches = (_PART_NAME.fullmatch(name) for name in os.listdir(directory))
    return sorted(int(match[1]) for match in matches if match)


def _read_part(part: Path) -> ItemFeatures:
    with pq.ParquetFile(part, page_checksum_verification=True) as file:
        if not file.schema_arrow.equals(ITEM_SCHEMA, check_metadata=False):
            raise ValueError(f"expected columns {ITEM_SCHEMA.names}, got {file.schema_arrow.names}")
        table = file.read()
    return ItemFeatures(**{name: table.column(name).to_numpy() for name in ITEM_SCHEMA.names})


def _check_items(items: ItemFeatures) -> None:
    for name in ITEM_SCHEMA.names:
        column = np.asarray(getattr(items, name))
        if column.shape != (len(items),) or column.dtype.kind not in "iu":
            raise ValueError(
                f"item column {name!r} must be {len(items)} integers like item_id, "
                f"got shape {column.shape} of {column.dtype}"
            )
