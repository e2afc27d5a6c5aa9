"""Placement: which shard of a pool owns which users.

Users hash to 256 fixed buckets and buckets map to shards, so that a change of the number of shards
moves buckets, never single users.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache_actors.atomic_files import claim_file, pending_path, replace_text
from marm.addressing import NUM_BUCKETS, user_bucket

PLACEMENT_FORMAT = 2


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
    """``shard_of_bucket[b]`` is the shard that owns bucket ``b``; shards count from 0.

    ``version`` rises with every change. A shard without buckets is one that is being filled or
    emptied.
    """

    shard_of_bucket: tuple[int, ...]
    num_shards: int
    version: int = 0

    def __post_init__(self) -> None:
        shards = sorted(set(self.shard_of_bucket))
        if (
            len(self.shard_of_bucket) != NUM_BUCKETS
            or not 1 <= self.num_shards <= NUM_BUCKETS
            or shards[0] < 0
            or shards[-1] >= self.num_shards
            or self.version < 0
        ):
            raise PlacementError(
                f"a placement gives each of {NUM_BUCKETS} buckets one of its 1 to {NUM_BUCKETS} "
                f"shards, got {len(self.shard_of_bucket)} buckets on shards {shards} of "
                f"{self.num_shards}, version {self.version}"
            )

    @staticmethod
    def even(num_shards: int) -> Placement:
        """Runs of neighbouring buckets of nearly equal number on each shard."""
        if not 1 <= num_shards <= NUM_BUCKETS:
            raise PlacementError(f"a pool has 1 to {NUM_BUCKETS} shards, got {num_shards}")
        owners = tuple(b * num_shards // NUM_BUCKETS for b in range(NUM_BUCKETS))
        return Placement(owners, num_shards)

    def buckets_of(self, shard: int) -> NDArray[np.int64]:
        """The buckets that a shard owns, ascending."""
        return np.flatnonzero(self._shards == shard)

    def shard_of_users(self, user_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shard that owns each user."""
        return self._shards[user_bucket(user_ids)]

    def split(self, user_ids: NDArray[np.int64]) -> list[ShardShare]:
        """The batch by owner: shards with at least one user, positions in ascending order."""
        shards = self.shard_of_users(user_ids)
        if len(shards) and (shards == shards[0]).all():
            return [ShardShare(int(shards[0]), np.arange(len(shards)))]
        order = np.argsort(shards, kind="stable")
        owners, starts = np.unique(shards[order], return_index=True)
        runs = np.split(order, starts[1:])
        return [ShardShare(s, run) for s, run in zip(owners.tolist(), runs, strict=False)]

    def routed(self, bucket: int, shard: int) -> Placement:
        """The same version as a client corrects it that learned of a move before it was stored."""
        owners = list(self.shard_of_bucket)
        owners[bucket] = shard
        return replace(self, shard_of_bucket=tuple(owners))

    def moved(self, bucket: int, shard: int) -> Placement:
        """The next version, in which ``shard`` owns ``bucket``."""
        return replace(self.routed(bucket, shard), version=self.version + 1)

    def with_shards(self, num_shards: int) -> Placement:
        """The next version, with more shards or without the last, empty ones."""
        return replace(self, num_shards=num_shards, version=self.version + 1)

    def to_json(self) -> str:
        """The placement as stored."""
        return json.dumps(
            {
                "format": PLACEMENT_FORMAT,
                "version": self.version,
                "num_shards": self.num_shards,
                "shard_of_bucket": list(self.shard_of_bucket),
            }
        )

    @staticmethod
    def from_json(text: str) -> Placement:
        """The placement in ``text``."""
        try:
            content = json.loads(text)
            stored_format, shards = content["format"], content["shard_of_bucket"]
            numbers = [content["num_shards"], content["version"], *shards]
            valid = isinstance(shards, list) and all(type(number) is int for number in numbers)
        except (ValueError, KeyError, TypeError) as error:
            raise PlacementError(f"not a stored placement ({error!r})") from error
        if stored_format != PLACEMENT_FORMAT or not valid:
            raise PlacementError(
                f"expected a placement of format {PLACEMENT_FORMAT}, got format {stored_format!r}"
            )
        return Placement(tuple(shards), content["num_shards"], content["version"])

    @cached_property
    def _shards(self) -> NDArray[np.int64]:
        return np.array(self.shard_of_bucket, np.int64)


@dataclass(frozen=True)
class BucketMove:
    """One step of a change of placement."""

    bucket: int
    source: int
    target: int


def moves_to(placement: Placement, num_shards: int) -> list[BucketMove]:
    """The fewest moves after which the first ``num_shards`` shards own nearly equal numbers of
    buckets and the others none."""
    if not 1 <= num_shards <= NUM_BUCKETS:
        raise PlacementError(f"a pool has 1 to {NUM_BUCKETS} shards, got {num_shards}")
    held = np.bincount(placement.shard_of_bucket, minlength=max(num_shards, placement.num_shards))
    quota = np.zeros(len(held), np.int64)
    quota[:num_shards] = NUM_BUCKETS // num_shards
    # The buckets that do not divide evenly stay where most are already.
    fullest = np.argsort(-held[:num_shards], kind="stable")
    quota[fullest[: NUM_BUCKETS % num_shards]] += 1
    takers = [shard for shard in range(num_shards) for _ in range(quota[shard] - held[shard])]
    surplus = [
        (bucket, shard)
        for shard in range(len(held))
        for bucket in placement.buckets_of(shard).tolist()[quota[shard] :]
    ]
    return [BucketMove(b, source, t) for (b, source), t in zip(surplus, takers, strict=True)]


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


def store_placement(path: Path, placement: Placement) -> None:
    """Replace the placement at ``path``; only whoever rebalances the pool does this."""
    replace_text(path, placement.to_json())


def claim_placement(path: Path, num_shards: int | None) -> Placement:
    """The placement stored at ``path``, made for ``num_shards`` if there is none yet.

    None asks for whatever is stored, or `DEFAULT_SHARDS`. Of several processes that make it at
    once, one wins and all get the same.
    """
    if not path.exists():
        wanted = Placement.even(DEFAULT_SHARDS if num_shards is None else num_shards)
        path.parent.mkdir(parents=True, exist_ok=True)
        pending = pending_path(path.parent)
        try:
            pending.write_text(wanted.to_json(), encoding="utf-8")
            if claim_file(pending, path):
                return wanted
        finally:
            pending.unlink(missing_ok=True)
    stored = load_placement(path)
    if num_shards not in (None, stored.num_shards):
        raise PlacementError(
            f"the pool at {path.parent} has {stored.num_shards} shards, got a request for "
            f"{num_shards}; ask for {stored.num_shards}, or move its buckets with "
            f"`marm memory rebalance --shards {num_shards}`"
        )
    return stored
