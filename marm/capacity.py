"""How much memory, disk, network and Redis a memory of a given size takes. Arithmetic only.

Every constant is one of a layout that the tests measure; every rate is an argument. Nothing here
knows what a machine costs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marm.addressing import NUM_BUCKETS
from marm.memory import Namespace

SECONDS_PER_DAY = 86_400

CHECK_BYTES = 8
"""Check word of a row."""

CHUNK_BYTES, MAX_CHUNK_ROWS, MIN_CHUNK_ROWS = 48 << 10, 128, 2
"""Rows are stored in chunks: at most so many bytes, a power of two of rows."""

INDEX_BYTES_PER_USER, INDEX_BYTES_PER_CHUNK = 57, 8
"""Key, record and pointer of a user in the index; and of each chunk."""

INDEX_FILL = 0.69
"""Share of a B-tree's pages that is used after inserts in random order (ln 2)."""

LOG_BYTES_PER_EVENT = 31
"""Of a compressed segment of 4,096 events of the simulated world."""

REDIS_KEY_BYTES = 91
"""Entry, key, object and slot of the table of a Redis key with a name of 16 characters."""

REDIS_BLOCK_BYTES = 500
"""The same for a block, with its longer name."""

_REDIS_HEADER_BYTES = 6
_BLOCK_HEADER_BYTES = 48
_ALLOCATOR_MIN_SPACED, _ALLOCATOR_STEP = 128, 16


@dataclass(frozen=True)
class MemorySize:
    """``users`` with ``rows`` each (the mean), of a namespace's layout."""

    users: int
    rows: int
    namespace: Namespace

    def __post_init__(self) -> None:
        if self.users < 1 or self.rows < 1:
            raise ValueError(
                f"users and rows must be at least 1, got {self.users} users with {self.rows} rows"
            )

    @property
    def vector_bytes_per_row(self) -> int:
        """The cached vectors alone: L times D numbers."""
        stored = self.namespace.stored_dtype
        return int(stored["memory"].itemsize)

    @property
    def row_bytes(self) -> int:
        """A whole row: event, attributes, step and vectors."""
        return self.namespace.stored_dtype.itemsize

    @property
    def vector_bytes(self) -> int:
        """The vectors of all rows: what the paper's figures count."""
        return self.users * self.rows * self.vector_bytes_per_row

    @property
    def payload_bytes(self) -> int:
        """All rows."""
        return self.users * self.rows * self.row_bytes

    @property
    def stored_bytes(self) -> int:
        """One copy in the store: rows, checks, unused places of chunks, and the index.

        Users differ: numbers of rows are taken as spread evenly from 1 to twice the mean.
        """
        counts = np.arange(1, 2 * self.rows)
        chunk = chunk_rows(self.row_bytes)
        places, chunks = _places(counts, chunk).mean(), (-(-counts // chunk)).mean()
        index = (INDEX_BYTES_PER_USER + INDEX_BYTES_PER_CHUNK * chunks) / INDEX_FILL
        return round(self.users * (places * (self.row_bytes + CHECK_BYTES) + index))

    @property
    def redis_block_bytes(self) -> int:
        """In Redis with one value per user, as the Redis tier keeps them."""
        block = _BLOCK_HEADER_BYTES + self.rows * self.row_bytes
        return self.users * (REDIS_BLOCK_BYTES + allocated_bytes(block + _REDIS_HEADER_BYTES))

    @property
    def redis_key_bytes(self) -> int:
        """In Redis with one value per user, item and layer: the paper's literal keys, which hold
        the vectors and nothing else."""
        if not self.namespace.depth:
            return 0
        vector = self.vector_bytes_per_row // self.namespace.depth
        value = allocated_bytes(vector + _REDIS_HEADER_BYTES)
        return self.users * self.rows * self.namespace.depth * (REDIS_KEY_BYTES + value)

    @property
    def log_bytes(self) -> int:
        """The events from which all rows can be computed again."""
        return self.users * self.rows * LOG_BYTES_PER_EVENT


@dataclass(frozen=True)
class Traffic:
    """What is asked of a memory.

    Attributes:
        qps: requests per second.
        reads_per_request: stages that read rows.
        rows_read: newest rows that each reads.
        layers_read: layers of them.
        candidates: items that a request scores.
        events_per_user_day: rows that become new per user and day.
        computed_writes: times that a row is written: raw by feedback, then computed by training.
    """

    qps: float
    reads_per_request: float
    rows_read: int
    layers_read: int
    candidates: int
    events_per_user_day: float
    computed_writes: float = 2.0


@dataclass(frozen=True)
class Machines:
    """Where it is to run. ``shard_bytes`` None makes shards of 64 GiB, or larger ones where that
    would be more than there are buckets."""

    node_bytes: int
    shard_bytes: int | None = None
    replicas: int = 1
    remote_share: float | None = None  # of reads; None: what users spread over all nodes give


@dataclass(frozen=True)
class Layout:
    """Shards and nodes for a memory."""

    shards: int
    shard_bytes: int  # on average
    nodes: int
    total_bytes: int  # all replicas


@dataclass(frozen=True)
class Load:
    """Rates, per second."""

    read_bytes: float
    local_read_bytes: float
    network_read_bytes: float
    writes: float
    write_bytes: float  # to all replicas
    network_write_bytes: float
    read_bytes_per_pair: float  # of a request and one of its candidates
    attention_macs: float


DEFAULT_SHARD_BYTES = 64 << 30


def lay_out(size: MemorySize, machines: Machines) -> Layout:
    """Shards and nodes that hold every replica, no two of one shard on one node.

    Raises:
        ValueError: when the shards asked for are more than there are buckets.
    """
    if machines.replicas < 1:
        raise ValueError(f"replicas must be at least 1, got {machines.replicas}")
    for name, given in (
        ("node", machines.node_bytes),
        ("shard", machines.shard_bytes or DEFAULT_SHARD_BYTES),
    ):
        if given < 1:
            raise ValueError(f"bytes of a {name} must be at least 1, got {given}")
    shards = math.ceil(size.stored_bytes / (machines.shard_bytes or DEFAULT_SHARD_BYTES))
    if shards > NUM_BUCKETS and machines.shard_bytes is not None:
        raise ValueError(
            f"{size.stored_bytes / 2**30:,.0f} GiB need {shards} shards of "
            f"{machines.shard_bytes / 2**30:g} GiB, and a pool has at most {NUM_BUCKETS}, one per "
            f"bucket; allow {math.ceil(size.stored_bytes / NUM_BUCKETS / 2**30)} GiB per shard"
        )
    total = size.stored_bytes * machines.replicas
    nodes = max(math.ceil(total / machines.node_bytes), machines.replicas)
    # A node holds whole shards, so there are at least as many, and all get their share.
    shards = min(max(shards, math.ceil(nodes / machines.replicas)), NUM_BUCKETS)
    shard_bytes = math.ceil(size.stored_bytes / shards)
    if shard_bytes > machines.node_bytes:
        raise ValueError(
            f"even with {NUM_BUCKETS} shards one has {shard_bytes / 2**30:,.1f} GiB, more than a "
            f"node's {machines.node_bytes / 2**30:g} GiB; give larger nodes, or split the users "
            "over several pools"
        )
    per_node = machines.node_bytes // shard_bytes
    nodes = max(math.ceil(shards * machines.replicas / per_node), machines.replicas)
    return Layout(shards, shard_bytes, nodes, total)


def load_of(size: MemorySize, traffic: Traffic, machines: Machines, layout: Layout) -> Load:
    """What the traffic means for memory bandwidth and network."""
    namespace = size.namespace
    if not 0 <= traffic.layers_read <= namespace.depth:
        raise ValueError(
            f"layers read must be between 0 and the depth {namespace.depth}, got "
            f"{traffic.layers_read}"
        )
    rows = min(traffic.rows_read, size.rows)
    row = namespace.layers_dtype(traffic.layers_read).itemsize
    read_bytes = traffic.qps * traffic.reads_per_request * rows * row
    remote = machines.remote_share
    if remote is None:  # a reader finds a replica on its own node with chance replicas / nodes
        remote = 1 - min(machines.replicas / layout.nodes, 1)
    if not 0 <= remote <= 1:
        raise ValueError(f"the remote share must be between 0 and 1, got {remote}")
    writes = size.users * traffic.events_per_user_day * traffic.computed_writes / SECONDS_PER_DAY
    write_bytes = writes * size.row_bytes * machines.replicas
    per_pair = traffic.qps * traffic.candidates
    macs_per_pair = (traffic.layers_read + 1) * 2 * rows * namespace.dim
    return Load(
        read_bytes=read_bytes,
        local_read_bytes=read_bytes * (1 - remote),
        network_read_bytes=read_bytes * remote,
        writes=writes,
        write_bytes=write_bytes,
        network_write_bytes=write_bytes * (1 - 1 / layout.nodes),
        read_bytes_per_pair=read_bytes / per_pair if per_pair else 0.0,
        attention_macs=per_pair * macs_per_pair,
    )


def chunk_rows(row_bytes: int) -> int:
    """Rows of a full chunk."""
    fitting = CHUNK_BYTES // row_bytes
    power = 1 << (max(fitting, 1).bit_length() - 1)
    return max(MIN_CHUNK_ROWS, min(MAX_CHUNK_ROWS, power))


def _places(counts: NDArray[np.int64], chunk: int) -> NDArray[np.int64]:
    """Row places that users take: full chunks, and one of the next power of two."""
    full = (counts - 1) // chunk
    powers = 1 << np.arange(chunk.bit_length())
    last = powers[np.searchsorted(powers, counts - full * chunk)]
    return full * chunk + np.maximum(last, MIN_CHUNK_ROWS)


def allocated_bytes(wanted: int) -> int:
    """What Redis' allocator takes for a value: the next of four sizes per power of two."""
    if wanted <= _ALLOCATOR_MIN_SPACED:
        return max(_ALLOCATOR_STEP, -(-wanted // _ALLOCATOR_STEP) * _ALLOCATOR_STEP)
    step = 1 << ((wanted - 1).bit_length() - 3)
    return -(-wanted // step) * step
