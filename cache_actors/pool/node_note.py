"""Notes of which node has the files of a replica, in the pool's directory.

A note only tells where to look: the node may be gone, and the files may have been replaced. Who
uses it asks whether the node lives, or compares the store's generation with the record.
"""

from __future__ import annotations

from pathlib import Path

from cache_actors.atomic_files import write_hint
from cache_actors.pool.shard_link import PoolInfo


def note_node(pool: PoolInfo, shard: int, replica: int, node_id: str) -> None:
    """Note where the files of a replica are."""
    write_hint(_path(pool, shard, replica), node_id)


def noted_node(pool: PoolInfo, shard: int, replica: int) -> str | None:
    """The node that had the files of a replica when it last started; None if it is not known."""
    try:
        return _path(pool, shard, replica).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _path(pool: PoolInfo, shard: int, replica: int) -> Path:
    return pool.record_directory(shard) / f"node-of-r{replica}"
