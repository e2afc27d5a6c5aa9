"""What a store knows of a user, beside the rows it gives."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from marm.memory import UserRows

ALL_ROWS = 1 << 40
"""More rows than any user has."""


class UserState(IntEnum):
    """What the rows given for a user are."""

    FOUND = 0
    """All that there is."""
    ABSENT = 1
    """Nothing is stored here."""
    EVICTED = 2
    """Some rows were dropped here and are left to the durable tier or the event log."""
    DAMAGED = 3
    """Stored rows failed their check and were left out."""
    ELSEWHERE = 4
    """Another shard owns the user."""


@dataclass(frozen=True)
class Lookup:
    """Rows of a batch of users, and the `UserState` of each as ``state [U]``."""

    rows: UserRows
    state: NDArray[np.uint8]
