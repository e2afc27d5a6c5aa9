"""The planner's arithmetic, against the paper's figures, the store, and measurements of Redis."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cache_actors.store.extents import top_class
from cache_actors.store.shard_store import ShardStore
from marm.capacity import (
    DEFAULT_SHARD_BYTES,
    Machines,
    MemorySize,
    Traffic,
    allocated_bytes,
    chunk_rows,
    lay_out,
    load_of,
)
from marm.memory import EVENT_BYTES, Namespace

GIB = 1 << 30
PAPER = Namespace(depth=4, dim=128)
TRAFFIC = Traffic(
    qps=1000,
    reads_per_request=1,
    rows_read=200,
    layers_read=4,
    candidates=500,
    events_per_user_day=133,
)


class TestThePaper:
    """60 TB for 30 million users at L=4, d=128."""

    def test_its_storage_is_that_of_1953_rows_in_half_precision(self) -> None:
        size = MemorySize(30_000_000, 1_953, PAPER)
        assert size.vector_bytes_per_row == 1_024
        assert size.vector_bytes == pytest.approx(60e12, rel=1e-3)

    def test_or_of_976_in_single_precision_and_not_of_its_6000(self) -> None:
        single = Namespace(depth=4, dim=128, dtype="float32")
        assert MemorySize(30_000_000, 976, single).vector_bytes == pytest.approx(60e12, rel=1e-3)
        assert MemorySize(30_000_000, 6_000, PAPER).vector_bytes == 184_320_000_000_000
        assert MemorySize(30_000_000, 6_000, single).vector_bytes == 368_640_000_000_000

    def test_its_keys_take_1_6_times_the_vectors_in_redis(self) -> None:
        size = MemorySize(30_000_000, 1_953, PAPER)
        assert size.redis_key_bytes / size.vector_bytes == pytest.approx(1.6, abs=0.01)

    def test_it_fits_a_pool(self) -> None:
        size = MemorySize(30_000_000, 1_953, PAPER)
        layout = lay_out(size, Machines(node_bytes=1024 * GIB, replicas=2))
        assert layout.shards == 256
        assert layout.shard_bytes == pytest.approx(size.stored_bytes / 256, rel=1e-6)
        assert layout.nodes * 1024 * GIB >= layout.total_bytes == 2 * size.stored_bytes
        assert 1.01 < size.stored_bytes / size.payload_bytes < 1.03


@pytest.mark.parametrize(
    ("value_bytes", "seen_per_key"), [(64, 106.8), (128, 122.5), (256, 154.5), (512, 218.5)]
)
def test_redis_keys_take_what_redis_7_was_seen_to_take(
    value_bytes: int, seen_per_key: float
) -> None:
    size = MemorySize(1, 1, Namespace(depth=1, dim=value_bytes // 2))
    assert size.redis_key_bytes - value_bytes == pytest.approx(seen_per_key, abs=1)


@pytest.mark.parametrize(
    ("rows", "seen_share"), [(48, 1.115), (100, 1.068), (150, 1.015), (200, 1.065), (250, 1.218)]
)
def test_redis_blocks_take_what_redis_7_was_seen_to_take(rows: int, seen_share: float) -> None:
    size = MemorySize(1, rows, PAPER)
    assert size.redis_block_bytes / size.payload_bytes == pytest.approx(seen_share, abs=0.01)


def test_sizes_of_the_allocator() -> None:
    wanted = [1, 16, 17, 128, 129, 160, 161, 256, 257, 262, 518, 216_054, 1 << 20, (1 << 20) + 1]
    expected = [16, 16, 32, 128, 160, 160, 192, 256, 320, 320, 640, 229_376, 1 << 20, 5 << 18]
    assert [allocated_bytes(number) for number in wanted] == expected


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize(("depth", "dim"), [(0, 8), (1, 4), (2, 32), (4, 128), (8, 512)])
def test_rows_are_those_of_the_store(depth: int, dim: int, dtype: str) -> None:
    namespace = Namespace(depth=depth, dim=dim, dtype=dtype)
    size = MemorySize(3, 5, namespace)
    assert size.row_bytes == namespace.stored_dtype.itemsize
    assert size.payload_bytes == 15 * size.row_bytes
    assert size.row_bytes >= EVENT_BYTES + size.vector_bytes_per_row
    assert chunk_rows(size.row_bytes) == 1 << top_class(size.row_bytes)


@pytest.mark.parametrize(
    ("users", "rows", "namespace"),
    [
        (600, 200, Namespace(depth=4, dim=32)),
        (3_000, 20, Namespace(depth=2, dim=32)),
        (300, 150, Namespace(depth=2, dim=64, dtype="int8")),
    ],
)
def test_stored_bytes_are_what_the_store_takes(
    tmp_path: Path, users: int, rows: int, namespace: Namespace
) -> None:
    """Users in random order, with any number of rows up to twice the mean."""
    rng = np.random.default_rng(0)
    store = ShardStore(tmp_path / "shard")
    counts = rng.integers(1, 2 * rows, users)
    ids = rng.permutation(10 * users)[:users]
    for start in range(0, users, 50):
        chosen = slice(start, start + 50)
        owners = np.repeat(ids[chosen], counts[chosen])
        batch = np.zeros(len(owners), namespace.row_dtype)
        batch["timestamp_ms"] = np.concatenate([np.arange(count) for count in counts[chosen]])
        batch["event_key"] = np.arange(len(owners))
        store.save(namespace, owners, batch)
    taken = store.open(namespace).stats().stored_bytes
    store.close()
    expected = MemorySize(users, round(float(counts.mean())), namespace).stored_bytes
    assert taken == pytest.approx(expected, rel=0.05)


class TestLayout:
    def test_a_small_memory_is_one_shard_on_one_node(self) -> None:
        layout = lay_out(MemorySize(1_000, 100, PAPER), Machines(node_bytes=64 * GIB))
        assert (layout.shards, layout.nodes) == (1, 1)

    def test_replicas_live_on_distinct_nodes(self) -> None:
        machines = Machines(node_bytes=64 * GIB, replicas=2)
        layout = lay_out(MemorySize(1_000, 100, PAPER), machines)
        assert (layout.shards, layout.nodes) == (1, 2)

    @pytest.mark.parametrize("replicas", [1, 2])
    @pytest.mark.parametrize("users", [10_000, 1_000_000, 30_000_000])
    def test_nodes_hold_their_shards(self, users: int, replicas: int) -> None:
        size = MemorySize(users, 500, PAPER)
        machines = Machines(node_bytes=200 * GIB, replicas=replicas)
        layout = lay_out(size, machines)
        per_node = machines.node_bytes // layout.shard_bytes
        assert layout.shards * layout.shard_bytes >= size.stored_bytes
        assert layout.nodes * per_node >= layout.shards * replicas
        assert layout.shards * replicas >= layout.nodes
        assert layout.shards == 256 or layout.shard_bytes <= DEFAULT_SHARD_BYTES

    @pytest.mark.parametrize(
        ("machines", "message"),
        [
            (Machines(1 << 40, shard_bytes=1 << 30), r"at most 256, .* allow 233 GiB per shard"),
            (Machines(1 << 30), "more than a node's 1 GiB; give larger nodes"),
            (Machines(0), "bytes of a node must be at least 1, got 0"),
            (Machines(1 << 30, replicas=0), "replicas must be at least 1"),
        ],
    )
    def test_what_cannot_be_is_refused(self, machines: Machines, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            lay_out(MemorySize(30_000_000, 1_953, PAPER), machines)


class TestLoad:
    def test_a_request_reads_rows_once_for_all_candidates(self) -> None:
        size, machines = MemorySize(1_000_000, 500, PAPER), Machines(1024 * GIB)
        layout = lay_out(size, machines)
        load = load_of(size, TRAFFIC, machines, layout)
        assert load.read_bytes == 1000 * 200 * 1080
        assert load.local_read_bytes + load.network_read_bytes == pytest.approx(load.read_bytes)
        assert load.read_bytes_per_pair == pytest.approx(200 * 1080 / 500)
        assert load.attention_macs == 1000 * 500 * 5 * 2 * 200 * 128
        assert load.writes == pytest.approx(1_000_000 * 133 * 2 / 86_400)
        assert load.write_bytes == pytest.approx(load.writes * 1080)

    def test_one_node_uses_no_network(self) -> None:
        size, machines = MemorySize(1_000, 500, PAPER), Machines(1024 * GIB)
        load = load_of(size, TRAFFIC, machines, lay_out(size, machines))
        assert (load.network_read_bytes, load.network_write_bytes) == (0, 0)

    def test_fewer_layers_are_fewer_bytes(self) -> None:
        size, machines = MemorySize(1_000, 500, PAPER), Machines(1024 * GIB, remote_share=1)
        raw = Traffic(1, 1, 200, 0, 10, 1)
        load = load_of(size, raw, machines, lay_out(size, machines))
        assert load.network_read_bytes == load.read_bytes == 200 * EVENT_BYTES

    def test_bad_input(self) -> None:
        size, machines = MemorySize(1_000, 500, PAPER), Machines(1024 * GIB, remote_share=2)
        layout = lay_out(size, machines)
        with pytest.raises(ValueError, match="the remote share must be between 0 and 1, got 2"):
            load_of(size, TRAFFIC, machines, layout)
        with pytest.raises(ValueError, match="layers read must be between 0 and the depth 4"):
            load_of(size, Traffic(1, 1, 1, 5, 1, 1), machines, layout)
        with pytest.raises(ValueError, match="at least 1, got 0 users with 5 rows"):
            MemorySize(0, 5, PAPER)
