"""What a batch of changes comes to: records to put, and counts."""

from __future__ import annotations

from dataclasses import dataclass, field

Item = tuple[bytes, bytes | memoryview]


@dataclass
class WriteEffect:
    """Collected while a batch is worked on.

    ``incomplete`` has the positions of users that lost damaged rows.
    """

    items: list[Item]
    users_added: int = 0
    rows_added: int = 0
    rows_damaged: int = 0
    evicted_users_removed: int = 0
    evicted_users_added: int = 0
    incomplete: set[int] = field(default_factory=set)
