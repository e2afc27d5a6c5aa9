"""Placement: which shard of a pool owns which users.

Users hash to 256 fixed buckets and buckets map to shards, so that a change of the number of shards
moves buckets, never single users.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache_actors.atomic_files import claim_file, pending_path
from marm.addressing import NUM_BUCKETS, user_bucket

PLACEMENT_FORMAT = 1


class PlacementError(ValueError):
    """A placement is invalid, unreadable, or not the one that was asked for."""


DEFAULT_SHARDS = 2
"""Shards of a pool whose number nobody chose."""


@dataclass(frozen=True)
class ShardShare:
    """The users of a batch that one shard owns, by their positions in the batch."""

    shard: int
    positions: NDArray[np.int64]


@dataclass(frozen=True)
class Placement:
    """``shard_of_bucket[b]`` is the shard that owns bucket ``b``; shards count from 0."""

    shard_of_bucket: tuple[int, ...]

    def __post_init__(self) -> None:
        shards = set(self.shard_of_bucket)
        if len(self.shard_of_bucket) != NUM_BUCKETS or shards != set(range(len(shards))):
            raise PlacementError(
                f"a placement gives each of {NUM_BUCKETS} buckets one of the shards 0..S-1 and "
                f"uses all of them, got {len(self.shard_of_bucket)} buckets on shards "
                f"{sorted(shards)}; delete the file to place the buckets anew"
            )

    @staticmethod
    def even(num_shards: int) -> Placement:
        """Runs of neighbouring buckets of nearly equal number on each shard."""
        if not 1 <= num_shards <= NUM_BUCKETS:
            raise PlacementError(f"a pool has 1 to {NUM_BUCKETS} shards, got {num_shards}")
        return Placement(tuple(b * num_shards // NUM_BUCKETS for b in range(NUM_BUCKETS)))

    @property
    def num_shards(self) -> int:
        """How many shards there are."""
        return max(self.shard_of_bucket) + 1

    def shard_of_users(self, user_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shard that owns each user."""
        return self._shards[user_bucket(user_ids)]

    def split(self, user_ids: NDArray[np.int64]) -> list[ShardShare]:
        """The batch by owner: shards with at least one user, positions in ascending order."""
        shards = self.shard_of_users(user_ids)
        order = np.argsort(shards, kind="stable")
        owners, starts = np.unique(shards[order], return_index=True)
        runs = np.split(order, starts[1:])
        return [ShardShare(s, run) for s, run in zip(owners.tolist(), runs, strict=False)]

    def to_json(self) -> str:
        """The placement as stored."""
        return json.dumps(
            {"format": PLACEMENT_FORMAT, "shard_of_bucket": list(self.shard_of_bucket)}
        )

    @staticmethod
    def from_json(text: str) -> Placement:
        """The placement in ``text``."""
        try:
            content = json.loads(text)
            stored_format, shards = content["format"], content["shard_of_bucket"]
            valid = isinstance(shards, list) and all(type(shard) is int for shard in shards)
        except (ValueError, KeyError, TypeError) as error:
            raise PlacementError(f"not a stored placement ({error!r})") from error
        if stored_format != PLACEMENT_FORMAT or not valid:
            raise PlacementError(
                f"expected a placement of format {PLACEMENT_FORMAT}, got format {stored_format!r}"
            )
        return Placement(tuple(shards))

    @cached_property
    def _shards(self) -> NDArray[np.int64]:
        return np.array(self.shard_of_bucket, np.int64)


def load_placement(path: Path) -> Placement:
    """The placement stored at ``path``."""
    try:
        return Placement.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlacementError(f"no placement at {path}; start the pool first") from None
    except (PlacementError, UnicodeDecodeError) as error:
        raise PlacementError(
            f"placement {path} is unreadable: {error}; restore it, or delete the directory it is "
            "in and replay the event log"
        ) from error


def claim_placement(path: Path, num_shards: int | None) -> Placement:
    """The placement stored at ``path``, made for ``num_shards`` if there is none yet.

    None asks for whatever is stored, or `DEFAULT_SHARDS`. Of several processes that make it at
    once, one wins and all get the same.
    """
    if num_shards is None:
        num_shards = load_placement(path).num_shards if path.exists() else DEFAULT_SHARDS
    wanted = Placement.even(num_shards)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        pending = pending_path(path.parent)
        try:
            pending.write_text(wanted.to_json(), encoding="utf-8")
            if claim_file(pending, path):
                return wanted
        finally:
            pending.unlink(missing_ok=True)
    stored = load_placement(path)
    if stored.num_shards != num_shards:
        raise PlacementError(
            f"the pool at {path.parent} has {stored.num_shards} shards, got a request for "
            f"{num_shards}; ask for {stored.num_shards}, or use another home"
        )
    return stored
