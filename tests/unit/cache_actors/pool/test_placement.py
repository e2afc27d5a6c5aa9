"""Which shard owns which users, and the stored form of that decision."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cache_actors.pool.placement import (
    BucketMove,
    Placement,
    PlacementError,
    claim_placement,
    load_placement,
    moves_to,
    store_placement,
)
from cache_actors.pool.rebalance import grouped
from marm.addressing import NUM_BUCKETS, user_bucket


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7, 255, 256])
def test_shards_own_nearly_equal_numbers_of_buckets(num_shards: int) -> None:
    placement = Placement.even(num_shards)
    sizes = np.bincount(placement.shard_of_bucket, minlength=num_shards)
    assert placement.num_shards == num_shards
    assert sizes.sum() == NUM_BUCKETS
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("num_shards", [0, -1, 257])
def test_an_impossible_number_of_shards_is_refused(num_shards: int) -> None:
    with pytest.raises(PlacementError, match="1 to 256 shards"):
        Placement.even(num_shards)


def test_a_split_covers_each_user_once_at_its_owner() -> None:
    placement = Placement.even(5)
    user_ids = np.random.default_rng(0).integers(-(2**62), 2**62, 500)
    shares = placement.split(user_ids)
    assert sorted(np.concatenate([share.positions for share in shares]).tolist()) == list(
        range(500)
    )
    for share in shares:
        owners = np.array(placement.shard_of_bucket)[user_bucket(user_ids[share.positions])]
        assert set(owners.tolist()) == {share.shard}
        assert (np.diff(share.positions) > 0).all()
    assert placement.split(np.empty(0, np.int64)) == []


def test_a_placement_survives_storing(tmp_path: Path) -> None:
    placement = Placement.even(3).with_shards(4).moved(7, 3)
    assert placement.version == 2
    store_placement(tmp_path / "placement.json", placement)
    assert load_placement(tmp_path / "placement.json") == placement


@pytest.mark.parametrize("before", [1, 2, 3, 7, 100, 256])
@pytest.mark.parametrize("after", [1, 2, 3, 8, 255, 256])
def test_a_change_of_size_moves_as_few_buckets_as_possible(before: int, after: int) -> None:
    placement = Placement.even(before)
    held = np.bincount(placement.shard_of_bucket, minlength=max(before, after))
    moves = moves_to(placement, after)
    if after > before:
        placement = placement.with_shards(after)
    for move in moves:
        assert placement.shard_of_bucket[move.bucket] == move.source
        placement = placement.moved(move.bucket, move.target)
    sizes = np.bincount(placement.shard_of_bucket, minlength=after)
    assert len(sizes) == max(after, 1)
    assert sizes.max() - sizes.min() <= 1
    kept = np.minimum(np.append(sizes, np.zeros(len(held) - len(sizes), int)), held).sum()
    assert len(moves) == NUM_BUCKETS - kept
    assert moves_to(placement, after) == []


def test_a_correction_is_no_new_version() -> None:
    placement = Placement.even(2)
    corrected = placement.routed(0, 1)
    assert corrected.version == placement.version
    assert corrected.buckets_of(1).tolist() == [0, *range(128, 256)]


def stored(**changes: object) -> str:
    """A stored placement with something wrong in it."""
    content = {"format": 2, "version": 0, "num_shards": 1, "shard_of_bucket": [0] * 256}
    return json.dumps(content | changes)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "[]",
        "{}",
        stored(shard_of_bucket=[0] * 255),
        stored(shard_of_bucket=[2] * 256),
        stored(shard_of_bucket=[-1] * 256),
        stored(shard_of_bucket=["0"] * 256),
        stored(shard_of_bucket=7),
        stored(num_shards=0),
        stored(num_shards=True),
        stored(version=-1),
        stored(version="1"),
        stored(format=99),
    ],
)
def test_a_damaged_placement_is_named_and_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "placement.json"
    path.write_text(text)
    with pytest.raises(PlacementError, match=r"placement\.json is unreadable"):
        load_placement(path)
    with pytest.raises(PlacementError, match=r"placement\.json is unreadable"):
        claim_placement(path, 2)
    assert path.read_text() == text


def test_a_missing_placement_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match="start the pool first"):
        load_placement(tmp_path / "placement.json")


def test_another_number_of_shards_than_stored_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pool" / "placement.json"
    assert claim_placement(path, 4) == Placement.even(4)
    assert claim_placement(path, 4) == Placement.even(4)
    with pytest.raises(PlacementError, match="has 4 shards, got a request for 2"):
        claim_placement(path, 2)
    assert load_placement(path) == Placement.even(4)


def test_one_of_several_concurrent_claims_wins(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"

    def claim(num_shards: int) -> int:
        try:
            return claim_placement(path, num_shards).num_shards
        except PlacementError:
            return load_placement(path).num_shards

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(claim, range(1, 17)))
    assert found == {load_placement(path).num_shards}
    assert [entry.name for entry in tmp_path.iterdir()] == ["placement.json"]


def test_moves_are_made_in_groups_of_one_source_and_target() -> None:
    moves = moves_to(Placement.even(2), 3)
    groups = list(grouped(moves))
    made = [BucketMove(b, source, target) for source, target, buckets in groups for b in buckets]
    assert sorted(made, key=lambda move: move.bucket) == sorted(moves, key=lambda m: m.bucket)
    assert max(len(buckets) for _, _, buckets in groups) == 16
    assert len(groups) == 6  # 43 and 42 buckets of two shards
    assert list(grouped([])) == []
