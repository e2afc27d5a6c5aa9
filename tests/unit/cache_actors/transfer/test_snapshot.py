"""A memory goes to a place and comes back, whole, into other shards, and never over newer rows."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from cache_actors.pool.placement import Placement
from cache_actors.store.shard_store import ShardStore
from cache_actors.transfer.forget import forget_in_snapshot
from cache_actors.transfer.manifest import MANIFEST_NAME, Manifest, SnapshotError, read_manifest
from cache_actors.transfer.restore import open_snapshot, restore, restore_snapshot
from cache_actors.transfer.snapshot import SnapshotProgress, snapshot, split_users
from cache_actors.transfer.storage import Storage, StorageError, without_password
from marm.addressing import user_bucket
from marm.memory import RAW_STEP, Namespace, UserRows

DEEP = Namespace(depth=3, dim=8)
WIDE = Namespace(family="other", depth=1, dim=6, dtype="float32")
FLAT = Namespace(family="flat", depth=0, dim=4)
SMALL = Namespace(family="small", depth=2, dim=8, dtype="int8")
NAMESPACES = [DEEP, WIDE, FLAT, SMALL]
ALL = 1 << 20


class Shards:
    """The stores of some shards as one memory."""

    def __init__(self, directory: Path, num_shards: int) -> None:
        self.placement = Placement.even(num_shards)
        self.stores = [ShardStore(directory / str(shard)) for shard in range(num_shards)]
        self.before_scan: Callable[[int], None] = lambda bucket: None

    def namespaces(self) -> list[Namespace]:
        found = {n.name: n for store in self.stores for n in store.namespaces()}
        return list(found.values())

    def scan(self, namespace: Namespace, bucket: int) -> Iterator[UserRows]:
        self.before_scan(bucket)
        yield from self.owner(bucket).open(namespace).scan(bucket)

    def forgotten(self) -> dict[int, int]:
        return {user: until for store in self.stores for user, until in store.forgotten().items()}

    def restore(self, namespace: Namespace, rows: UserRows) -> None:
        for share in self.placement.split(rows.user_ids):
            self.stores[share.shard].restore(namespace, take_users(rows, share.positions))

    def forget(self, user_id: int, until_ms: int) -> int:
        return self.owner(int(user_bucket(user_id)[0])).forget(user_id, until_ms)

    def save(self, namespace: Namespace, user_id: int, rows: NDArray[np.void]) -> None:
        owner = self.owner(int(user_bucket(user_id)[0]))
        owner.save(namespace, np.full(len(rows), user_id), rows)

    def rows_of(self, namespace: Namespace, user_id: int) -> NDArray[np.void]:
        owner = self.owner(int(user_bucket(user_id)[0]))
        return owner.open(namespace).fetch(np.array([user_id]), ALL).rows

    def owner(self, bucket: int) -> ShardStore:
        return self.stores[self.placement.shard_of_bucket[bucket]]

    def close(self) -> None:
        for store in self.stores:
            store.close()


def take_users(rows: UserRows, positions: NDArray[np.int64]) -> UserRows:
    counts = rows.counts[positions]
    parts = [rows.of(int(position)) for position in positions]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return UserRows(rows.user_ids[positions], offsets, np.concatenate(parts))


def random_rows(namespace: Namespace, count: int, seed: int, step: int = 5) -> NDArray[np.void]:
    rng = np.random.default_rng(seed)
    rows = np.zeros(count, namespace.row_dtype)
    rows["timestamp_ms"] = 1_000 + np.arange(count)
    rows["event_key"] = rng.integers(0, 2**63, count).astype(np.uint64) * np.uint64(2)
    rows["item_id"] = rng.integers(-(2**60), 2**60, count)
    rows["feedback"] = rng.integers(0, 2**32, count)
    rows["written_step"] = step
    rows["memory"] = rng.normal(size=rows["memory"].shape)
    if step == RAW_STEP:
        rows["memory"] = 0
    return rows


USERS = [*range(-3, 40), 2**62, -(2**63)]


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[Callable[[str, int], Shards]]:
    made: list[Shards] = []

    def make(name: str, num_shards: int) -> Shards:
        made.append(Shards(tmp_path / name, num_shards))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def source(shards: Callable[[str, int], Shards]) -> Shards:
    full = shards("source", 3)
    for namespace in NAMESPACES:
        for index, user in enumerate(USERS):
            full.save(namespace, user, random_rows(namespace, 1 + index % 7, seed=index))
    return full


@pytest.fixture(params=["path", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place: a directory, and an object store."""
    name = uuid.uuid4().hex
    return str(tmp_path / name / "deep") if request.param == "path" else f"memory://{name}/below"


def assert_same(got: Shards, expected: Shards, users: list[int] = USERS) -> None:
    for namespace in NAMESPACES:
        for user in users:
            np.testing.assert_array_equal(
                got.rows_of(namespace, user), expected.rows_of(namespace, user)
            )


@pytest.mark.parametrize(
    ("protocol", "num_shards"), [("", 1), ("", 4), ("file://", 2), ("memory://", 4)]
)
def test_a_memory_comes_back_in_other_shards(
    source: Shards,
    shards: Callable[[str, int], Shards],
    tmp_path: Path,
    protocol: str,
    num_shards: int,
) -> None:
    place = f"{protocol}{tmp_path}/place"
    told: list[SnapshotProgress] = []
    manifest = snapshot(source, place, shard_of_bucket=(0, 1), progress=told.append)
    assert {n.name for n in manifest.namespaces} == {n.name for n in NAMESPACES}
    assert manifest.rows == 4 * sum(1 + index % 7 for index in range(len(USERS)))
    assert told[-1].buckets == told[-1].of_buckets == 4 * 256
    assert read_manifest(Storage.at(place)) == manifest

    target = shards("target", num_shards)
    done = restore(place, target)
    assert (done.rows, done.users, done.parts) == (
        manifest.rows,
        4 * len(USERS),
        len(manifest.parts),
    )
    assert_same(target, source)
    assert restore(place, target) == done  # again, with the same end
    assert_same(target, source)


def test_int8_rows_come_back_bit_for_bit(
    source: Shards, shards: Callable[[str, int], Shards], tmp_path: Path
) -> None:
    """Rows leave a store as float16 and are quantized once more; nothing drifts."""
    snapshot(source, str(tmp_path / "a"))
    second = shards("second", 2)
    restore(str(tmp_path / "a"), second)
    snapshot(second, str(tmp_path / "b"))
    third = shards("third", 1)
    restore(str(tmp_path / "b"), third)
    assert_same(third, source)


def test_stored_rows_win(source: Shards, shards: Callable[[str, int], Shards], place: str) -> None:
    snapshot(source, place)
    target = shards("target", 2)
    user = USERS[4]
    newer = source.rows_of(DEEP, user)[:3]  # computed again later
    newer["memory"] += 1
    newer["written_step"] = 9
    target.save(DEEP, user, newer)
    target.save(DEEP, 999, random_rows(DEEP, 2, seed=1))
    restore(place, target)
    got = target.rows_of(DEEP, user)
    np.testing.assert_array_equal(got[:3], newer)
    np.testing.assert_array_equal(got[3:], source.rows_of(DEEP, user)[3:])
    assert len(target.rows_of(DEEP, 999)) == 2


def test_forgotten_users_do_not_come_back(
    source: Shards, shards: Callable[[str, int], Shards], place: str
) -> None:
    gone, partly = USERS[6], USERS[13]
    was = source.rows_of(DEEP, partly)

    def forget_late(bucket: int) -> None:
        if bucket == 255:  # their rows were copied by now
            source.forget(gone, 10**15)
            source.forget(partly, int(was["timestamp_ms"][2]))

    source.before_scan = forget_late
    manifest = snapshot(source, place)
    assert manifest.forgotten == {gone: 10**15, partly: int(was["timestamp_ms"][2])}

    target = shards("target", 2)
    target.save(DEEP, gone, random_rows(DEEP, 2, seed=1))  # goes too
    done = restore(place, target)
    assert done.forgotten == 2
    for namespace in NAMESPACES:
        assert len(target.rows_of(namespace, gone)) == 0
    np.testing.assert_array_equal(target.rows_of(DEEP, partly), was[3:])
    target.save(DEEP, gone, random_rows(DEEP, 2, seed=1))  # a replay
    assert len(target.rows_of(DEEP, gone)) == 0
    assert target.forgotten() == dict(manifest.forgotten)


def test_users_forgotten_by_the_target_stay_away(
    source: Shards, shards: Callable[[str, int], Shards], place: str
) -> None:
    snapshot(source, place)
    target = shards("target", 2)
    target.forget(USERS[6], 10**15)
    restore(place, target)
    assert len(target.rows_of(DEEP, USERS[6])) == 0
    assert_same(target, source, [user for user in USERS if user != USERS[6]])


def test_users_are_removed_from_a_snapshot(
    source: Shards, shards: Callable[[str, int], Shards], place: str
) -> None:
    first = snapshot(source, place)
    gone, partly = USERS[6], USERS[13]
    was = source.rows_of(DEEP, partly)
    until_ms_of = {gone: 10**15, partly: int(was["timestamp_ms"][2])}
    done = forget_in_snapshot(place, until_ms_of)
    assert done.rows == 4 * (7 + 3)
    assert forget_in_snapshot(place, until_ms_of).rows == 0

    changed = open_snapshot(place).manifest
    assert (changed.rows, changed.forgotten) == (first.rows - 40, until_ms_of)
    files, root = fsspec.core.url_to_fs(place)
    left = {path.rpartition("/")[2] for path in files.find(root) if path.endswith(".parquet")}
    assert left == {part.path.rpartition("/")[2] for part in changed.parts}

    target = shards("target", 2)
    restore(place, target)
    assert len(target.rows_of(DEEP, gone)) == 0
    np.testing.assert_array_equal(target.rows_of(DEEP, partly), was[3:])
    assert_same(target, source, [user for user in USERS if user not in until_ms_of])


def test_a_memory_in_use_is_consistent_per_user(
    source: Shards, shards: Callable[[str, int], Shards], tmp_path: Path
) -> None:
    """Each save rewrites all rows of a user with one mark: no mix of marks is ever copied."""
    stop = threading.Event()
    rows = random_rows(DEEP, 20, seed=77)
    for user in USERS:
        source.save(DEEP, user, rows)

    def write() -> None:
        step = 10
        while not stop.is_set():
            step += 1
            marked = rows.copy()
            marked["memory"], marked["written_step"] = step % 1_000, step
            for user in USERS[::5]:
                source.save(DEEP, user, marked)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        snapshot(source, str(tmp_path / "busy"))
    finally:
        stop.set()
        writer.join()
    target = shards("target", 1)
    restore(str(tmp_path / "busy"), target)
    keys = set(rows["event_key"].tolist())
    for user in USERS:
        got = target.rows_of(DEEP, user)
        same = got[np.isin(got["event_key"], list(keys))]
        assert len(same) == 20
        assert len(np.unique(same["written_step"])) == 1


def test_parts_are_bounded_and_users_stay_whole(source: Shards, tmp_path: Path) -> None:
    whole = snapshot(source, str(tmp_path / "whole"))
    many = snapshot(source, str(tmp_path / "many"), max_part_bytes=1)
    assert len(many.parts) == 4 * len(USERS)  # a user each
    assert len(whole.parts) < len(many.parts)
    assert many.rows == whole.rows
    assert sum(part.users for part in whole.parts) == sum(part.users for part in many.parts)


def test_runs_of_users_are_cut_between_users() -> None:
    rows = np.zeros(10, DEEP.row_dtype)
    rows["item_id"] = np.arange(10)
    found = UserRows(np.arange(5), np.array([0, 3, 3, 4, 9, 10]), rows)
    runs = list(split_users(found, 4 * rows.dtype.itemsize))
    assert [run.user_ids.tolist() for run in runs] == [[0, 1, 2], [3], [4]]
    assert np.concatenate([run.rows["item_id"] for run in runs]).tolist() == list(range(10))
    assert [run.offsets.tolist() for run in runs] == [[0, 3, 3, 4], [0, 5], [0, 1]]


def test_parts_are_parquet_that_others_read(source: Shards, tmp_path: Path) -> None:
    manifest = snapshot(source, str(tmp_path / "out"))
    part = next(part for part in manifest.parts if part.namespace == DEEP.name)
    table = pq.read_table(tmp_path / "out" / part.path)
    assert table.num_rows == part.rows
    user = int(table.column("user_id")[0].as_py())
    stored = source.rows_of(DEEP, user)
    assert table.column("item_id")[0].as_py() == stored["item_id"][0]
    memory = np.frombuffer(table.column("memory")[0].as_py(), "<f2").reshape(3, 8)
    np.testing.assert_array_equal(memory, stored["memory"][0])


def test_an_empty_memory_is_a_snapshot_too(
    shards: Callable[[str, int], Shards], tmp_path: Path
) -> None:
    manifest = snapshot(shards("empty", 1), str(tmp_path / "out"))
    assert (manifest.parts, manifest.namespaces) == ((), ())
    assert restore(str(tmp_path / "out"), shards("target", 1)).rows == 0


class TestHalfSnapshots:
    def test_without_its_manifest_it_is_none(
        self, source: Shards, shards: Callable[[str, int], Shards], place: str
    ) -> None:
        def interrupt(bucket: int) -> None:
            if bucket == 200:
                raise InterruptedError

        source.before_scan = interrupt
        with pytest.raises(InterruptedError):
            snapshot(source, place)
        with pytest.raises(SnapshotError, match=r"no manifest.json, which is written last"):
            restore(place, shards("target", 1))
        files, root = fsspec.core.url_to_fs(place)
        assert files.find(root) == []
        source.before_scan = lambda bucket: None
        snapshot(source, place)
        assert restore(place, shards("target2", 1)).rows > 0

    @pytest.mark.parametrize("damage", ["missing", "short"])
    def test_a_part_that_is_not_whole_stops_it_before_it_begins(
        self, source: Shards, shards: Callable[[str, int], Shards], tmp_path: Path, damage: str
    ) -> None:
        manifest = snapshot(source, str(tmp_path / "out"))
        path = tmp_path / "out" / manifest.parts[5].path
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-1])
        target = shards("target", 1)
        with pytest.raises(SnapshotError, match=rf"1 of {len(manifest.parts)} parts .* nothing"):
            restore(str(tmp_path / "out"), target)
        assert target.namespaces() == []

    def test_a_flipped_byte_is_noticed_and_the_rest_restored(
        self, source: Shards, shards: Callable[[str, int], Shards], tmp_path: Path
    ) -> None:
        manifest = snapshot(source, str(tmp_path / "out"))
        part = manifest.parts[5]
        content = bytearray((tmp_path / "out" / part.path).read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / "out" / part.path).write_bytes(content)
        target = shards("target", 1)
        with pytest.raises(SnapshotError, match=r"damaged: expected .* checksum .* restored"):
            restore(str(tmp_path / "out"), target)
        namespace = manifest.namespace(part.namespace)
        for user in USERS:
            lost = user_bucket(user)[0] == part.bucket
            assert (len(target.rows_of(namespace, user)) == 0) == lost

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda body: body.update(format=9), "expected a snapshot of format 1, got 9"),
            (lambda body: body["parts"].pop(), "its checksum does not fit"),
            (lambda body: body["forgotten"].update({"5": 6}), "its checksum does not fit"),
            (lambda body: body.pop("checksum"), "damaged"),
            (lambda body: body.clear(), "damaged"),
        ],
    )
    def test_a_changed_manifest_is_refused(
        self,
        source: Shards,
        shards: Callable[[str, int], Shards],
        tmp_path: Path,
        change: Callable[[dict], object],
        message: str,
    ) -> None:
        snapshot(source, str(tmp_path / "out"))
        path = tmp_path / "out" / MANIFEST_NAME
        body = json.loads(path.read_text())
        change(body)
        path.write_text(json.dumps(body))
        with pytest.raises(SnapshotError, match=message):
            restore(str(tmp_path / "out"), shards("target", 1))
        path.write_bytes(b"\xff\xfe nothing")
        with pytest.raises(SnapshotError, match=MANIFEST_NAME):
            open_snapshot(str(tmp_path / "out"))

    def test_parts_outside_the_snapshot_are_refused(self, source: Shards, tmp_path: Path) -> None:
        manifest = snapshot(source, str(tmp_path / "out"))
        text = manifest.to_json()
        for path in ("/etc/passwd", "../other/x.parquet"):
            parts = [{**vars(manifest.parts[0]), "path": path}]
            with pytest.raises(SnapshotError, match="damaged"):
                Manifest.from_json(json.dumps({**json.loads(text), "parts": parts}))


class TestPlaces:
    def test_an_earlier_snapshot_is_left_alone(self, source: Shards, place: str) -> None:
        first = snapshot(source, place)
        with pytest.raises(SnapshotError, match="holds a snapshot already; give another place"):
            snapshot(source, place)
        assert read_manifest(Storage.at(place)) == first

    def test_other_files_at_the_place_are_left_alone(self, source: Shards, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
        snapshot(source, str(tmp_path / "out"))
        assert (tmp_path / "out" / "notes.txt").read_text() == "mine"

    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("", "expected a directory or a URL"),
            ("nothing://here", "Protocol not known"),
            ("/proc/version/below", "cannot"),
            ("https://127.0.0.1:9/x", "127.0.0.1"),
        ],
    )
    def test_a_place_that_cannot_be_used_is_named(
        self, source: Shards, url: str, message: str
    ) -> None:
        with pytest.raises(StorageError, match=message):
            snapshot(source, url)

    def test_a_place_without_a_snapshot(self, tmp_path: Path) -> None:
        with pytest.raises(SnapshotError, match=r"there is no snapshot at .*: it has no manifest"):
            open_snapshot(str(tmp_path / "none"))
        assert not (tmp_path / "none").exists()

    def test_passwords_are_not_shown(self) -> None:
        assert without_password("ftp://me:secret@host/x") == "ftp://me:***@host/x"
        assert without_password("s3://bucket/a:b@c") == "s3://bucket/a:b@c"
        with pytest.raises(StorageError) as refused:
            Storage.at("nothing://me:secret@host")
        assert "secret" not in str(refused.value)


def test_a_snapshot_opened_earlier_can_be_restored(
    source: Shards, shards: Callable[[str, int], Shards], place: str
) -> None:
    snapshot(source, place)
    found = open_snapshot(place)
    target = shards("target", 1)
    told: list[SnapshotProgress] = []
    restore_snapshot(found, target, told.append)
    assert (told[-1].buckets, told[-1].rows) == (len(found.manifest.parts), found.manifest.rows)
    assert_same(target, source)
