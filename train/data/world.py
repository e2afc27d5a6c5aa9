"""The simulated world: users who watch short videos, as a seeded stream and as a live counterpart.

A world is one deterministic process. `World.stream` lets it run as a log of exposures in global
time order; `World.reveal`, `World.respond` and `World.accept` ask what a user would do with an item
as the world stands, and let it happen. The causes of a long view, strongest first: the user's habit
(which tag is wanted after which: `Taste.habit`, the part that only depth can use), the user's
drifting interests, quality on which everybody agrees, authors, fatigue and boredom, the page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache_actors.event_log.catalog import append_items, read_catalog
from cache_actors.event_log.log import EventLog
from cache_actors.home import Home
from marm.addressing import combine64, event_key
from marm.events import TASKS, EventBatch
from marm.items import ItemFeatures
from train.data.seen_items import changed_items
from train.data.source_ledger import SourceLedger, text_fingerprint
from train.data.world_config import WorldConfig
from train.data.world_noise import uniforms
from train.data.world_simulation import WINDOW_EVENTS, Simulation
from train.data.world_taste import FEEDBACK_NOISES, Exposures
from train.data.world_users import NUM_CONTEXTS


class World:
    """A simulated world at a moment. Not thread-safe: `stream` and `accept` move it on."""

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        self._simulation = Simulation(config)
        self._items = self._simulation.items
        self._taste = self._simulation.taste
        self._num_streamed = 0

    @property
    def now_ms(self) -> int:
        """Up to when the stream was simulated: the time of its last event once it ended."""
        return self._simulation.clock_ms

    def items(self) -> ItemFeatures:
        """The catalog: everything about the items that a log shows."""
        return self._items.features()

    def stream(self, chunk_size: int = WINDOW_EVENTS) -> Iterator[EventBatch]:
        """The rest of the ``num_events`` exposures in global time order, at most ``chunk_size`` at
        a time.

        The events don't depend on ``chunk_size``. When the stream ends, the users are exactly as
        their last event left them; when it is abandoned, some may be a little ahead.
        """
        for events, _ in self.stream_revealed(chunk_size):
            yield events

    def stream_revealed(
        self, chunk_size: int = WINDOW_EVENTS
    ) -> Iterator[tuple[EventBatch, NDArray[np.float32]]]:
        """Like `stream`, with the true expectation of every label, ``[B, len(TASKS)]``: the best
        that any model can predict."""
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        while self._num_streamed < self.config.num_events:
            left = self.config.num_events - self._num_streamed
            lived = self._simulation.advance(left)
            self._num_streamed += len(lived.logit)
            for start in range(0, len(lived.logit), chunk_size):
                part = lived.take(slice(start, start + chunk_size))
                yield (
                    self._as_events(part.shown, part.labels),
                    self._taste.probabilities(part.shown, part.logit),
                )

    def reveal(
        self,
        user_ids: NDArray[np.int64],
        item_ids: NDArray[np.int64],
        context_id: NDArray | int,
        now_ms: NDArray | int,
    ) -> NDArray[np.float32]:
        """Expected label of every task if each user saw each item now, ``[B, len(TASKS)]``."""
        shown = self._exposures(user_ids, item_ids, context_id, now_ms)
        return self._taste.probabilities(shown, self._taste.logits(shown, self._simulation.state))

    def respond(
        self,
        user_ids: NDArray[np.int64],
        item_ids: NDArray[np.int64],
        context_id: NDArray | int,
        now_ms: NDArray | int,
    ) -> NDArray[np.float32]:
        """What each user does with the item, ``[B, len(TASKS)]``; changes nothing.

        The same question in the same state has the same answer.
        """
        shown = self._exposures(user_ids, item_ids, context_id, now_ms)
        keys = combine64(self._simulation.traits.event_keys[shown.user], shown.item, shown.now_ms)
        logit = self._taste.logits(shown, self._simulation.state)
        return self._taste.feedback(shown, logit, uniforms(keys, FEEDBACK_NOISES))

    def accept(
        self,
        user_ids: NDArray[np.int64],
        item_ids: NDArray[np.int64],
        context_id: NDArray | int,
        now_ms: NDArray | int,
        labels: NDArray[np.float32],
    ) -> EventBatch:
        """Let distinct users live through these exposures, with ``labels`` as `respond` gave them,
        and return the exposures as events."""
        shown = self._exposures(user_ids, item_ids, context_id, now_ms)
        if np.shape(labels) != (len(shown.user), len(TASKS)):
            raise ValueError(
                f"labels must have shape ({len(shown.user)}, {len(TASKS)}), got {np.shape(labels)}"
            )
        if len(np.unique(shown.user)) != len(shown.user):
            raise ValueError("accept takes one exposure per user; call it again for the next one")
        self._simulation.policy.experience(shown, labels, self._simulation.state)
        return self._as_events(shown, labels)

    def _exposures(
        self,
        user_ids: NDArray[np.int64],
        item_ids: NDArray[np.int64],
        context_id: NDArray | int,
        now_ms: NDArray | int,
    ) -> Exposures:
        ids = np.atleast_1d(np.asarray(user_ids, np.int64))
        unknown = (ids < 1) | (ids > self.config.num_users)
        if unknown.any():
            raise ValueError(
                f"user ids of this world are 1..{self.config.num_users}, "
                f"got {ids[unknown][:3].tolist()}"
            )
        context = np.broadcast_to(np.asarray(context_id, np.int64), ids.shape)
        if ((context < 0) | (context > NUM_CONTEXTS)).any():
            raise ValueError(f"context ids of this world are 0..{NUM_CONTEXTS}, got {context_id}")
        item = self._items.positions(np.atleast_1d(np.asarray(item_ids, np.int64)))
        if item.shape != ids.shape:
            raise ValueError(f"got {len(ids)} users but {len(item)} items; give one item per user")
        return Exposures(ids - 1, item, context, np.broadcast_to(np.int64(now_ms), ids.shape))

    def _as_events(self, shown: Exposures, labels: NDArray[np.float32]) -> EventBatch:
        user_id, item_id = shown.user + 1, self._items.item_id[shown.item]
        return EventBatch(
            user_id=user_id,
            item_id=item_id,
            timestamp_ms=np.ascontiguousarray(shown.now_ms),
            event_key=event_key(user_id, item_id, shown.now_ms),
            author_id=self._items.author_id[shown.item],
            tag_id=self._items.tag[shown.item] + 1,
            duration_ms=self._items.duration_ms[shown.item],
            context_id=shown.context_id.astype(np.int32),
            labels=labels,
        )


def write_world(
    home: Home | Path,
    config: WorldConfig,
    progress: Callable[[str, int], None] | None = None,
    *,
    again: bool = False,
) -> World:
    """Stream a world into the event log and the item catalog of ``home``, and return the world as
    its last event left it.

    The events become visible as a whole. ``progress`` gets ("write", events so far). A log that
    already holds the events of this configuration is left as it is, unless ``again``.
    """
    home = (home if isinstance(home, Home) else Home(home)).create()
    ledger = SourceLedger(home.log)
    ledger.recover()
    fingerprints = {"this simulated world": text_fingerprint(repr(config))}
    if not again:
        ledger.refuse_known(fingerprints)
    world = World(config)
    area = ledger.staging_area()
    try:
        staged, written = EventLog(area), 0
        for events in world.stream():
            staged.append(events)
            written += len(events)
            if progress is not None:
                progress("write", written)
        append_items(home.log, changed_items(read_catalog(home.log), world.items()))
        ledger.commit(area, fingerprints, {"world": asdict(config)})
    except BaseException:
        ledger.abandon(area)
        raise
    return world
