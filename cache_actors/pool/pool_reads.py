"""Lookups in a whole pool: all shards at once, and again where users moved or were evicted."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cache_actors.pool.errors import MemoryUnavailable, PartlyUnavailable
from cache_actors.pool.gather import ShardAnswer, gather, known_part
from cache_actors.pool.placement import Placement, PlacementError
from cache_actors.pool.readers import Pending
from cache_actors.pool.routes import Routes
from cache_actors.pool.shard_link import RETRY_PAUSE_S
from cache_actors.pool.shard_reader import READ_FAILURES, ShardReader
from cache_actors.store.lookup import Lookup, UserState
from cache_actors.tiers.durable_tier import DurableTier
from marm.addressing import user_bucket
from marm.memory import Namespace

logger = logging.getLogger(__name__)

_FOUND = int(UserState.FOUND)
_RECALL_AGAIN_S = 30.0
_MAX_REMEMBERED_RECALLS = 200_000


@dataclass(frozen=True)
class Question:
    """A lookup of a batch of users."""

    user_ids: NDArray[np.int64]
    n: int
    before_ms: NDArray[np.int64] | None
    layers: int | None


@dataclass
class PoolAnswer:
    """What a pool knows of a batch of users; ``failures`` are the positions that could not be read
    and why."""

    found: Lookup
    failures: list[tuple[NDArray[np.int64], Exception]] = field(default_factory=list)
    recalled_users: int = 0
    damaged_users: int = 0


class PoolReads:
    """Reads of one namespace of a pool. Safe to use from several threads."""

    def __init__(
        self,
        routes: Routes,
        namespace: Namespace,
        node_id: str,
        tier: DurableTier | None,
        has_tier: bool,
        timeout_s: float,
    ) -> None:
        self._routes = routes
        self._namespace = namespace
        self._node_id = node_id
        self._tier = tier
        self._has_tier = has_tier  # the shards have it, also where this process cannot name it
        self._timeout_s = timeout_s
        self._readers: list[ShardReader] = []
        self._growing = threading.Lock()
        self._recalled_s: dict[int, float] = {}

    @property
    def readers(self) -> list[ShardReader]:
        """One reader per shard that the placement knows."""
        num_shards = self._routes.placement.num_shards
        self._reader_of(num_shards - 1)
        return self._readers[:num_shards]

    def _reader_of(self, shard: int) -> ShardReader:
        """The reader of one shard. It stays when the shard is gone: it may come back."""
        if len(self._readers) <= shard:
            with self._growing:
                while len(self._readers) <= shard:
                    self._readers.append(self._reader(len(self._readers)))
        return self._readers[shard]

    def _reader(self, shard: int) -> ShardReader:
        reader = ShardReader(self._routes.shard(shard), self._namespace, self._node_id, self._tier)
        try:
            reader.refresh(self._timeout_s)
        except READ_FAILURES as error:  # a later look finds it
            logger.warning("%s", error)
        return reader

    def lookup(self, question: Question, timeout_s: float | None = None) -> PoolAnswer:
        """Ask every shard concerned, until each user was found where it is, for at most
        ``timeout_s`` where that is less than the time-out of all lookups."""
        timeout_s = self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s)
        deadline = time.monotonic() + timeout_s
        answers: list[ShardAnswer] = []
        result = PoolAnswer(Lookup(None, None))  # type: ignore[arg-type]
        pending = np.arange(len(question.user_ids))
        while len(pending):
            elsewhere = []
            asked = self._routes.placement
            for shard, answer in self._ask(question, pending, deadline, result):
                answers.append(answer)
                if not answer.found.state.any():  # all found: the common case
                    continue
                refused = answer.positions[answer.found.state == UserState.ELSEWHERE]
                if len(refused):
                    elsewhere.append(refused)
                    buckets = np.unique(user_bucket(question.user_ids[refused]))
                    self._routes.refresh(buckets, shard)
            elsewhere += self._moved_away(question, result, asked)
            pending = np.concatenate(elsewhere) if elsewhere else pending[:0]
            if len(pending) and time.monotonic() + RETRY_PAUSE_S >= deadline:
                problem = MemoryUnavailable(
                    f"no shard of the pool owned {len(pending)} users for {timeout_s:.1f} s; "
                    "run `marm memory rebalance` again to finish a move that was broken off"
                )
                result.failures.append((pending, problem))
                break
        result.found = self._gather(question, answers)
        self._mend(question, answers, deadline, result)
        return result

    def _moved_away(
        self, question: Question, result: PoolAnswer, asked: Placement
    ) -> list[NDArray[np.int64]]:
        """Take those failures back whose shard owns its users no more: a rebalance stopped it."""
        if not result.failures:
            return []
        with contextlib.suppress(PlacementError):
            self._routes.refresh()
        now = self._routes.placement
        moved: list[tuple[NDArray[np.int64], Exception]] = []
        kept: list[tuple[NDArray[np.int64], Exception]] = []
        for positions, error in result.failures:
            ids = question.user_ids[positions]
            is_moved = (now.shard_of_users(ids) != asked.shard_of_users(ids)).any()
            (moved if is_moved else kept).append((positions, error))
        result.failures[:] = kept
        return [positions for positions, _ in moved]

    def _ask(
        self, question: Question, positions: NDArray[np.int64], deadline: float, result: PoolAnswer
    ) -> list[tuple[int, ShardAnswer]]:
        """Ask each shard about the users at ``positions`` that it owns, all shards at once."""
        asked: list[tuple[int, NDArray[np.int64], Pending]] = []
        answers = []
        user_ids = question.user_ids[positions]
        for share in self._routes.placement.split(user_ids):
            mine = positions[share.positions]
            before = None if question.before_ms is None else question.before_ms[mine]
            try:
                reader = self._reader_of(share.shard)
                ids = question.user_ids[mine]
                pending = reader.begin(ids, question.n, before, question.layers)
                asked.append((share.shard, mine, pending))
            except READ_FAILURES as error:
                result.failures.append((mine, error))
        for shard, mine, pending in asked:
            try:
                found = pending(max(0.0, deadline - time.monotonic()))
                answers.append((shard, ShardAnswer(mine, found)))
            except PartlyUnavailable as error:
                answers.append((shard, known_part(mine, error)))
                result.failures.append((mine[error.missing], error))
            except READ_FAILURES as error:
                result.failures.append((mine, error))
        return answers

    def _mend(
        self, question: Question, answers: list[ShardAnswer], deadline: float, result: PoolAnswer
    ) -> None:
        """Report damage, and read users again whose rows can be brought back."""
        found = result.found
        flawed = found.state != _FOUND
        if not flawed.any():
            return
        damaged = np.flatnonzero(found.state == UserState.DAMAGED)
        result.damaged_users = len(damaged)
        if len(damaged):
            ids = question.user_ids[damaged]
            for share in self._routes.placement.split(ids):
                self._reader_of(share.shard).report_damage(ids[share.positions])
        if not self._has_tier:
            return
        wanting = np.flatnonzero(flawed & (found.rows.counts < question.n))
        recalled = self._recall(question, wanting, found.state, deadline)
        if len(recalled):
            result.recalled_users = len(recalled)
            again = self._ask(question, recalled, deadline, PoolAnswer(found))
            answers.extend(answer for _, answer in again)
            result.found = self._gather(question, answers)

    def _recall(
        self,
        question: Question,
        positions: NDArray[np.int64],
        state: NDArray[np.uint8],
        deadline: float,
    ) -> NDArray[np.int64]:
        """Have shards bring users back from the durable tier; the positions worth another look."""
        recalled = [positions[:0]]
        now = time.monotonic()
        for share in self._routes.placement.split(question.user_ids[positions]):
            reader = self._reader_of(share.shard)
            mine = positions[share.positions]
            wanted = state[mine] == UserState.EVICTED
            if not reader.is_warm:
                wanted |= state[mine] == UserState.ABSENT
            ids = question.user_ids[mine].tolist()
            wanted &= np.array([self._recalled_s.get(u, 0.0) < now for u in ids], np.bool_)
            mine = mine[wanted]
            if not len(mine):
                continue
            try:
                reader.recall(question.user_ids[mine], max(0.0, deadline - now))
            except READ_FAILURES:
                continue  # what there is without it has been read already
            recalled.append(mine)
            self._remember(question.user_ids[mine], now)
        return np.concatenate(recalled)

    def _remember(self, user_ids: NDArray[np.int64], now: float) -> None:
        """Users that the tier does not have either are not asked for all the time."""
        if len(self._recalled_s) > _MAX_REMEMBERED_RECALLS:
            self._recalled_s.clear()
        self._recalled_s.update(dict.fromkeys(user_ids.tolist(), now + _RECALL_AGAIN_S))

    def _gather(self, question: Question, answers: list[ShardAnswer]) -> Lookup:
        dtype = self._namespace.layers_dtype(question.layers)
        return gather(question.user_ids, dtype, answers)
