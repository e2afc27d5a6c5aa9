"""The client that gives feedback: one event at a time, at random moments."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from app.feedback import client_event_key
from benchmarks.perf.freshness_run.waits import Post
from benchmarks.perf.freshness_run.watching import RowWatch, require_ok
from benchmarks.perf.serving_load.answers import BUSY
from benchmarks.perf.serving_load.world import WorldSettings

_LONGEST_WATCH_S = 60.0
_PAUSE_S = 0.5


@dataclass(frozen=True)
class LoadSettings:
    """What the client does; nothing of it waits for the follower."""

    posts: int = 300
    posts_per_s: float = 2.0  # in the mean, at random moments
    asks_per_s: float = 5.0  # at most
    row_poll_s: float = 0.005
    warm_up_posts: int = 5  # not measured
    timeout_s: float = 180.0  # for the follower to learn what was posted
    seed: int = 0


class Poster:
    """Posts random events of random users, all of them different events."""

    def __init__(
        self, client: httpx.Client, world: WorldSettings, rows: RowWatch, settings: LoadSettings
    ) -> None:
        self.repeats = 0  # of requests, so far
        self._client, self._rows, self._timeout_s = client, rows, settings.timeout_s
        self._users = world.users().tolist()
        self._num_items = world.num_items
        self._numbers = itertools.count()
        self._rng = np.random.default_rng(settings.seed)

    def post(self) -> Post:
        """Send one event until its receipt comes; refused or unconfirmed, it is sent again, and its
        wait goes on.

        Raises:
            RuntimeError: the service does not take it at all.
        """
        event = self._event()
        user_id = event["user_id"]
        key = client_event_key(user_id, event["event_id"])
        self._rows.expect(user_id, key)
        sent_s = time.monotonic()
        response = self._client.post("/feedback", json=event)
        while response.status_code in BUSY and time.monotonic() < sent_s + self._timeout_s:
            self.repeats += 1
            time.sleep(_PAUSE_S)
            response = self._client.post("/feedback", json=event)
        confirmed_s = time.monotonic()
        require_ok(response)
        return Post(user_id, key, sent_s, confirmed_s)

    def post_many(self, num_posts: int, per_s: float) -> list[Post]:
        """Post at random moments, ``per_s`` in the mean, so that no moment of the follower's round
        is preferred. A slow receipt delays the next post, whose wait begins when it is sent."""
        posts = []
        due_s = time.monotonic()
        for _ in range(num_posts):
            due_s += self._rng.exponential(1 / per_s)
            time.sleep(max(0.0, due_s - time.monotonic()))
            posts.append(self.post())
        return posts

    def _event(self) -> dict[str, Any]:
        rng = self._rng
        likes = bool(rng.random() < 0.3)
        return {
            "user_id": self._users[int(rng.integers(len(self._users)))],
            "item_id": int(rng.integers(1, self._num_items + 1)),
            "event_id": f"freshness-{next(self._numbers)}",
            "labels": {
                "click": 1,
                "long_view": int(likes),
                "watch_time": float(rng.uniform(0, _LONGEST_WATCH_S)),
            },
        }
