"""A batch as one time-ordered sequence per user: for methods whose rows attend to one another.

The rows of a user are his stored rows (the slab) and his earlier events of the batch (the block),
oldest first; his queries are beside them. Whatever is computed of a row is then computed once per
user and batch, not once per query. Rows that no query of the batch sees are left out.

Every row and every query (a *token*) has a position: it sees the rows of its user that are strictly
earlier in time and among the newest n before it. As rows are in order, these are a contiguous run.
Two events of one moment do not see each other. A row at the beginning of what was fetched sees less
than n rows, as those before it are not there.

Everything here depends on data only. Shape legend: B queries, U users, N slab length, R rows of the
user who has most, V users in the order of `Places`, T tokens of the user who has most.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from marm.sequence import Queries, Slab, View

NOWHERE = 1 << 29
"""Ordinal of padding among rows: after every token. Its negative is the padding of tokens."""

_USER_STRIDE = 1 << 40


@dataclass(frozen=True)
class Places:
    """Where tokens lie in a padded array ``[V, T]``, and what each place sees.

    Users with most tokens come first, so that those with at least t tokens are always a prefix.
    """

    place: NDArray[np.int64]  # [tokens] V*T + T of each token
    user_V: NDArray[np.int64]  # row of `UserSequence.ordinal_UR` that is this user's
    length_V: NDArray[np.int64]  # tokens of each user; not increasing
    before_VT: NDArray[np.int32]  # ordinal of the first row that is not earlier
    timestamp_ms_VT: NDArray[np.int64]
    first_VT: NDArray[np.int64]  # the run of rows seen is first, ..., end - 1; padding sees nothing
    end_VT: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, int]:
        """(V, T)."""
        return self.before_VT.shape[0], self.before_VT.shape[1]

    def shared_by(self, num_tokens: int) -> Places:
        """The only token's view for ``num_tokens`` of them, as the candidates of a request have."""
        if len(self.place) == num_tokens:
            return self
        if len(self.place) != 1:
            raise ValueError(
                f"the inputs place {len(self.place)} queries, got {num_tokens}; only a view of one "
                "line can be shared by other numbers of queries"
            )
        return replace(
            self,
            place=np.arange(num_tokens),
            length_V=np.array([num_tokens]),
            before_VT=self.before_VT.repeat(num_tokens, axis=1),
            timestamp_ms_VT=self.timestamp_ms_VT.repeat(num_tokens, axis=1),
            first_VT=self.first_VT.repeat(num_tokens, axis=1),
            end_VT=self.end_VT.repeat(num_tokens, axis=1),
        )


@dataclass(frozen=True)
class UserSequence:
    """The sequences of all users of a batch.

    Rows are numbered as the slab's rows of ``slab_source`` and then the block's of
    ``block_source``. An *ordinal* counts the rows of a user that enter his sequence, from 0 at the
    first event of the batch and below 0 before it: the distance of a row is a difference of two.
    """

    slab_source: NDArray[np.int64]  # flat positions in [U, N]
    block_source: NDArray[np.int64]  # positions in [B]
    rows: Places
    queries: Places
    ordinal_UR: NDArray[np.int32]  # of rows; `NOWHERE` for padding
    history_length: int

    @property
    def num_rows(self) -> int:
        """Rows of all users."""
        return len(self.slab_source) + len(self.block_source)


@dataclass(frozen=True)
class BlockEvents:
    """The batch's own events as rows of one another."""

    view: View
    entering_B: NDArray[np.bool_]
    event_key_B: NDArray[np.uint64]


@dataclass(frozen=True)
class _Rows:
    """Rows before they are padded: of which user, in which order."""

    source: NDArray[np.int64]
    user: NDArray[np.int64]
    ordinal: NDArray[np.int64]
    before: NDArray[np.int64]  # ordinal of the first row of the same moment
    timestamp_ms: NDArray[np.int64]


def lay_out(
    slab: Slab,
    view: View,
    queries: Queries,
    block: BlockEvents | None,
    newer_B: NDArray[np.int64],
    history_length: int,
) -> UserSequence:
    """The sequences of a batch.

    Args:
        slab: stored rows. In training, rows from before each user's first event of the batch.
        view: of the slab, one line per query.
        queries: the queries, or the one moment that all candidates of a request share.
        block: the same events as rows (training).
        newer_B: predecessors of each query in the block, as for `marm.sequence.view_slab`.
        history_length: n.
    """
    num_users = len(slab.present)
    stored = _slab_rows(slab, view, queries)
    own = _block_rows(queries, block, newer_B)
    num_stored_U = np.bincount(stored.user, minlength=num_users)
    num_own_U = np.bincount(own.user, minlength=num_users)
    # Slab rows precede the block's, so places follow without sorting them together.
    index = np.concatenate(
        [_index_in_run(num_stored_U), _index_in_run(num_own_U) + num_stored_U[own.user]]
    )
    user = np.concatenate([stored.user, own.user])
    order_U, rank_U = _longest_first(num_stored_U + num_own_U)
    count_U = (num_stored_U + num_own_U)[order_U]
    shape = (num_users, int(count_U.max(initial=0)))
    place = rank_U[user] * shape[1] + index
    ordinal_UR = _padded(shape, place, np.concatenate([stored.ordinal, own.ordinal]), NOWHERE)
    before_UR = _padded(shape, place, np.concatenate([stored.before, own.before]), -NOWHERE)
    stamps = np.concatenate([stored.timestamp_ms, own.timestamp_ms])
    stamp_UR = _padded(shape, place, stamps, 0)
    users = np.arange(num_users)
    return UserSequence(
        stored.source,
        own.source,
        _places(place, users, count_U, before_UR, stamp_UR, ordinal_UR, history_length),
        _query_places(slab, queries, newer_B, rank_U, ordinal_UR, history_length),
        ordinal_UR.astype(np.int32),
        history_length,
    )


def _slab_rows(slab: Slab, view: View, queries: Queries) -> _Rows:
    """Stored rows that any query sees, user by user, oldest first."""
    num_users, num_columns = slab.present.shape
    seen_UN = np.zeros((num_users, num_columns), np.bool_)
    order = np.argsort(queries.user_row, kind="stable")
    users, starts = np.unique(queries.user_row[order], return_index=True)
    if len(users):
        seen_UN[users] = np.logical_or.reduceat(view.visible[order], starts, axis=0)
    user, from_oldest = np.nonzero(seen_UN[:, ::-1])
    column = num_columns - 1 - from_oldest
    stamps_UN = slab.rows["timestamp_ms"]
    before = -1 - _oldest_of_moment(stamps_UN, slab.present)[user, column]
    source = user * num_columns + column
    return _Rows(source, user, -1 - column, before, stamps_UN[user, column])


def _oldest_of_moment(
    stamp_UN: NDArray[np.int64], present_UN: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """The column of the oldest row at the time of each row; rows are newest first."""
    is_oldest_UN = np.ones(stamp_UN.shape, np.bool_)
    is_oldest_UN[:, :-1] = (stamp_UN[:, 1:] != stamp_UN[:, :-1]) | ~present_UN[:, 1:]
    column = np.arange(stamp_UN.shape[1])
    marked = np.where(is_oldest_UN, column, stamp_UN.shape[1])
    return np.minimum.accumulate(marked[:, ::-1], axis=1)[:, ::-1]


def _block_rows(
    queries: Queries, block: BlockEvents | None, predecessors_B: NDArray[np.int64]
) -> _Rows:
    """Events of the batch that any other sees, user by user, in the order of storage."""
    if block is None:
        nothing = np.zeros(0, np.int64)
        return _Rows(nothing, nothing, nothing, nothing, nothing)
    order = np.lexsort((block.event_key_B, queries.timestamp_ms, queries.user_row))
    user, entering = queries.user_row[order], block.entering_B[order]
    entered: NDArray[np.int64] = np.cumsum(entering) - entering
    num_events_U = np.bincount(user)
    first_of_user = np.repeat(np.cumsum(num_events_U) - num_events_U, num_events_U)
    ordinal = entered - entered[first_of_user]
    seen: NDArray[np.bool_] = np.any(block.view.visible, axis=0)[order]
    source = order[seen]
    stamps = queries.timestamp_ms[source]
    return _Rows(source, user[seen], ordinal[seen], predecessors_B[source], stamps)


def _query_places(
    slab: Slab,
    queries: Queries,
    newer_B: NDArray[np.int64],
    rank_U: NDArray[np.int64],
    ordinal_UR: NDArray[np.int64],
    history_length: int,
) -> Places:
    present_BN = slab.present[queries.user_row]
    stamps_BN = slab.rows["timestamp_ms"][queries.user_row]
    not_past_B = (present_BN & (stamps_BN >= queries.timestamp_ms[:, None])).sum(axis=1)
    count_U = np.bincount(queries.user_row, minlength=len(rank_U))
    order_V, rank_of_user = _longest_first(count_U)
    by_user = np.argsort(queries.user_row, kind="stable")
    index = np.empty(len(by_user), np.int64)
    index[by_user] = _index_in_run(count_U)
    shape = (len(rank_U), int(count_U.max(initial=0)))
    place = rank_of_user[queries.user_row] * shape[1] + index
    before_VT = _padded(shape, place, newer_B - not_past_B, -NOWHERE)
    stamp_VT = _padded(shape, place, queries.timestamp_ms, 0)
    return _places(
        place, rank_U[order_V], count_U[order_V], before_VT, stamp_VT, ordinal_UR, history_length
    )


def _places(
    place: NDArray[np.int64],
    user_V: NDArray[np.int64],
    length_V: NDArray[np.int64],
    before_VT: NDArray[np.int64],
    stamp_VT: NDArray[np.int64],
    ordinal_UR: NDArray[np.int64],
    history_length: int,
) -> Places:
    num_users, num_rows = ordinal_UR.shape
    base = np.arange(num_users)[:, None] * _USER_STRIDE
    every_row = (base + ordinal_UR).ravel()
    of_token = base[user_V]
    end = np.searchsorted(every_row, of_token + before_VT)
    first = np.searchsorted(every_row, of_token + before_VT - history_length)
    offset = user_V[:, None] * num_rows
    return Places(
        place,
        user_V,
        length_V,
        before_VT.astype(np.int32),
        stamp_VT,
        first - offset,
        end - offset,
    )


def _longest_first(count_U: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Users by falling count, and the rank of each."""
    order = np.argsort(-count_U, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return order, rank


def _index_in_run(count_U: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, ... for each of the runs of ``count_U`` elements that follow one another."""
    starts = np.cumsum(count_U) - count_U
    return np.arange(int(count_U.sum())) - np.repeat(starts, count_U)


def _padded(
    shape: tuple[int, int], place: NDArray[np.int64], values: NDArray[np.int64], padding: int
) -> NDArray[np.int64]:
    array = np.full(shape[0] * shape[1], padding, np.int64)
    array[place] = values
    return array.reshape(shape)
