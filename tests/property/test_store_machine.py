"""Two stores and a durable tier, driven at random beside a plain dict.

Rows are saved, read, evicted, brought back, expired, forgotten and damaged; processes end without
warning; buckets move from one store to the other.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray
from stored_rows import ALL, INT64, as_user_rows

from cache_actors.store.limits import StoreLimits
from cache_actors.store.lookup import UserState
from cache_actors.store.namespace_writer import BucketMovedError, NamespaceWriter
from cache_actors.store.records import HEAD_WORDS, RecordBatch, extent_count, extent_start
from cache_actors.store.row_formats import as_read
from cache_actors.store.shard_store import ShardStore
from marm.addressing import NUM_BUCKETS, bucket_of_user, user_bucket
from marm.memory import RAW_STEP, Namespace, upsert_rows

TTL_S = 1000
MEMORY_DISK = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Stores are flushed to a disk when they are closed, which takes longer than all the rest."""
USERS = (0, 1, -1, INT64.max, INT64.min, 77, 248)
ONE_BUCKET = tuple(user for user in range(100_000) if bucket_of_user(user) == 5)[:3]
EVERYBODY = (*USERS, *ONE_BUCKET)
IDS = np.array(EVERYBODY, np.int64)

users = st.sampled_from(EVERYBODY)
times = st.one_of(st.integers(-3, 60), st.sampled_from([INT64.min, INT64.max]))
row_tuples = st.tuples(
    users, times, st.integers(0, 3), st.integers(0, 2**12 - 1), st.integers(RAW_STEP, 2)
)


def make_rows(namespace: Namespace, values: list[tuple[int, int, int, int, int]]):
    rows = np.zeros(len(values), namespace.row_dtype)
    for index, (user, timestamp, key, feedback, step) in enumerate(values):
        rows[index]["timestamp_ms"] = timestamp
        rows[index]["event_key"] = key
        rows[index]["feedback"] = feedback
        rows[index]["written_step"] = step
        rows[index]["item_id"] = hash((user, timestamp, key, index)) % 1000
        rows[index]["memory"] = 0 if step == RAW_STEP else index + 1
    return np.array([value[0] for value in values], np.int64), rows


@dataclass
class Entry:
    """What one user should have."""

    rows: NDArray[np.void]
    written_s: int
    is_evicted: bool = False


class StoreMachine(RuleBasedStateMachine):
    """The dict is ``entries``; ``owner`` tells which store has each bucket."""

    namespace = Namespace(depth=2, dim=400)  # 16 rows fill a chunk

    @initialize(max_rows=st.sampled_from([None, None, 1, 5, 20]))
    def begin(self, max_rows: int | None) -> None:
        self.directory = Path(tempfile.mkdtemp(dir=MEMORY_DISK))
        self.now_s = 1_700_000_000
        self.clock = mock.patch("time.time", self.time)
        self.clock.start()
        self.max_rows = max_rows
        self.entries: dict[int, Entry] = {}
        self.tier: dict[int, NDArray[np.void]] = {}
        self.forgotten: dict[int, int] = {}
        self.unsaved: set[int] = set()
        self.owner = np.arange(NUM_BUCKETS) % 2
        self.num_copies = 0
        self.stores = [
            self.open_store(self.directory / name, owned=self.owner == index)
            for index, name in enumerate("ab")
        ]

    def time(self) -> float:
        return self.now_s + 0.5

    def teardown(self) -> None:
        if hasattr(self, "clock"):
            self.clock.stop()
            for store in self.stores:
                store.close()
            shutil.rmtree(self.directory)

    def open_store(self, path: Path, owned: NDArray[np.bool_] | None = None) -> ShardStore:
        limits = StoreLimits(max_rows_per_user=self.max_rows, ttl_s=TTL_S)
        store = ShardStore(path, limits=limits, owned=owned)
        store.track_unsaved = True
        store.open(self.namespace)
        return store

    def store_of(self, user: int) -> ShardStore:
        return self.stores[int(self.owner[bucket_of_user(user)])]

    def held(self, user: int) -> NamespaceWriter:
        return self.store_of(user).open(self.namespace)

    def is_expired(self, entry: Entry) -> bool:
        return entry.written_s + TTL_S < self.now_s

    def visible(self, user: int) -> NDArray[np.void]:
        entry = self.entries.get(user)
        if entry is None or self.is_expired(entry):
            return np.empty(0, self.namespace.row_dtype)
        return entry.rows

    def state(self, user: int) -> int:
        entry = self.entries.get(user)
        if entry is None or self.is_expired(entry):
            return UserState.ABSENT
        return UserState.EVICTED if entry.is_evicted else UserState.FOUND

    def within_limit(self, rows: NDArray[np.void]) -> NDArray[np.void]:
        return rows if self.max_rows is None else rows[-self.max_rows :]

    def not_forgotten(self, user: int, rows: NDArray[np.void]) -> NDArray[np.void]:
        if user not in self.forgotten:
            return rows
        return rows[rows["timestamp_ms"] > self.forgotten[user]]

    @rule(values=st.lists(row_tuples, max_size=40))
    def save(self, values: list[tuple[int, int, int, int, int]]) -> None:
        user_ids, rows = make_rows(self.namespace, values)
        side = self.owner[user_bucket(user_ids)] if len(user_ids) else user_ids
        for index, store in enumerate(self.stores):
            store.save(self.namespace, user_ids[side == index], rows[side == index])
        read = as_read(self.namespace, rows)
        for user in set(user_ids.tolist()):
            kept = self.not_forgotten(user, read[user_ids == user])
            if not len(kept):
                continue
            entry = self.entries.get(user)
            if entry is None or self.is_expired(entry):
                entry = Entry(np.empty(0, kept.dtype), self.now_s)
            merged = self.within_limit(upsert_rows(entry.rows, kept))
            self.entries[user] = Entry(merged, self.now_s, entry.is_evicted)
            self.unsaved.add(user)

    @rule(user=users, start=st.integers(0, 90), count=st.integers(1, 50))
    def append(self, user: int, start: int, count: int) -> None:
        self.save([(user, start + step, 1, 0, 1) for step in range(count)])

    @rule(user=users)
    def save_to_the_wrong_store(self, user: int) -> None:
        user_ids, rows = make_rows(self.namespace, [(user, 5, 1, 0, 1)])
        wrong = self.stores[1 - int(self.owner[bucket_of_user(user)])]
        with pytest.raises(BucketMovedError):
            wrong.save(self.namespace, user_ids, rows)

    @rule(
        some=st.lists(users, unique=True, min_size=1),
        n=st.one_of(st.integers(0, 60), st.just(10**6)),
        before=st.one_of(st.none(), st.integers(-4, 120)),
        layers=st.one_of(st.none(), st.just(0), st.just(1)),
    )
    def fetch(self, some: list[int], n: int, before: int | None, layers: int | None) -> None:
        layers = None if layers is None else min(layers, self.namespace.depth)
        for index, store in enumerate(self.stores):
            mine = [user for user in some if self.owner[bucket_of_user(user)] == index]
            times_ms = None if before is None else before + np.arange(len(mine))
            ids = np.array(mine, np.int64)
            found = store.open(self.namespace).lookup(ids, n, times_ms, layers=layers)
            assert found.state.tolist() == [self.state(user) for user in mine]
            for position, user in enumerate(mine):
                rows = self.visible(user)
                if times_ms is not None:
                    rows = rows[rows["timestamp_ms"] < times_ms[position]]
                rows = rows[max(0, len(rows) - n) :]
                got = found.rows.of(position)
                names = [name for name in rows.dtype.names or () if name != "memory"]
                assert all(got[name].tolist() == rows[name].tolist() for name in names)
                depth = got["memory"].shape[1]
                assert got["memory"].tobytes() == rows["memory"][:, :depth].tobytes()

    @rule(some=st.lists(users, unique=True, min_size=1, max_size=4))
    def evict(self, some: list[int]) -> None:
        for user in some:
            self.put_into_tier(user, self.visible(user))
            num_evicted = self.store_of(user).evict(self.namespace, np.array([user]))
            entry = self.entries.get(user)
            had_rows = entry is not None and len(entry.rows) > 0
            assert num_evicted == had_rows
            if entry is not None and had_rows:
                self.entries[user] = Entry(entry.rows[:0], entry.written_s, True)
            self.unsaved.discard(user)

    def put_into_tier(self, user: int, rows: NDArray[np.void]) -> None:
        if len(rows):
            old = self.tier.get(user, rows[:0])
            self.tier[user] = upsert_rows(old, rows)

    @rule(user=users)
    def bring_back(self, user: int) -> None:
        rows = self.tier.get(user)
        if rows is None:
            return
        self.store_of(user).restore(self.namespace, as_user_rows(user, rows))
        kept = self.not_forgotten(user, rows)
        if len(kept):
            entry = self.entries.get(user, Entry(kept[:0], self.now_s))
            merged = self.within_limit(upsert_rows(kept, entry.rows))
            self.entries[user] = Entry(merged, entry.written_s)

    @rule(count=st.integers(1, 4))
    def write_behind(self, count: int) -> None:
        for store in self.stores:
            waiting = store.open(self.namespace).unsaved(count)
            for index, user in enumerate(waiting.rows.user_ids.tolist()):
                self.put_into_tier(user, waiting.rows.of(index))
                self.unsaved.discard(user)
            store.mark_saved(self.namespace, waiting.rows.user_ids, waiting.versions)

    @rule(seconds=st.sampled_from([1, 300, 900, TTL_S]))
    def let_time_pass(self, seconds: int) -> None:
        self.now_s += seconds

    @rule()
    def expire(self) -> None:
        removed = sum(store.expire(self.now_s) for store in self.stores)
        old = [user for user, entry in self.entries.items() if self.is_expired(entry)]
        assert removed == len(old)
        for user in old:
            del self.entries[user]
            self.unsaved.discard(user)

    @rule(user=users, until=st.one_of(st.integers(-5, 100), st.just(INT64.max)))
    def forget(self, user: int, until: int) -> None:
        self.store_of(user).forget(user, until)
        self.forgotten[user] = until = max(until, self.forgotten.get(user, until))
        assert self.store_of(user).forgotten()[user] == until
        entry = self.entries.get(user)
        if entry is None:
            return
        kept = self.not_forgotten(user, entry.rows)
        self.entries[user] = Entry(kept, entry.written_s)
        if not len(kept):
            del self.entries[user]
            self.unsaved.discard(user)

    @rule(some=st.lists(users))
    def touch(self, some: list[int]) -> None:
        for store in self.stores:
            store.touch(self.namespace, some)

    @rule(index=st.integers(0, 1))
    def reopen(self, index: int) -> None:
        store = self.stores[index]
        store.close()
        self.stores[index] = self.open_store(store.directory)
        assert not self.stores[index].started_empty
        assert self.stores[index].generation == store.generation

    @rule(index=st.integers(0, 1))
    def crash(self, index: int) -> None:
        """The process ends without warning: what is left are its files as they are now."""
        store = self.stores[index]
        self.num_copies += 1
        left = self.directory / f"copy-{self.num_copies}"
        shutil.copytree(store.directory, left)
        store.close()
        shutil.rmtree(store.directory)
        self.stores[index] = self.open_store(left)
        assert not self.stores[index].started_empty

    @rule(bucket=st.sampled_from(sorted({bucket_of_user(user) for user in EVERYBODY})))
    def move(self, bucket: int) -> None:
        mine = [user for user in EVERYBODY if bucket_of_user(user) == bucket]
        for user in mine:
            if self.state(user) == UserState.EVICTED:
                self.bring_back(user)
        index = int(self.owner[bucket])
        source, target = self.stores[index], self.stores[1 - index]
        target.delete_bucket(bucket)
        target.own([bucket])
        for user, until in source.forgotten().items():
            target.forget(user, until)
        for chunk in source.open(self.namespace).scan(bucket):
            target.restore(self.namespace, chunk)
        source.disown([bucket])
        assert source.delete_bucket(bucket) == sum(user in self.entries for user in mine)
        self.owner[bucket] = 1 - index
        for user in mine:
            rows = self.visible(user)
            self.entries.pop(user, None)
            self.unsaved.discard(user)
            if len(rows):
                self.entries[user] = Entry(rows, self.now_s)

    @precondition(lambda self: self.max_rows is None)  # hidden rows would come to light
    @rule(user=users, pick=st.integers(0, 10**6), byte=st.integers(0, 10**6))
    def damage_and_repair(self, user: int, pick: int, byte: int) -> None:
        rows = self.visible(user)
        if not len(rows):
            return
        index = pick % len(rows)
        self.flip(user, index, byte)
        left = np.delete(rows, index)
        found = self.held(user).lookup(np.array([user]), ALL)
        assert found.state.tolist() == [UserState.DAMAGED]
        assert found.rows.rows.tobytes() == left.tobytes()
        assert self.store_of(user).verify(self.namespace, bucket_of_user(user)) == 1
        self.entries[user] = Entry(left, self.entries[user].written_s, True)

    def flip(self, user: int, index: int, byte: int) -> None:
        held = self.held(user)
        users = np.array([user])
        words = held._env.read(lambda t: RecordBatch.read(t, held._index, users)).words_of(0)
        for word in words[HEAD_WORDS:]:
            if index < extent_count(word):
                break
            index -= extent_count(word)
        row_bytes = self.namespace.stored_dtype.itemsize
        position = (extent_start(word) + index) * row_bytes + byte % row_bytes
        with held._file.path.with_suffix(".rows").open("r+b") as file:
            file.seek(position)
            (value,) = file.read(1)
            file.seek(position)
            file.write(bytes([value ^ 0x10]))

    @invariant()
    def holds_the_same_rows(self) -> None:
        if not hasattr(self, "stores"):
            return
        side = self.owner[user_bucket(IDS)]
        for index, store in enumerate(self.stores):
            found = store.open(self.namespace).lookup(IDS, ALL)
            for position, user in enumerate(EVERYBODY):
                is_here = side[position] == index
                expected = self.state(user) if is_here else UserState.ELSEWHERE
                assert found.state[position] == expected
                rows = self.visible(user) if is_here else ()
                assert found.rows.of(position).tobytes() == (rows.tobytes() if len(rows) else b"")

    @invariant()
    def counts_the_same(self) -> None:
        if not hasattr(self, "stores"):
            return
        stats = [store.open(self.namespace).stats() for store in self.stores]
        entries = self.entries.values()
        assert sum(held.users for held in stats) == sum(len(entry.rows) > 0 for entry in entries)
        evicted = sum(held.counters.evicted_users for held in stats)
        assert evicted == sum(entry.is_evicted for entry in entries)
        num_rows = sum(len(entry.rows) for entry in entries)
        assert sum(held.rows for held in stats) >= num_rows
        if self.max_rows is None:
            assert sum(held.rows for held in stats) == num_rows

    @invariant()
    def knows_what_the_tier_lacks(self) -> None:
        if not hasattr(self, "stores"):
            return
        waiting = [store.open(self.namespace).unsaved(100).rows for store in self.stores]
        found = {u for rows in waiting for u in rows.user_ids[rows.counts > 0].tolist()}
        assert found == {user for user in self.unsaved if len(self.visible(user))}


class SmallRowsMachine(StoreMachine):
    """Rows without stored layers: many to a chunk."""

    namespace = Namespace(depth=0, dim=1)


class Int8Machine(StoreMachine):
    """Rows that are stored in another layout than they are seen in."""

    namespace = Namespace(depth=2, dim=600, dtype="int8")


# Making a failure smaller takes longer than a test may: it is printed as it was found.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)

TestLargeRows = StoreMachine.TestCase
TestLargeRows.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, phases=PHASES
)
TestSmallRows = SmallRowsMachine.TestCase
TestSmallRows.settings = settings(
    max_examples=30, stateful_step_count=25, deadline=None, phases=PHASES
)
TestInt8Rows = Int8Machine.TestCase
TestInt8Rows.settings = settings(
    max_examples=20, stateful_step_count=25, deadline=None, phases=PHASES
)
