"""Users in the order in which they were last used, so that the coldest can be evicted first."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice


class Recency:
    """Exact least-recently-used order. Of a user, only being used is known, not how often."""

    def __init__(self, coldest_first: Iterable[int] = ()) -> None:
        self._users: dict[int, None] = dict.fromkeys(coldest_first)  # dicts keep their order

    def __len__(self) -> int:
        return len(self._users)

    def add(self, user_ids: Iterable[int]) -> None:
        """Users that were written."""
        for user_id in user_ids:
            self._users.pop(user_id, None)
            self._users[user_id] = None

    def touch(self, user_ids: Iterable[int]) -> None:
        """Users that were read; unknown ones are not stored here, so they are ignored."""
        for user_id in user_ids:
            if user_id in self._users:
                del self._users[user_id]
                self._users[user_id] = None

    def remove(self, user_ids: Iterable[int]) -> None:
        """Users that were removed."""
        for user_id in user_ids:
            self._users.pop(user_id, None)

    def coldest(self, count: int) -> list[int]:
        """The ``count`` users unused for longest."""
        return list(islice(self._users, count))
