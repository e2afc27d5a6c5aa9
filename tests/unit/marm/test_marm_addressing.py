"""Hashes are part of the stored format, so their values are pinned."""

from __future__ import annotations

import numpy as np
import pytest

from marm.addressing import (
    NUM_BUCKETS,
    combine64,
    event_key,
    feature_slots,
    mix64,
    user_bucket,
    user_item_depth_hash,
)

INT64 = np.iinfo(np.int64)
IDS = np.array([0, 1, -1, 42, 10**18, INT64.min, INT64.max], np.int64)


def test_mix64_is_splitmix64() -> None:
    # The first output of the published generator with seed 0.
    assert int(mix64(0)[0]) == 0xE220A8397B1DCDAF
    assert mix64(IDS).tolist() == [
        16294208416658607535,
        10451216379200822465,
        16490336266968443936,
        13679457532755275413,
        11134796211643504527,
        5196802822362493915,
        3055647633038352039,
    ]


def test_combined_hashes_keep_their_values() -> None:
    assert combine64(IDS, IDS[::-1]).tolist() == [
        12128549624275580305,
        10828885594642236920,
        9279148953311616678,
        12387838134993183934,
        4399228116320713273,
        14133357004619669025,
        1843880537103246905,
    ]
    stamps = np.full(len(IDS), 1_600_000_000_000)
    assert event_key(IDS, IDS, stamps).tolist() == [
        18276704060275401500,
        12107272796354596442,
        11862731905061169954,
        15017505767420929504,
        9056517944703938377,
        3034193124962291626,
        4531897768998976802,
    ]
    assert user_item_depth_hash(IDS, IDS[::-1], np.full(len(IDS), 2)).tolist() == [
        12267683696782232734,
        5777352414989150698,
        13749393466766032583,
        14937626148147010151,
        6788936664463248943,
        17069347348300023699,
        16947937806720919816,
    ]


def test_user_buckets_keep_their_values() -> None:
    assert user_bucket(IDS).tolist() == [175, 193, 32, 149, 143, 219, 167]


@pytest.mark.parametrize(
    ("salt", "slots"),
    [
        (1, [102974, 205851, 131622, 103698, 225061, 181752, 261171]),
        (2, [233843, 168582, 148753, 108527, 165331, 61487, 228269]),
        (3, [113036, 92103, 144893, 84085, 219821, 138426, 254012]),
        (4, [144954, 161434, 225254, 254160, 92625, 229364, 249197]),
        (5, [172320, 72083, 107518, 190577, 52313, 38352, 44383]),
        (6, [212981, 117260, 104203, 244576, 166064, 24670, 250144]),
    ],
)
def test_feature_slots_keep_their_values(salt: int, slots: list[int]) -> None:
    assert feature_slots(salt, IDS, 1 << 18).tolist() == slots


def test_mix64_has_no_collisions_on_dense_and_spread_ids() -> None:
    dense = np.arange(200_000)
    assert len(np.unique(mix64(np.concatenate([dense, -1 - dense])))) == 400_000
    assert len(np.unique(mix64(dense << 43))) == 200_000


def test_pairs_do_not_collide_whichever_column_changes() -> None:
    left, right = np.divmod(np.arange(250_000), 500)
    assert len(np.unique(combine64(left, right))) == 250_000
    # Order matters, and a column of zeros is not nothing.
    assert combine64(3, 5) != combine64(5, 3)
    assert combine64(3) != combine64(3, 0)


def test_columns_broadcast() -> None:
    expected = [int(combine64(7, value)[0]) for value in (1, 2, 3)]
    assert combine64(7, np.array([1, 2, 3])).tolist() == expected


def test_buckets_are_in_range_and_even() -> None:
    counts = np.bincount(user_bucket(np.arange(-50_000, 50_000)), minlength=NUM_BUCKETS)
    assert len(counts) == NUM_BUCKETS
    assert counts.min() > 0.7 * 100_000 / NUM_BUCKETS
    assert counts.max() < 1.3 * 100_000 / NUM_BUCKETS


def test_a_bucket_does_not_depend_on_the_integer_type() -> None:
    ids = np.array([0, 5, 100], np.int64)
    for dtype in (np.int32, np.uint32, np.uint64):
        np.testing.assert_array_equal(user_bucket(ids.astype(dtype)), user_bucket(ids))
    negative = np.array([-7, -1], np.int64)
    np.testing.assert_array_equal(user_bucket(negative.astype(np.int32)), user_bucket(negative))


def test_no_ids_no_hashes() -> None:
    nobody = np.empty(0, np.int64)
    assert mix64(nobody).shape == (0,)
    assert user_bucket(nobody).shape == (0,)
    assert feature_slots(1, nobody, 8).shape == (0,)
    assert event_key(nobody, nobody, nobody).shape == (0,)
