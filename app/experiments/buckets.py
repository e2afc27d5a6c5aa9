"""Where a user stands under a salt, and which arm owns which bucket.

A salted hash puts a user in the same place in every process and release; Python's own `hash` is
salted per process and must not be used here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

NUM_AB_BUCKETS = 10_000

_UNIT_BITS = 53  # what a float64 holds exactly


def ab_bucket(salt: str, user_id: int) -> int:
    """The user's bucket in ``[0, NUM_AB_BUCKETS)`` under a salt; equal in every process."""
    return _digest(salt, user_id) % NUM_AB_BUCKETS


def unit_position(salt: str, user_id: int) -> float:
    """The user's place in ``[0, 1)`` under a salt.

    Users below a share take part: as the share grows users join, and none leaves.
    """
    position: float = (_digest(salt, user_id) >> (64 - _UNIT_BITS)) / (1 << _UNIT_BITS)
    return position


def nested_layout(weights: Mapping[str, float], control: str) -> NDArray[np.int16]:
    """The arm that owns each bucket, ``[NUM_AB_BUCKETS]``, as an index into ``sorted(weights)``.

    Each of the T treatment arms has a region of its own, every T-th bucket, and takes as much of it
    from the start as its weight asks for; the rest is the control's. So, as long as no treatment
    has more than 1/T, new weights move users between the control and a treatment only, never from
    one treatment to another. What a treatment has beyond 1/T comes from the ends of the others'
    regions.

    Args:
        weights: share of every arm, summing to 1; ``control`` is one of them.
    """
    names = sorted(weights)
    quotas = dict(zip(names, _quotas([weights[name] for name in names]), strict=True))
    layout = np.full(NUM_AB_BUCKETS, names.index(control), np.int16)
    treatments = [name for name in names if name != control]
    beyond: dict[str, int] = {}
    for number, name in enumerate(treatments):
        region = np.arange(number, NUM_AB_BUCKETS, len(treatments))
        layout[region[: quotas[name]]] = names.index(name)
        beyond[name] = max(0, quotas[name] - len(region))
    for name, wanted in beyond.items():
        if wanted:
            free = np.flatnonzero(layout == names.index(control))
            layout[free[-wanted:]] = names.index(name)
    return layout


def _digest(salt: str, user_id: int) -> int:
    digest = hashlib.blake2b(f"{salt}:{user_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _quotas(weights: list[float]) -> list[int]:
    """Whole buckets per arm that sum to all of them; the largest remainders are rounded up."""
    exact = np.array(weights, np.float64) * NUM_AB_BUCKETS
    quotas = np.floor(exact + 1e-6).astype(np.int64)
    missing = NUM_AB_BUCKETS - int(quotas.sum())
    quotas[np.argsort(quotas - exact, kind="stable")[:missing]] += 1
    return [int(quota) for quota in quotas]
