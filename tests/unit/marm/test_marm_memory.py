"""Rows, namespaces and the reference store."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from sample_events import make_rows

from marm.addressing import NUM_BUCKETS, user_bucket
from marm.memory import (
    EVENT_BYTES,
    RAW_STEP,
    ROW_DTYPES,
    InProcessMemory,
    Namespace,
    UserRows,
    upsert_rows,
)

SMALL = Namespace(depth=1, dim=2, dtype="float32")
EMPTY = np.empty(0, SMALL.row_dtype)


def rows(stamps: list[int], mark: int = 0, keys: list[int] | None = None) -> np.ndarray:
    return make_rows(SMALL, stamps, mark, keys)


class TestUpsert:
    def test_rows_come_out_by_time_then_key(self) -> None:
        merged = upsert_rows(rows([5, 9]), rows([7, 5, 1], keys=[7, 2, 1]))
        assert list(zip(merged["timestamp_ms"], merged["event_key"], strict=True)) == [
            (1, 1),
            (5, 2),
            (5, 5),
            (7, 7),
            (9, 9),
        ]

    def test_a_replay_replaces(self) -> None:
        merged = upsert_rows(rows([1, 2, 3], mark=4), rows([2, 3], mark=8))
        assert merged["written_step"].tolist() == [4, 8, 8]
        assert merged["memory"][:, 0, 0].tolist() == [4, 8, 8]

    def test_a_raw_row_never_erases_memory_but_brings_its_feedback(self) -> None:
        old, new = rows([5], mark=4), rows([5], mark=RAW_STEP)
        old["feedback"], new["feedback"] = 0b0001, 0b0100
        new["item_id"] = 77
        (merged,) = upsert_rows(old, new)
        assert merged["written_step"] == 4
        assert (merged["memory"] == 4).all()
        assert merged["feedback"] == 0b0101
        assert merged["item_id"] == 77  # the other columns are the later report's

    def test_a_computed_row_replaces_a_raw_one_and_keeps_its_feedback(self) -> None:
        old, new = rows([5], mark=RAW_STEP), rows([5], mark=9)
        old["feedback"], new["feedback"] = 0b0001, 0b0100
        (merged,) = upsert_rows(old, new)
        assert (merged["written_step"], merged["feedback"]) == (9, 0b0101)
        assert (merged["memory"] == 9).all()

    def test_within_one_save_the_later_row_wins_by_the_same_rules(self) -> None:
        new = np.concatenate([rows([5], 1), rows([5], RAW_STEP), rows([5], 3), rows([5], RAW_STEP)])
        new["feedback"] = [1, 2, 4, 8]
        (merged,) = upsert_rows(EMPTY, new)
        assert (merged["written_step"], merged["feedback"]) == (3, 15)
        assert (merged["memory"] == 3).all()

    def test_equal_keys_at_other_times_are_other_events(self) -> None:
        assert len(upsert_rows(rows([5], keys=[1]), rows([6, 4], keys=[1, 1]))) == 3

    def test_appending_is_the_general_case(self) -> None:
        """The short cut for rows that are all newer gives what merging gives."""
        old = rows([1, 2, 2], keys=[1, 5, 6])
        for stamps in ([3, 4], [2, 4], [4, 3], [3, 3]):
            keys = list(range(10, 10 + len(stamps)))
            merged = upsert_rows(old, rows(stamps, 2, keys))
            in_turn = old
            for stamp, key in zip(stamps, keys, strict=True):
                in_turn = upsert_rows(in_turn, rows([stamp], 2, [key]))
            columns = ["timestamp_ms", "event_key", "written_step"]
            np.testing.assert_array_equal(merged[columns], in_turn[columns])

    def test_nothing_changes_nothing(self) -> None:
        assert len(upsert_rows(EMPTY, EMPTY)) == 0
        np.testing.assert_array_equal(upsert_rows(rows([1, 2]), EMPTY), rows([1, 2]))

    def test_the_arguments_are_left_alone(self) -> None:
        old, new = rows([1, 5], 4), rows([5, 2], RAW_STEP)
        old_bytes, new_bytes = old.tobytes(), new.tobytes()
        upsert_rows(old, new)
        assert (old.tobytes(), new.tobytes()) == (old_bytes, new_bytes)


class TestNewestFirst:
    ROWS = UserRows(np.array([8, 3, 5]), np.array([0, 3, 3, 5]), rows([1, 2, 3, 4, 5]))

    def test_positions_of_the_newest(self) -> None:
        position, present = self.ROWS.newest_first(2)
        assert position[present].tolist() == [2, 1, 4, 3]
        assert present.tolist() == [[True, True], [False, False], [True, True]]
        assert (position[~present] == 0).all()

    def test_more_columns_than_rows(self) -> None:
        position, present = self.ROWS.newest_first(4)
        assert present.sum(axis=1).tolist() == [3, 0, 2]
        assert position[0, :3].tolist() == [2, 1, 0]

    def test_no_columns_and_no_users(self) -> None:
        assert self.ROWS.newest_first(0)[0].shape == (3, 0)
        nobody = UserRows(np.empty(0, np.int64), np.zeros(1, np.int64), EMPTY)
        assert nobody.newest_first(3)[0].shape == (0, 3)

    def test_of(self) -> None:
        assert self.ROWS.of(2)["timestamp_ms"].tolist() == [4, 5]
        assert self.ROWS.counts.tolist() == [3, 0, 2]


class TestNamespace:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"family": "Ranking"}, r"must match \[a-z\].*got 'Ranking'"),
            ({"family": "../x"}, "got '../x'"),
            ({"family": ""}, "got ''"),
            ({"depth": -1}, "depth >= 0.*depth=-1"),
            ({"dim": 0}, "dim >= 1.*dim=0"),
            ({"epoch": -2}, "epoch >= 0.*epoch=-2"),
            ({"dtype": "int4"}, "dtype must be one of.*'int8'.*got 'int4'"),
            ({"sequence": "sometimes"}, "'all' or a task of.*got 'sometimes'"),
        ],
    )
    def test_what_is_refused(self, settings: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Namespace(**settings)

    def test_every_field_changes_the_name(self) -> None:
        base = Namespace()
        changed = {
            "family": "other",
            "depth": 3,
            "dim": 16,
            "dtype": "float32",
            "epoch": 1,
            "sequence": "like",
        }
        assert set(changed) == {field.name for field in fields(Namespace)}
        names = {replace(base, **{field: value}).name for field, value in changed.items()}
        assert len(names | {base.name}) == len(changed) + 1

    def test_names_are_safe_in_paths_and_actor_names(self) -> None:
        name = Namespace(family="a_1", sequence="long_view").name
        assert name == "a_1-l2-d32-float16-long_view-e0"
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-")

    def test_rows_without_layers(self) -> None:
        assert np.zeros(3, Namespace(depth=0).row_dtype)["memory"].shape == (3, 0, 32)

    def test_callers_of_an_int8_namespace_see_float16(self) -> None:
        assert Namespace(dtype="int8").row_dtype == Namespace(dtype="float16").row_dtype

    def test_rows_with_the_first_layers_only(self) -> None:
        namespace = Namespace(depth=3, dim=4, dtype="float32")
        assert namespace.layers_dtype(None) == namespace.layers_dtype(3) == namespace.row_dtype
        assert namespace.layers_dtype(2) == replace(namespace, depth=2).row_dtype
        assert np.zeros(5, namespace.layers_dtype(0))["memory"].shape == (5, 0, 4)
        assert namespace.layers_dtype(0).itemsize == EVENT_BYTES

    @pytest.mark.parametrize("layers", [-1, 4])
    def test_layers_that_are_not_there(self, layers: int) -> None:
        with pytest.raises(ValueError, match=f"between 0 and the depth 3.*got {layers}"):
            Namespace(depth=3).layers_dtype(layers)

    @pytest.mark.parametrize("dtype", ROW_DTYPES)
    @pytest.mark.parametrize("depth", [0, 1, 2, 4])
    @pytest.mark.parametrize("dim", [1, 2, 3, 32, 128])
    def test_rows_at_rest_are_whole_words(self, dtype: str, depth: int, dim: int) -> None:
        namespace = Namespace(depth=depth, dim=dim, dtype=dtype)
        assert namespace.stored_dtype.itemsize % 8 == 0
        if dtype != "int8" and namespace.row_dtype.itemsize % 8 == 0:
            assert namespace.stored_dtype == namespace.row_dtype
        assert namespace.stored_dtype.itemsize - namespace.row_dtype.itemsize < 8 + 4 * depth

    def test_an_int8_row_at_rest_is_half_a_float16_one(self) -> None:
        namespace = Namespace(depth=4, dim=128, dtype="int8")
        assert namespace.stored_dtype.itemsize == EVENT_BYTES + 4 * (128 + 4)


class TestInProcessMemory:
    def test_a_scan_of_all_buckets_yields_every_row_once(self) -> None:
        memory = InProcessMemory(SMALL)
        user_ids = np.arange(600).repeat(2)
        memory.save(user_ids, rows([10, 20] * 600, keys=[1, 2] * 600))
        seen = []
        for bucket in range(NUM_BUCKETS):
            for part in memory.scan(bucket):
                assert (user_bucket(part.user_ids) == bucket).all()
                assert part.rows["timestamp_ms"].tolist() == [10, 20] * len(part.user_ids)
                seen += part.user_ids.tolist()
        assert sorted(seen) == list(range(600))

    def test_a_fetch_is_strictly_before(self) -> None:
        memory = InProcessMemory(SMALL)
        memory.save(np.array([1, 1, 1, 1]), rows([10, 20, 20, 30], keys=[1, 2, 3, 4]))
        for before, expected in [
            (10, []),
            (11, [10]),
            (20, [10]),
            (21, [10, 20, 20]),
            (31, [10, 20, 20, 30]),
        ]:
            fetched = memory.fetch(np.array([1]), 10, np.array([before]))
            assert fetched.rows["timestamp_ms"].tolist() == expected

    def test_the_newest_n_of_each_user_in_the_order_asked(self) -> None:
        memory = InProcessMemory(SMALL)
        memory.save(np.array([2, 1, 2, 1, 2]), rows([5, 4, 3, 2, 1]))
        fetched = memory.fetch(np.array([1, 9, 2]), 2)
        assert fetched.user_ids.tolist() == [1, 9, 2]
        assert [fetched.of(i)["timestamp_ms"].tolist() for i in range(3)] == [[2, 4], [], [3, 5]]
        per_user = memory.fetch(np.array([2, 1]), 2, np.array([5, 3]))
        assert [per_user.of(i)["timestamp_ms"].tolist() for i in range(2)] == [[1, 3], [2]]

    def test_the_cap_drops_the_oldest(self) -> None:
        memory = InProcessMemory(SMALL, max_rows_per_user=3)
        memory.save(np.array([1, 1]), rows([1, 2]))
        memory.save(np.array([1, 2, 1]), rows([3, 3, 4]))
        assert memory.fetch(np.array([1]), 10).rows["timestamp_ms"].tolist() == [2, 3, 4]
        memory.save(np.array([1]), rows([1]))  # late, and too old to be kept
        assert memory.fetch(np.array([1]), 10).rows["timestamp_ms"].tolist() == [2, 3, 4]
        assert memory.fetch(np.array([2]), 10).rows["timestamp_ms"].tolist() == [3]

    def test_saving_again_changes_nothing(self) -> None:
        memory = InProcessMemory(SMALL)
        users, saved = np.array([3, 1, 3]), rows([4, 5, 6], 2)
        memory.save(users, saved).wait()
        before = memory.fetch(np.array([1, 3]), 9).rows.tobytes()
        ack = memory.save(users, saved)
        assert ack.done()
        assert memory.fetch(np.array([1, 3]), 9).rows.tobytes() == before

    def test_nothing_saved_nothing_fetched(self) -> None:
        memory = InProcessMemory(SMALL)
        memory.save(np.empty(0, np.int64), EMPTY)
        assert memory.fetch(np.array([1, 2]), 5).offsets.tolist() == [0, 0, 0]
        nobody = memory.fetch(np.empty(0, np.int64), 5)
        assert (nobody.offsets.tolist(), len(nobody.rows)) == ([0], 0)
        assert nobody.rows.dtype == SMALL.row_dtype
