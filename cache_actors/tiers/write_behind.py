"""Bringing what a shard stores to the durable tier, behind its back.

The backlog is a flag in the store's index per changed user, so an outage of the tier costs no
memory however long it lasts, and the flags survive the shard. A round takes users whose change
waited longest, adds their rows to the tier, and takes the flags back unless they changed again.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from cache_actors.store.errors import MemoryStoreError
from cache_actors.store.shard_store import ShardStore
from cache_actors.tiers.durable_tier import (
    DurableTier,
    DurableTierError,
    DurableTierUnavailableError,
)
from cache_actors.tiers.resync import Resync
from marm.memory import Namespace, UserRows

logger = logging.getLogger(__name__)

BATCH_BYTES = 16 << 20
"""Rows of this size are in memory at a time."""

_FIRST_BATCH_USERS = 64
_LONGEST_PAUSE_S = 10.0
_WIDEST = 8


@dataclass(frozen=True)
class WriteBehindStats:
    """Where the durable tier is behind the store.

    Attributes:
        backlog_users: changed users that the tier does not have yet, all namespaces together.
        oldest_unsaved_s: no change waits longer than this; what the loss of the node may cost.
        saved_users: users written since the start, counted every time.
        sent_bytes: bytes sent for them.
        errors: rounds that could not finish.
        resync_steps: buckets still to compare with a tier that was new, or was started again.
        last_error: why the last round could not finish; empty after one that could.
    """

    backlog_users: int
    oldest_unsaved_s: float
    saved_users: int
    sent_bytes: int
    errors: int
    resync_steps: int
    last_error: str


class WriteBehind:
    """The thread that saves one store's changes. Its methods may be called from any thread."""

    def __init__(
        self,
        store: ShardStore,
        tier: DurableTier,
        interval_s: float = 1.0,
        max_users_per_round: int = 512,
    ) -> None:
        """From now on the store flags what changes, and asks here before it evicts. At most
        ``max_users_per_round`` users are taken from it at a time."""
        if interval_s <= 0 or max_users_per_round < 1:
            raise ValueError(
                "write-behind needs interval_s > 0 and max_users_per_round >= 1, got "
                f"{interval_s} and {max_users_per_round}"
            )
        self._store = store
        self._tier = tier
        self._interval_s = interval_s
        self._max_users = max_users_per_round
        self._round = threading.Lock()  # one round at a time
        self._putting = threading.Lock()  # rows are read and put in one go: never older ones last
        self._resync = Resync(store, tier, max_users_per_round, self._putting)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._batch_users: dict[str, int] = {}
        self._saved_until_s = time.monotonic()
        self._saved_users = self._sent_bytes = self._errors = self._failures = 0
        self._last_error = ""
        store.track_unsaved = True
        store.evict_to = self.evict_to

    def start(self) -> None:
        """Begin to save in the background."""
        if self._thread is not None:
            raise RuntimeError("this write-behind runs already; make a new one")
        self._thread = threading.Thread(target=self._run, name="write-behind", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop after the round under way. What is not saved then stays flagged in the store."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def evict_to(self, namespace: Namespace, rows: UserRows) -> None:
        """Save users who are about to be evicted; for `ShardStore.evict_to`.

        Raises:
            DurableTierUnavailableError: the tier does not have them; don't evict.
        """
        with self._putting:
            self._tier.put(namespace, rows)

    def compare_all(self) -> None:
        """Have every user compared with the tier, after rows came into the store that were not
        flagged: `ShardStore.restore` takes its rows for saved, and those of a snapshot are not."""
        self._resync.begin_anew()

    def run_round(self, until_s: float | None = None) -> bool:
        """Save what waits, and compare a part of the store with a tier that may have lost rows.

        Args:
            until_s: begin no further batch after this time of the monotonic clock.

        Returns:
            Whether the tier has everything that was stored when the round began.
        """
        with self._round:
            try:
                is_done = self._save_all(until_s) & self._resync.step()
            except (DurableTierError, MemoryStoreError, OSError) as error:
                self._note_failure(str(error))
                return False
            if is_done or not self._last_error:
                self._failures = 0
                self._last_error = ""
            return is_done

    def flush(self, deadline_s: float) -> None:
        """Return once the tier has all that is stored now.

        Raises:
            DurableTierUnavailableError: it does not after ``deadline_s`` seconds.
        """
        end = time.monotonic() + deadline_s
        while not self.run_round(end):
            left_s = end - time.monotonic()
            if left_s <= 0 or self._stopping.is_set():
                stats = self.stats()
                raise DurableTierUnavailableError(
                    f"{stats.backlog_users} users are not in the durable tier after "
                    f"{deadline_s:.1f} s: {stats.last_error or 'it takes longer'}; they stay "
                    "flagged and are saved when it is back"
                )
            if self._failures:
                self._stopping.wait(min(left_s, 0.05))

    def stats(self) -> WriteBehindStats:
        """How far the tier is behind now."""
        backlog = sum(
            self._store.open(namespace).num_unsaved for namespace in self._store.namespaces()
        )
        waiting_s = time.monotonic() - self._saved_until_s if backlog else 0.0
        return WriteBehindStats(
            backlog,
            waiting_s,
            self._saved_users,
            self._sent_bytes,
            self._errors,
            self._resync.steps_left,
            self._last_error,
        )

    def _run(self) -> None:
        while not self._stopping.wait(self._pause_s()):
            try:
                self.run_round()
            except Exception as error:
                # The thread must outlive what nobody thought of: the backlog would only grow.
                logger.exception("write-behind failed")
                self._note_failure(repr(error))

    def _pause_s(self) -> float:
        longest_s = max(self._interval_s, _LONGEST_PAUSE_S)
        return min(longest_s, self._interval_s * 2 ** min(self._failures, 20))

    def _save_all(self, until_s: float | None) -> bool:
        """Save every namespace's backlog; whether nothing of it is left."""
        began_s = time.monotonic()
        is_done = True
        for namespace in self._store.namespaces():
            is_done &= self._save(namespace, until_s)
        if is_done:
            self._saved_until_s = began_s
        return is_done

    def _save(self, namespace: Namespace, until_s: float | None) -> bool:
        """Save a namespace's backlog; whether all that was flagged when it began is in the tier."""
        left = self._store.open(namespace).num_unsaved
        if not left:
            return True
        widening = 1
        while not self._stopping.is_set():
            users = self._batch_users.get(namespace.name, _FIRST_BATCH_USERS)
            users = min(users, self._max_users) * widening
            num_taken, num_saved = self._save_batch(namespace, users)
            if num_saved < num_taken:
                self._note_failure("the durable tier did not take all users")
                # Users of a dead node of a cluster must not keep the others from their turn.
                widening *= 2
            if num_taken < users:
                return num_saved == num_taken
            left -= num_saved
            # Users that change all the time come again: leave them to the next round.
            is_late = until_s is not None and time.monotonic() >= until_s
            if left <= 0 or is_late or widening > _WIDEST:
                return False
        return False

    def _save_batch(self, namespace: Namespace, num_users: int) -> tuple[int, int]:
        """Save up to so many users; how many there were, and how many are saved."""
        with self._putting:
            waiting = self._store.open(namespace).unsaved(num_users)
            rows = waiting.rows
            write = self._tier.try_put(namespace, rows)
        saved = write.saved
        self._store.mark_saved(namespace, rows.user_ids[saved], waiting.versions[saved])
        self._saved_users += int(saved.sum())
        self._sent_bytes += write.sent_bytes
        self._learn_batch_size(namespace, rows)
        return len(saved), int(saved.sum())

    def _learn_batch_size(self, namespace: Namespace, rows: UserRows) -> None:
        if len(rows.rows):
            user_bytes = rows.rows.nbytes / len(rows.user_ids)
            self._batch_users[namespace.name] = max(1, int(BATCH_BYTES / user_bytes))

    def _note_failure(self, why: str) -> None:
        if why != self._last_error:
            logger.warning("the durable tier is behind: %s", why)
        self._last_error = why
        self._errors += 1
        self._failures += 1
