"""Bytes that stored rows take on disk, against the bytes of their memory vectors."""

from __future__ import annotations

from pathlib import Path

from benchmarks.perf.figures import Figure, Measured, at_most, exactly

_BLOCK_BYTES = 512  # what st_blocks counts, whatever the file system


def allocated_bytes(directory: Path) -> int:
    """Blocks that the files under a directory take; the holes of sparse files take none."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return sum(path.stat().st_blocks * _BLOCK_BYTES for path in files)


def row_store_footprint(directory: Path, payload_bytes: int) -> Measured:
    """The store as its rows came in, without any compaction after."""
    stored_bytes = allocated_bytes(directory)
    figure = Figure(
        "bytes_over_payload",
        "blocks on disk / L*D*2 bytes a row; users of 200 rows",
        exactly(stored_bytes / payload_bytes),
        at_most(1.15),
    )
    return Measured((figure,), {"stored_bytes": stored_bytes, "payload_bytes": payload_bytes})
