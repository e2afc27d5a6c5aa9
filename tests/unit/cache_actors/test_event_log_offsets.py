from __future__ import annotations

import json

import numpy as np
import pytest

from cache_actors.event_log.offsets import LogOffsets, as_buckets


def some_offsets(seed: int) -> LogOffsets:
    return LogOffsets(np.random.default_rng(seed).integers(0, 1_000, (256, 2)))


def test_json_round_trip() -> None:
    offsets = some_offsets(1)
    assert LogOffsets.from_json(offsets.to_json()) == offsets
    assert LogOffsets.from_dict(json.loads(json.dumps(offsets.to_dict()))) == offsets
    assert len({offsets, LogOffsets.from_json(offsets.to_json())}) == 1


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[1, 2]", '{"segment": [1], "rows": [0]}', '{"segment": "a", "rows": 3}'],
)
def test_damaged_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="offsets"):
        LogOffsets.from_json(text)


def test_negative_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        LogOffsets(np.full((256, 2), -1))


def test_merge_takes_each_bucket_from_its_owner() -> None:
    parts = [some_offsets(1), some_offsets(2), some_offsets(3)]
    owned = [np.arange(rank, 256, 3) for rank in range(3)]
    merged = LogOffsets.merge(parts, owned)
    for part, buckets in zip(parts, owned, strict=True):
        np.testing.assert_array_equal(merged.positions[buckets], part.positions[buckets])


@pytest.mark.parametrize(
    "owned",
    [[], [np.arange(128), np.arange(127, 256)], [np.arange(128), np.arange(129, 256)]],
)
def test_merge_needs_exactly_one_owner_of_each_bucket(owned: list) -> None:
    with pytest.raises(ValueError, match="needs exactly one owner"):
        LogOffsets.merge([some_offsets(seed) for seed in range(len(owned))], owned)


@pytest.mark.parametrize("buckets", [[256], [-1], [1, 1], [0.5], [True]])
def test_buckets_must_be_distinct_integers_in_range(buckets: list) -> None:
    with pytest.raises(ValueError, match="buckets must be distinct integers"):
        as_buckets(buckets)
