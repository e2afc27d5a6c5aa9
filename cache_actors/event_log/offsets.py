"""How far a reader of the event log has got, bucket by bucket."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from marm.addressing import NUM_BUCKETS

FIRST_SEGMENT = 1


@dataclass(frozen=True)
class LogOffsets:
    """For every bucket, the segment to read next and how many of its rows were consumed.

    Buckets advance independently, so offsets saved by any number of workers can be continued by
    any other number of workers.
    """

    positions: NDArray[np.int64]  # [NUM_BUCKETS, 2]: (segment, rows consumed in it)

    def __post_init__(self) -> None:
        positions = np.asarray(self.positions, np.int64)
        if positions.shape != (NUM_BUCKETS, 2):
            raise ValueError(
                f"offsets must have shape ({NUM_BUCKETS}, 2), got {positions.shape}; "
                "were they saved by another version?"
            )
        if (positions < 0).any():
            raise ValueError("offsets must not be negative; the saved offsets are damaged")
        object.__setattr__(self, "positions", positions)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LogOffsets):
            return NotImplemented
        return bool(np.array_equal(self.positions, other.positions))

    def __hash__(self) -> int:
        return hash(self.positions.tobytes())

    @staticmethod
    def start() -> LogOffsets:
        """Nothing consumed."""
        return LogOffsets.at_segment(FIRST_SEGMENT)

    @staticmethod
    def at_segment(segment: int) -> LogOffsets:
        """Everything before ``segment`` consumed."""
        positions = np.zeros((NUM_BUCKETS, 2), np.int64)
        positions[:, 0] = segment
        return LogOffsets(positions)

    @staticmethod
    def merge(parts: Sequence[LogOffsets], owned: Sequence[ArrayLike]) -> LogOffsets:
        """Offsets of all workers as one: ``parts[i]`` counts for the buckets ``owned[i]``, which
        together must be every bucket exactly once."""
        indices = [as_buckets(buckets) for buckets in owned]
        owners = np.sort(np.concatenate([*indices, np.empty(0, np.int64)]))
        if len(parts) != len(owned) or not np.array_equal(owners, np.arange(NUM_BUCKETS)):
            raise ValueError(
                f"every one of the {NUM_BUCKETS} buckets needs exactly one owner, "
                f"got {len(parts)} offsets and {len(owned)} sets of {len(owners)} buckets in all"
            )
        merged = np.zeros((NUM_BUCKETS, 2), np.int64)
        for part, index in zip(parts, indices, strict=True):
            merged[index] = part.positions[index]
        return LogOffsets(merged)

    def to_dict(self) -> dict[str, list[int]]:
        """For embedding in a larger JSON document."""
        return {"segment": self.positions[:, 0].tolist(), "rows": self.positions[:, 1].tolist()}

    @staticmethod
    def from_dict(document: dict[str, Any]) -> LogOffsets:
        """The inverse of `to_dict`."""
        try:
            return LogOffsets(np.array([document["segment"], document["rows"]], np.int64).T)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"expected offsets as {{'segment': [...], 'rows': [...]}} with {NUM_BUCKETS} "
                f"integers each; could not read them: {error!r}"
            ) from error

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(self.to_dict())

    @staticmethod
    def from_json(text: str) -> LogOffsets:
        """The inverse of `to_json`."""
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"expected offsets as JSON, got {text[:80]!r}: {error}") from error
        return LogOffsets.from_dict(document)


def as_buckets(buckets: ArrayLike) -> NDArray[np.int64]:
    """A set of buckets as ascending integers; refuses anything else."""
    given = np.asarray(buckets)
    if given.size == 0:
        return np.empty(0, np.int64)
    unique = np.unique(given)
    if (
        given.dtype.kind not in "iu"
        or len(unique) != given.size
        or unique[0] < 0
        or unique[-1] >= NUM_BUCKETS
    ):
        raise ValueError(f"buckets must be distinct integers in [0, {NUM_BUCKETS}), got {given!r}")
    return unique.astype(np.int64)
