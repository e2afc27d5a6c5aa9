"""How far cascading agrees with ranking: does it keep what ranking would show?

Cascading need not predict well; it must not lose what ranking puts first. Both predict the same
events of the stream, so the events of a user stand for his candidates: they are cut into windows of
consecutive events, and the two orders of each window are compared.

Shape legend: G windows, W events of a window.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from marm.ranking_metrics import pair_agreement, top_recall
from train.predictions import Predictions

WINDOW_EVENTS = 20
TOP = 5
KEPT = 10
"""Of the `WINDOW_EVENTS` events of a window, ranking would show `TOP` and cascading keeps `KEPT`; a
cascading model that guesses keeps half of them."""


def agreement(ranking: Predictions, cascading: Predictions, task: str) -> dict[str, float]:
    """Agreement of the two stages on ``task``, over predictions of the same events in one order.

    Returns:
        ``pairs``, ``pairs_alike`` and ``kendall_tau`` of `pair_agreement`, over the windows of all
        users (the last of a user may be short); ``windows``, the full ones, and over these
        ``top_5_recall``: of ranking's 5 best of 20 events, the share among cascading's 10 best.
        Nothing when ranking does not predict the task, or there are no events.
    """
    if task not in ranking.tasks or not len(ranking):
        return {}
    of_ranking, of_cascading = ranking.arrays(), cascading.arrays()
    if not np.array_equal(of_ranking["user_ids"], of_cascading["user_ids"]):
        raise ValueError(
            f"expected predictions of the same events, got {len(ranking)} of ranking and "
            f"{len(cascading)} of cascading of other users or in another order"
        )
    a = of_ranking["scores"][:, ranking.tasks.index(task)]
    b = of_cascading["scores"][:, cascading.tasks.index(task)]
    place_GW = windows(of_ranking["user_ids"])
    valid_GW = place_GW >= 0
    full = valid_GW.all(axis=1)
    return {
        **pair_agreement(a[place_GW], b[place_GW], valid_GW),
        "windows": float(full.sum()),
        f"top_{TOP}_recall": top_recall(a[place_GW[full]], b[place_GW[full]], TOP, KEPT),
    }


def windows(user_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Consecutive events of each user, ``[G, W]`` places in ``user_ids``; -1 where a window is not
    full."""
    order = np.argsort(user_ids, kind="stable")
    ordered = user_ids[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)])
    counts = np.diff(np.append(starts, len(ordered)))
    within = np.arange(len(ordered)) - np.repeat(starts, counts)
    windows_before = np.cumsum(-(-counts // WINDOW_EVENTS)) - -(-counts // WINDOW_EVENTS)
    window = np.repeat(windows_before, counts) + within // WINDOW_EVENTS
    num_windows = int(window[-1]) + 1 if len(window) else 0
    place_GW = np.full((num_windows, WINDOW_EVENTS), -1, np.int64)
    place_GW[window, within % WINDOW_EVENTS] = order
    return place_GW
