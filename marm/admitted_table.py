"""An embedding table of fixed size for ids without number: rows are for ids that come again.

An id gets a row of its own once it was seen ``admit_after`` times; before that it uses a row that
all such ids of its feature share. An id that was not seen for ``keep_events`` events may lose its
row to a newer one. Admission by count and eviction by age follow TensorFlow's and HugeCTR's dynamic
embeddings; the table itself is a set-associative cache.

Rows are places in buckets of `WAYS`. An id belongs to one bucket, by hash, and may be in any of its
places, with the number of times it was seen. A new id takes a free place, else that of the id in
waiting (not yet admitted) seen least recently, else that of an admitted one that is out of date;
where all are admitted and fresh it is not kept. So ids that come once can't displace one that is in
use, however many there are.

Shape legend: B events, K addresses of an event, A addresses, W ways of a bucket, F feature dim.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from marm.addressing import combine64
from marm.sparse import FEATURE_SALTS, INIT_STD, ROW_STATE_BYTES, SparseTable

WAYS = 8
"""Places in a bucket."""

_SALT_BITS = 3
NUM_SHARED = 1 << _SALT_BITS
"""The first rows: one for each salt, for ids of its feature without a row."""

_NEVER = torch.iinfo(torch.int64).max
_OUT_OF_DATE = 1 << 61  # after every id in waiting
_MAX_COUNT = 1 << 30


class AdmittedTable(SparseTable):
    """Rows for ids that were seen often enough and not too long ago.

    Its state (which id has which row, how often and when it was seen) is part of the weights: it is
    published with them, so that ids are looked up when serving as they were when training.
    """

    ids: Tensor  # [P] int64 address in each place, 0: none
    counts: Tensor  # [P] int32 times it was seen
    seen_at: Tensor  # [P] int64 events before it was last seen
    num_seen: Tensor  # [1] int64 events so far

    def __init__(
        self, num_slots: int, feature_dim: int, admit_after: int, keep_events: int
    ) -> None:
        self._num_buckets = num_slots // WAYS
        if self._num_buckets < 1:
            raise ValueError(f"num_slots must be at least {WAYS}, got {num_slots}")
        num_places = self._num_buckets * WAYS
        weight = torch.zeros(NUM_SHARED + num_places, feature_dim)
        weight[:NUM_SHARED].normal_(std=INIT_STD)
        super().__init__(weight)
        self.num_slots, self.admit_after = num_slots, admit_after
        self.keep_events = keep_events
        self.register_buffer("ids", torch.zeros(num_places, dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(num_places, dtype=torch.int32))
        self.register_buffer("seen_at", torch.zeros(num_places, dtype=torch.int64))
        self.register_buffer("num_seen", torch.zeros(1, dtype=torch.int64))

    @staticmethod
    def addresses(feature: str, ids: ArrayLike, num_slots: int) -> NDArray[np.int64]:
        """See `SparseTable.slots`: 60 bits of hash, then the feature's salt."""
        array, salt = np.asarray(ids), FEATURE_SALTS[feature]
        hashed = (combine64(salt, array.ravel()) >> np.uint64(_SALT_BITS + 1)).astype(np.int64)
        return ((hashed << _SALT_BITS) | salt).reshape(array.shape)

    @staticmethod
    def needed_bytes(num_slots: int, feature_dim: int, num_shards: int = 1) -> int:
        """What a table takes, with its optimiser, on each worker that its rows are spread over;
        which id has which row is known to all of them."""
        num_rows, own_bytes = num_slots + NUM_SHARED, 8 + 4 + 8  # ids, counts, seen_at
        held_rows = -(-num_rows // num_shards)
        return held_rows * (4 * feature_dim + ROW_STATE_BYTES) + num_rows * own_bytes

    @property
    def num_admitted(self) -> int:
        """Ids that have a row of their own."""
        return int((self.counts >= self.admit_after).sum())

    def slots(self, feature: str, ids: ArrayLike) -> NDArray[np.int64]:
        """See `SparseTable.slots`."""
        return self.addresses(feature, ids, self.num_slots)

    @torch.no_grad()
    def find(self, addresses: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `SparseTable.find`."""
        flat_A = torch.from_numpy(np.ascontiguousarray(addresses).ravel()).to(self.ids.device)
        bucket_A, is_here_AW = self._look(flat_A)
        is_here_AW &= self.counts.view(-1, WAYS)[bucket_A] >= self.admit_after
        own_A = NUM_SHARED + bucket_A * WAYS + is_here_AW.to(torch.uint8).argmax(dim=1)
        row_A = torch.where(is_here_AW.any(dim=1), own_A, flat_A & (NUM_SHARED - 1))
        found: NDArray[np.int64] = row_A.cpu().numpy().reshape(addresses.shape)
        return found

    def stat_slots(self, addresses: Tensor) -> Tensor:
        """See `SparseTable.stat_slots`: by hash, as item statistics are not admitted."""
        return (addresses >> _SALT_BITS) % self.num_slots

    @torch.no_grad()
    def observe(self, addresses_BK: Callable[[], Tensor]) -> None:
        """See `SparseTable.observe`: counts, admits and evicts."""
        seen_BK = addresses_BK()
        now = int(self.num_seen) + len(seen_BK)
        self.num_seen.fill_(now)
        address_A, times_A = torch.unique(seen_BK, return_counts=True)  # sorted
        times_A = times_A.clamp(max=_MAX_COUNT).to(torch.int32)
        bucket_A, is_here_AW = self._look(address_A)
        is_known_A = is_here_AW.any(dim=1)
        place_A = (bucket_A * WAYS + is_here_AW.to(torch.uint8).argmax(dim=1))[is_known_A]
        before_A = self.counts[place_A]
        after_A = (before_A + times_A[is_known_A]).clamp(max=_MAX_COUNT)
        self.counts[place_A], self.seen_at[place_A] = after_A, now
        self._admit(place_A[(before_A < self.admit_after) & (after_A >= self.admit_after)])
        self._take_in(address_A[~is_known_A], times_A[~is_known_A], now)

    def _look(self, address_A: Tensor) -> tuple[Tensor, Tensor]:
        """The bucket ``[A]`` of each address, and in which of its places it is ``[A, W]``."""
        bucket_A = (address_A >> _SALT_BITS) % self._num_buckets
        return bucket_A, self.ids.view(-1, WAYS)[bucket_A] == address_A[:, None]

    def _take_in(self, address_A: Tensor, times_A: Tensor, now: int) -> None:
        """Give new ids a place, one a bucket at a time."""
        bucket_A = (address_A >> _SALT_BITS) % self._num_buckets
        order = torch.argsort(bucket_A, stable=True)
        address_A, times_A, bucket_A = address_A[order], times_A[order], bucket_A[order]
        while len(address_A):
            is_first_A = torch.ones_like(bucket_A, dtype=torch.bool)
            is_first_A[1:] = bucket_A[1:] != bucket_A[:-1]
            bucket = bucket_A[is_first_A]
            worth, way = self._worth(bucket, now).min(dim=1)
            is_free = worth < _NEVER
            place = (bucket * WAYS + way)[is_free]
            times = times_A[is_first_A][is_free]
            self.ids[place] = address_A[is_first_A][is_free]
            self.counts[place], self.seen_at[place] = times, now
            self._admit(place[times >= self.admit_after])
            # A bucket that had no place has none for its others either.
            is_left_A = ~is_first_A & torch.isin(bucket_A, bucket[is_free])
            address_A, times_A, bucket_A = (
                column[is_left_A] for column in (address_A, times_A, bucket_A)
            )

    def _worth(self, bucket: Tensor, now: int) -> Tensor:
        """How much each place of the buckets is worth keeping: the least goes first."""
        counts, seen_at = (column.view(-1, WAYS)[bucket] for column in (self.counts, self.seen_at))
        is_admitted = counts >= self.admit_after
        is_kept = (seen_at == now) | (is_admitted & (now - seen_at <= self.keep_events))
        worth = torch.where(is_admitted, seen_at + _OUT_OF_DATE, seen_at)
        worth = torch.where(is_kept, torch.full_like(worth, _NEVER), worth)
        return torch.where(counts == 0, torch.full_like(worth, -1), worth)

    def _admit(self, place: Tensor) -> None:
        """Rows begin as their feature's shared one, so that admission changes no prediction."""
        shared = self.ids[place] & (NUM_SHARED - 1)
        self.weight[NUM_SHARED + place] = self.weight[shared]
        self.squared_gradient[NUM_SHARED + place] = 0.0
