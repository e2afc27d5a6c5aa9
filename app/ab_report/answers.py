"""Logged exposures as columns: the answers that people really got."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cache_actors.exposure_log.schema import EXPOSURE_STAGES


@dataclass(frozen=True)
class StageArms:
    """At one stage: each answer's experiment ("" for none) and assigned arm, ``[N]`` of str."""

    experiment: NDArray[np.object_]
    arm: NDArray[np.object_]


@dataclass(frozen=True)
class Answers:
    """``N`` answered requests with the ``I`` items that they showed, requests in time order."""

    user_id: NDArray[np.int64]  # [N]
    time_ms: NDArray[np.int64]  # [N]
    latency_ms: NDArray[np.float64]  # [N]
    degraded: NDArray[np.bool_]  # [N], whether anything was degraded
    overridden: NDArray[np.bool_]  # [N]
    holdout: NDArray[np.bool_]  # [N]
    stages: dict[str, StageArms]
    item_id: NDArray[np.int64]  # [I]
    request: NDArray[np.int64]  # [I], 0 .. N - 1, ascending

    def __len__(self) -> int:
        return len(self.user_id)

    @property
    def items_shown(self) -> NDArray[np.int64]:
        """Number of items of each answer, ``[N]``."""
        return np.bincount(self.request, minlength=len(self)).astype(np.int64)


def parse_answers(rows: pa.Table) -> Answers:
    """Columns of exposures in `EXPOSURE_SCHEMA`; shadow runs are left out: nobody saw them."""
    shadow = np.zeros(rows.num_rows, np.bool_)
    for stage in EXPOSURE_STAGES:
        shadow |= rows.column(f"{stage}_shadow").to_numpy()
    rows = rows.filter(pa.array(~shadow)).sort_by([("time_ms", "ascending")])
    shown = pc.list_value_length(rows.column("item_ids")).to_numpy()
    return Answers(
        user_id=rows.column("user_id").to_numpy(),
        time_ms=rows.column("time_ms").to_numpy(),
        latency_ms=rows.column("latency_ms").to_numpy().astype(np.float64),
        degraded=pc.list_value_length(rows.column("degraded")).to_numpy() > 0,
        overridden=rows.column("overridden").to_numpy(),
        holdout=rows.column("holdout").to_numpy(),
        stages={
            stage: StageArms(
                rows.column(f"{stage}_experiment").to_numpy(),
                rows.column(f"{stage}_arm").to_numpy(),
            )
            for stage in EXPOSURE_STAGES
        },
        item_id=pc.list_flatten(rows.column("item_ids")).to_numpy(),
        request=np.repeat(np.arange(rows.num_rows), shown),
    )
