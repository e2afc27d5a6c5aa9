"""One task of an audit: recompute some users' rows and hold the stored ones against them.

Nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marm.events import EventBatch
from train.rebuild.compare import RowErrors, compare_rows, is_memorised
from train.rebuild.histories import Histories, gather_histories
from train.rebuild.rebuilder import GROUP_EVENTS, check_namespace, groups_of
from train.rebuild.recompute import RowComputer
from train.rebuild.stored import NO_ROW, LayeredMemory, fetch_stored, stored_position
from train.rebuild.weights import RankingWeights


@dataclass(frozen=True)
class AuditCounts:
    """The rows that some users should have, and what there is of them."""

    users: int = 0
    users_without_rows: int = 0
    rows: int = 0  # that these users should have
    missing_rows: int = 0
    raw_rows: int = 0

    def __add__(self, other: AuditCounts) -> AuditCounts:
        return AuditCounts(
            self.users + other.users,
            self.users_without_rows + other.users_without_rows,
            self.rows + other.rows,
            self.missing_rows + other.missing_rows,
            self.raw_rows + other.raw_rows,
        )


class Auditor:
    """Compares a memory with what one frozen version computes.

    Args:
        weights: the version.
        memory: of the version's namespace.
        newest: rows per user to compare, counted from the newest; None: all.
    """

    def __init__(
        self, weights: RankingWeights, memory: LayeredMemory, newest: int | None = None
    ) -> None:
        check_namespace(weights, memory)
        self._config, self._memory, self._newest = weights.config, memory, newest
        self._reach = weights.config.receptive_field
        self._computer = RowComputer(weights.build(), weights.step, 0)

    def audit(
        self, batches: Iterable[EventBatch], user_ids: NDArray[np.int64]
    ) -> tuple[AuditCounts, RowErrors]:
        """Compare the rows of ``user_ids``; ``batches`` hold all their events."""
        keep = None if self._newest is None else self._newest + self._reach
        histories = gather_histories(batches, user_ids, self._config.namespace.sequence, keep)
        counts, parts = AuditCounts(), []
        for group in groups_of(histories, GROUP_EVENTS):
            group_counts, errors = self._audit_group(group)
            counts += group_counts
            parts.append(errors)
        return counts, RowErrors.concat(parts, self._config.depth)

    def _audit_group(self, group: Histories) -> tuple[AuditCounts, RowErrors]:
        stored = fetch_stored(self._memory, group)
        position = stored_position(stored, group)
        wanted = np.ones(len(group.events), np.bool_)
        if self._newest is not None:
            wanted = group.from_newest < self._newest
        is_there = wanted & (position != NO_ROW)
        comparable = is_there.copy()
        comparable[is_there] = is_memorised(stored.rows[position[is_there]])
        having = np.bincount(group.user_row[is_there], minlength=len(group.user_ids)) > 0
        counts = AuditCounts(
            len(group.user_ids),
            int((~having).sum()),
            int(wanted.sum()),
            int((wanted & ~is_there).sum()),
            int((is_there & ~comparable).sum()),
        )
        parts = []
        for block, fresh in self._computer.rows(group):
            here = comparable[block.start : block.end]
            old = stored.rows[position[block.start : block.end][here]]
            parts.append(compare_rows(old, fresh[here]))
        return counts, RowErrors.concat(parts, self._config.depth)
